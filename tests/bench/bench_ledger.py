"""What the ledger's page reads besides the ledger: `python tests/bench/bench_ledger.py PART DATA`.

PART is audit (whose captions, which baselines), captions (one to five at test time), pictures (40 to 340 to train on), encoders
(others) or queries (label queries over one modality). DATA is a folder in COCO's layout with `val2017` and `folds.json`; every number is
out of fold. `pictures`, `encoders` and `queries` choose their settings as the ledger does, with three seeds; `audit` (one seed) and
`captions` (three) train at the rates that were best in the search's inner folds (nbs/results/trials.json). Writes nbs/results/audit.json
or scaling.json.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mmfuse.arms import UNIMODAL, Split, fold_splits, pooled_image, read_folds, score_arm, train_arm
from mmfuse.data import CocoPairs, mask_mentions
from mmfuse.files import provenance
from mmfuse.ledger import gain
from mmfuse.metrics import mean_average_precision, paired_bootstrap
from mmfuse.named import make_encoders, reading
from mmfuse.text_encoder import TextEncoder, make_text_encoder, name_similarity
from mmfuse.token_cache import cache_tokens
from mmfuse.training import predict

RESULTS = Path(__file__).resolve().parents[2] / "nbs" / "results"
ARMS = ("image_named", "text_named", "joint", "named")
SEEDS = 3
RATES = dict(image=1e-3, text=1e-3, image_named=3e-4, text_named=3e-4, joint=3e-4, named=2e-4)


def load(root, image="efficientnet_lite0", text="minilm"):
    "Pooled tokens of all pictures, the dataset, whether the tokens carry scores."
    data = CocoPairs(root, "val2017")
    encoders = make_encoders(image, text, data.classes)
    return pooled_image(cache_tokens(data, *encoders, progress=False)), data, reading(image).endswith("+names")


def heads_of(arm, splits, scored, rate=None, **kwargs):
    "A head for each fold."
    setting = dict(fit=dict(lr=rate or RATES[arm]), head={})
    return [train_arm(arm, s.train, setting, scored=scored, **kwargs) for s in splits]


def judged(heads, splits, captions=1):
    "Scores of all pictures, each by the head that has not seen it."
    return np.concatenate([predict(h, s.test, captions=captions).numpy() for h, s in zip(heads, splits)])


def with_captions(tokens, text, sentences):
    "The same pictures with other captions: a list of sentences for each."
    k = max(map(len, sentences))
    flat = [(r + [""] * k)[:k] for r in sentences]
    txt, mask = text.encode([c for r in flat for c in r])
    said = torch.tensor([[bool(c) for c in r] for r in flat])
    shape = len(flat), k
    return replace(tokens, txt=txt.unflatten(0, shape).half().numpy(), mask=(mask.unflatten(0, shape) & said[..., None]).numpy())


def other_captions(data, seed=0):
    "First captions under another name: masked, of a picture with the same labels, of any picture, names only."
    y, first = data.labels.numpy(), [c[0] for c in data.captions]
    named = [[c for c, v in zip(data.classes, row) if v] for row in y]
    overlap = (y @ y.T) / np.maximum(1, y.sum(1)[:, None] + y.sum(1)[None] - y @ y.T) - 2 * np.eye(len(y))
    order = np.random.default_rng(seed).permutation(len(y))
    return {"label words masked": [[mask_mentions(c, n)] for c, n in zip(first, named)],
            "of the picture with the most similar labels": [[first[j]] for j in overlap.argmax(1)],
            "of another picture, at random": [[first[np.roll(order, 1)[np.flatnonzero(order == i)[0]]]] for i in range(len(y))],
            "the categories' names only": [[", ".join(n)] for n in named]}


def row(scores, reference, y):
    "mAP, and the gain over a reference with its interval."
    value, base = mean_average_precision(scores, y), mean_average_precision(reference, y)
    return dict(mAP=value, reference=base, absolute=value - base, relative=value / base - 1, ci95=list(paired_bootstrap(scores, reference, y, n=500)[1:]))


def audit(root):
    tokens, data, scored = load(root)
    splits, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
    y, text = tokens.labels[order], make_text_encoder("minilm").freeze()
    heads = {arm: heads_of(arm, splits, scored) for arm in ("image", "text", *ARMS)}
    base = {arm: judged(h, splits) for arm, h in heads.items()}
    nameless = [Split(*(replace(t, names=np.zeros_like(t.names)) for t in (s.train, s.test))) for s in splits]
    base["image, untuned"] = judged(heads_of("image", splits, scored, rate=1e-3, epochs=10), splits)
    base["text without names, untuned"] = judged(heads_of("text", nameless, scored, rate=1e-3, epochs=10), splits)
    base["text by names, untrained"] = name_similarity(torch.tensor(tokens.txt[order, 0]).float(), torch.tensor(tokens.mask[order, 0]), torch.tensor(tokens.names)).numpy()
    found = {"references": {r: {a: row(base[a], base[r], y) for a in ("joint", "named")} for r in base if r not in ("joint", "named")}}
    whose = {"its own": None, **other_captions(data)}
    found["test captions"] = {}
    for name, sentences in whose.items():
        changed = splits if sentences is None else fold_splits(with_captions(tokens, text, sentences), read_folds(Path(root) / "folds.json"))[0]
        scores = {a: judged(heads[a], changed) for a in ("text_named", "named")}
        found["test captions"][name] = {a: row(s, base["image_named"], y) for a, s in scores.items()}
    masked = with_captions(tokens, text, [[mask_mentions(c, [n for n, v in zip(data.classes, r) if v]) for c in list(five)[:5]]
                                          for five, r in zip(data.captions, tokens.labels)])
    again = fold_splits(masked, read_folds(Path(root) / "folds.json"))[0]
    scores = {a: judged(heads_of(a, again, scored), again) for a in ("text_named", "named")}
    found["test captions"]["label words masked, in training too"] = {a: row(s, base["image_named"], y) for a, s in scores.items()}
    found["test captions"]["label words masked, in training too"]["gain over text_named"] = row(scores["named"], scores["text_named"], y)
    return found


def compared(scores, y):
    "mAP of each arm, and the gains of both fused arms over the best single modality among them; scores (S, N, C)."
    found = {a: float(np.mean([mean_average_precision(each, y) for each in s])) for a, s in scores.items()}
    single = max((a for a in UNIMODAL if a in scores), key=found.get)
    return {"mAP": found, "best_unimodal": single, "gains": {a: gain(scores[a], scores[single], y) for a in ("joint", "named")}}


def captions(root):
    tokens, _, scored = load(root)
    splits, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
    heads = {arm: [heads_of(arm, splits, scored, seed=seed) for seed in range(SEEDS)] for arm in ("text_named", "joint", "named")}
    return {k: compared({a: np.stack([judged(h, splits, captions=k) for h in each]) for a, each in heads.items()}, tokens.labels[order]) for k in range(1, 6)}


def chosen(splits, scored, arms=ARMS):
    "Scores of each arm as the ledger makes them."
    return {a: np.concatenate([score_arm(a, s, seeds=SEEDS, scored=scored)["scores"] for s in splits], 1) for a in arms}


def pictures(root):
    "Each fold draws its own pictures; those of a smaller number are among those of a larger one."
    tokens, _, scored = load(root)
    splits, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
    rows = [np.random.default_rng(i).permutation(len(s.train)) for i, s in enumerate(splits)]
    return {n: compared(chosen([Split(s.train.subset(r[:n]), s.test) for s, r in zip(splits, rows)], scored), tokens.labels[order]) for n in (40, 80, 160, 340)}


class WordVectors(nn.Module):
    "A vector for each word piece that says nothing but which one it is: random directions, no training, no neighbours."
    def __init__(self, vocab_size, special, dim=384):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=dim, max_position_embeddings=64)
        table = torch.randn(vocab_size, dim, generator=torch.Generator().manual_seed(0)) / dim**.5
        table[special] = 0
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self): return self.table
    def forward(self, input_ids, attention_mask): return SimpleNamespace(last_hidden_state=self.table(input_ids))


def word_vectors():
    "A text encoder that has never seen a sentence."
    tokenizer = make_text_encoder("minilm").tokenizer
    return TextEncoder(WordVectors(len(tokenizer), tokenizer.all_special_ids), tokenizer, "words").freeze()


def encoders(root):
    "`words`: the caption as random word vectors; the picture's names are still mixed by MiniLM, which has then read category names only."
    found, data = {}, CocoPairs(root, "val2017")
    for image, text in (("efficientnet_lite0", "minilm"), ("efficientnet_lite0@224", "minilm"), ("efficientnet_lite0@260+names", "minilm"),
                        ("efficientnet_lite2@260+names", "minilm"), ("efficientnet_lite0", "tiny"), ("efficientnet_lite0", "words")):
        pixels, words = make_encoders(image, "minilm" if text == "words" else text, data.classes)
        tokens = pooled_image(cache_tokens(data, pixels, word_vectors() if text == "words" else words, progress=False))
        splits, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
        found[f"{reading(image)}, {text}"] = compared(chosen(splits, reading(image).endswith("+names")), tokens.labels[order])
    return found


def blank(tokens, modality):
    "The same pictures, with one token of zeros in place of a modality: what is left is the other one alone."
    if modality == "image":
        return replace(tokens, img=np.zeros_like(tokens.img[:, :1]))
    return replace(tokens, txt=np.zeros_like(tokens.txt[:, :, :1]), mask=np.ones_like(tokens.mask[:, :, :1]))


def queries(root):
    "Label queries that ask the words only, or the picture's places only, beside the linear arms that read the same."
    data = CocoPairs(root, "val2017")
    encoders = make_encoders("efficientnet_lite0", "minilm", data.classes)
    tokens, scored = cache_tokens(data, *encoders, progress=False), reading("efficientnet_lite0").endswith("+names")
    whole, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
    y, pooled = tokens.labels[order], [Split(pooled_image(s.train), pooled_image(s.test)) for s in whole]
    scores = chosen(pooled, scored, ("image", "text", *ARMS))
    for name, gone in (("query_text", "image"), ("query_image", "text")):
        alone = [Split(blank(s.train, gone), blank(s.test, gone)) for s in whole]
        scores[name] = chosen(alone, scored, ("label_query",))["label_query"]
    linear = {"query_text": ("text", "text_named"), "query_image": ("image", "image_named")}
    return {"mAP": {a: float(np.mean([mean_average_precision(each, y) for each in s])) for a, s in scores.items()},
            "over": {q: {a: gain(scores[q], scores[a], y) for a in arms} for q, arms in linear.items()},
            "gains": {q: gain(scores["named"], scores[q], y) for q in linear}}


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, (list, tuple)) else round(x, 4) if isinstance(x, float) else x


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, root, start = sys.argv[1], sys.argv[2], time.process_time()
    path = RESULTS / ("audit.json" if part == "audit" else "scaling.json")
    found = {"audit": audit, "captions": captions, "pictures": pictures, "encoders": encoders, "queries": queries}[part](root)
    minutes = round((time.process_time() - start) / 60, 1)
    old = json.loads(path.read_text()) if path.exists() else {}
    new = {**old, part: {**rounded(found), "provenance": provenance(seeds=1 if part == "audit" else SEEDS, cpu_minutes=minutes)}}
    path.write_text(json.dumps(new, indent=1) + "\n")
