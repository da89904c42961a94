"""The article's model repaired one step at a time, and what pooled heads do without a modality.

    python tests/bench/bench_pooled_fusion.py repair COCO_ROOT     writes nbs/results/pooled_repair.json
    python tests/bench/bench_pooled_fusion.py missing COCO_ROOT    writes nbs/results/pooled_missing.json

Ten minutes each on one core. Both run on the toy COCO (train2017 to val2017, tiny encoders) and on real pictures (COCO_ROOT holds
val2017 and `folds.json`, out of fold, `efficientnet_lite0` and `minilm`). Every model of the repair chooses its rate on a quarter
of its training pictures, as the ledger does; an arm of the ledger takes what it chose there, by the same search. Then three seeds.
One caption at test time.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmfuse.arms import Split, fold_splits, pooled_image, read_folds
from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.image_encoder import make_image_encoder
from mmfuse.metrics import bootstrap, mean_average_precision, paired_bootstrap
from mmfuse.multiplicative_fusion import ArticleHead, FilmHead, GatedHead, LowRankHead
from mmfuse.pooled_fusion import ConcatHead, ImageHead, JointHead, LateHead, Standardize, TextHead
from mmfuse.text_encoder import make_text_encoder, masked_mean
from mmfuse.token_cache import Tokens, cache_tokens
from mmfuse.toy import toy_coco
from mmfuse.training import choose_captions, fit, predict, take

RESULTS = Path(__file__).resolve().parents[2] / "nbs" / "results"
SEEDS, EPOCHS = (0, 1, 2), 20
# on real pictures no arm of the ledger chose a rate above 3e-3; here `text` as it comes chooses the largest, 1e-2
RATES = dict(toy=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), real=(3e-4, 1e-3, 3e-3, 1e-2))


class OneToken(ArticleHead):
    "The article's layers with the caption's token taken away: the image reads itself."

    def two_tokens(self, *args):
        return super().two_tokens(*args)[:, :1]


class ReadBoth(ArticleHead):
    "Both outputs of the attention are read."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.classifier = nn.Linear(2 * self.d_text, self.n_classes)

    def forward(self, img, txt=None, mask=None):
        tokens = self.two_tokens(img, txt, mask)
        return self.classifier(self.attention(tokens, tokens, tokens, need_weights=False)[0].flatten(1))


class NoAttention(ReadBoth):
    "Two tokens side by side."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention = None

    def forward(self, img, txt=None, mask=None):
        return self.classifier(self.two_tokens(img, txt, mask).flatten(1))


class MeanOfWords(NoAttention):
    "The mean of the real words in place of [CLS]."

    def two_tokens(self, img, txt, mask):
        x_i, x_t = self.pooled(img, txt, mask)
        return torch.stack([self.project(x_i), x_t], 1)


def unscaled(head: nn.Module) -> nn.Module:
    "A head that takes features as they come."
    head.set_statistics = lambda *args: None
    return head


def make(cls, tokens: Tokens, seed: int, names: bool, raw: bool, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    given = torch.tensor(tokens.names) if names else None
    head = cls(tokens.img.shape[-1], tokens.txt.shape[-1], len(tokens.classes), names=given, **kwargs)
    return unscaled(head) if raw else head


def trained(cls, tokens: Tokens, setting: dict, seed=0, names=False, raw=False, dropout=0.0, **kwargs) -> nn.Module:
    rest = {k: v for k, v in setting.items() if k != "lr"}
    head = make(cls, tokens, seed, names, raw, **rest)
    fit(head, tokens, epochs=EPOCHS, seed=seed, lr=setting["lr"], modality_dropout=dropout, **kwargs)
    return head


def choose(cls, tokens: Tokens, rates: tuple[float, ...], **kwargs) -> dict:
    "The rate that is best on a quarter of the training pictures."
    settings = [dict(lr=lr) for lr in rates]
    cut = len(tokens) - round(0.25 * len(tokens))
    inner, held = tokens.subset(slice(0, cut)), tokens.subset(slice(cut, None))
    found = [mean_average_precision(predict(trained(cls, inner, s, **kwargs), held), held.labels) for s in settings]
    return settings[int(np.argmax(found))]


def data(root: str | None) -> tuple[list[Split], np.ndarray]:
    "Splits and the labels of their test pictures: the toy COCO, or out of fold."
    if root is None:
        encoders = make_image_encoder("tiny").freeze(), make_text_encoder("tiny").freeze()
        train, test = (cache_tokens(CocoPairs(toy_coco(), s), *encoders, progress=False) for s in ("train2017", "val2017"))
        return [Split(train, test)], test.labels
    encoders = make_image_encoder("efficientnet_lite0").freeze(), make_text_encoder("minilm").freeze()
    tokens = cache_tokens(CocoPairs(root, "val2017"), *encoders, progress=False)
    splits, order = fold_splits(tokens, read_folds(Path(root) / "folds.json"))
    return splits, tokens.labels[order]


def pooled(splits: list[Split]) -> list[Split]:
    return [Split(pooled_image(s.train), pooled_image(s.test)) for s in splits]


def two_words(tokens: Tokens) -> Tokens:
    "Captions of two tokens, with the [CLS] and the mean of the whole: all that a head without names reads, in a tenth of the time."
    n = len(tokens)
    txt, mask = (torch.from_numpy(np.array(x)).flatten(0, 1) for x in (tokens.txt, tokens.mask))
    cls, mean = txt[:, 0].float(), masked_mean(txt.float(), mask)  # (N K, Dt) each
    short = torch.stack([cls, 2 * mean - cls], 1)  # (N K, 2, Dt), and their mean is the mean
    there = mask.any(1, keepdim=True).expand(-1, 2)
    return replace(tokens, txt=short.unflatten(0, (n, -1)).numpy(), mask=there.unflatten(0, (n, -1)).numpy())


def summary(scores: np.ndarray, y: np.ndarray) -> dict:  # scores (S, N, C)
    value, low, high = bootstrap(scores, y)
    return dict(mAP=value, ci95=[low, high], seeds=[mean_average_precision(s, y) for s in scores])


def difference(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> dict:
    value, low, high = paired_bootstrap(a, b, y)
    return dict(absolute=value, ci95=[low, high])


def chosen_by_the_ledger(arm: str, splits: list[Split]) -> list[dict]:
    "The setting of each split that an arm of chapter 11 chose, by the same search over the same splits."
    ledger = RESULTS / f"ledger_{'real' if len(splits) > 1 else 'toy'}.json"
    return [s["fit"] | s["head"] for s in json.loads(ledger.read_text())["arms"][arm]["settings"]]


def scores_with(cls, splits: list[Split], settings: list[dict]) -> np.ndarray:
    "Logits (S, N, C) of heads with names, with one setting a split."
    each = [
        np.stack([predict(trained(cls, split.train, s, seed=seed, names=True), split.test).numpy() for seed in SEEDS])
        for split, s in zip(splits, settings)
    ]
    return np.concatenate(each, 1)


def scores_of(cls, splits: list[Split], rates: tuple[float, ...], **kwargs) -> tuple[np.ndarray, list[dict]]:
    "Logits (S, N, C) of every seed, and the setting that each split chose."
    parts, chosen = [], []
    for split in splits:
        chosen.append(choose(cls, split.train, rates, **kwargs))
        heads = [trained(cls, split.train, chosen[-1], seed=s, **kwargs) for s in SEEDS]
        parts.append(np.stack([predict(h, split.test).numpy() for h in heads]))
    return np.concatenate(parts, 1), chosen


CHAIN = [  # name, class, names, raw
    ("as printed", ArticleHead, False, True),
    ("inputs to one scale", ArticleHead, False, False),
    ("both outputs read", ReadBoth, False, False),
    ("no attention", NoAttention, False, False),
    ("mean of words for [CLS]", MeanOfWords, False, False),
    ("linear, from zero", JointHead, False, False),
    ("names", JointHead, True, False),
]
ALONE = [
    ("image", ImageHead, False, True),
    ("image, one scale", ImageHead, False, False),
    ("the article without its caption", OneToken, False, True),
    ("the article without its caption, one scale", OneToken, False, False),
    ("text", TextHead, False, True),
    ("text, one scale", TextHead, False, False),
    ("text, names", TextHead, True, False),
]


def gradients(head: nn.Module, tokens: Tokens) -> list[float]:
    "Mean norm of the loss's gradient with respect to each modality's pooled vector, in units of its standard deviation."
    rows = torch.arange(min(256, len(tokens)))
    img, txt, mask, y = take(tokens, rows, choose_captions(tokens, rows, 0))
    img, txt = img.requires_grad_(), txt.requires_grad_()
    was = head.training
    nn.functional.binary_cross_entropy_with_logits(head.eval()(img, txt, mask), y, reduction="none").sum(1).sum().backward()
    head.train(was)
    words = txt[:, 0] if isinstance(head, ArticleHead) else masked_mean(txt, mask)
    scale = [x.detach().std(0) for x in (img.mean(1), words)]
    for p in head.parameters():
        p.grad = None
    return [(x.grad.sum(1) * s).norm(dim=1).mean().item() for x, s in zip((img, txt), scale)]


def look(splits: list[Split], chosen: dict[str, list[dict]]) -> dict:
    "Attention weights on test pictures, and each modality's gradient after every epoch, on the first split."
    split, found = splits[0], {}
    for name, cls, names, raw in [c for c in CHAIN if c[0] in ("as printed", "inputs to one scale", "linear, from zero")]:
        curve: list = []
        head = make(cls, split.train, 0, names, raw)
        fit(head, split.train, epochs=EPOCHS, lr=chosen[name][0]["lr"], seed=0,
            on_epoch=lambda *_: curve.append(gradients(head, split.train)))
        found[name] = dict(gradients=curve)
        if cls is ArticleHead:
            rows = torch.arange(len(split.test))
            with torch.no_grad():
                x = head.two_tokens(*take(split.test, rows, choose_captions(split.test, rows, 0))[:3])
                weights = head.attention(x, x, x, average_attn_weights=False)[1][:, :, 0, 1]  # (N, H)
            counts = torch.histc(weights, 20, 0, 1).int().tolist()
            found[name] |= dict(weight_on_caption=counts, mean_weight=weights.mean().item())
    return found


def repair(splits: list[Split], y: np.ndarray) -> dict:
    splits, scores, chosen = pooled(splits), {}, {}
    short = [Split(two_words(s.train), two_words(s.test)) for s in splits]
    for name, cls, names, raw in CHAIN + ALONE:
        if names:
            chosen[name] = chosen_by_the_ledger({JointHead: "joint", TextHead: "text"}[cls], splits)
            scores[name] = scores_with(cls, splits, chosen[name])
        else:
            scores[name], chosen[name] = scores_of(cls, short, RATES["real" if len(splits) > 1 else "toy"], raw=raw)
        print(name, summary(scores[name], y)["seeds"], chosen[name], flush=True)
    steps = [name for name, *_ in CHAIN]
    rows = {name: summary(s, y) | dict(settings=chosen[name]) for name, s in scores.items()}
    for before, name in zip(steps, steps[1:]):
        rows[name]["vs_before"] = difference(scores[name], scores[before], y)
    for name in steps:
        rows[name]["vs_image"] = difference(scores[name], scores["image"], y)
        rows[name]["vs_text"] = difference(scores[name], scores["text, names"], y)
    return dict(steps={n: rows[n] for n in steps}, alone={n: rows[n] for n, *_ in ALONE}, look=look(short, chosen))


HEADS = dict(late=LateHead, concat=ConcatHead, joint=JointHead, article=ArticleHead, gated=GatedHead, low_rank=LowRankHead, film=FilmHead)
WITHOUT = {"both": (1, 1), "no image": (0, 1), "no text": (1, 0)}


class Blind(nn.Module):
    "A head whose modality is taken away."

    def __init__(self, head: nn.Module, image: int, text: int):
        super().__init__()
        self.head, self.image, self.text = head, image, text

    def forward(self, img, txt, mask):
        return self.head(img if self.image else None, txt if self.text else None, mask)


def standardized(head: nn.Module, split: Split) -> np.ndarray:
    "Each class's logits on the test pictures, in the mean and standard deviation that they have on the training pictures."
    z = Standardize(len(split.train.classes))
    z.fit(predict(head, split.train))
    return z(predict(head, split.test)).numpy()


def votes(splits: list[Split], y: np.ndarray, late: np.ndarray) -> dict:
    "Late fusion three ways: one rate for both parts, a rate of each part's own, and that with scores to one scale."
    own, equal = [], []
    for split, image, text in zip(splits, *(chosen_by_the_ledger(arm, splits) for arm in ("image", "text"))):
        pairs = [[trained(c, split.train, s, seed=seed, names=True) for c, s in ((ImageHead, image), (TextHead, text))] for seed in SEEDS]
        own.append(np.stack([sum(predict(h, split.test).numpy() for h in pair) / 2 for pair in pairs]))
        equal.append(np.stack([sum(standardized(h, split) for h in pair) / 2 for pair in pairs]))
    ways = {"one rate": late, "own rates": np.concatenate(own, 1), "standardized": np.concatenate(equal, 1)}
    return {k: summary(s, y) | dict(vs_one_rate=difference(s, late, y)) for k, s in ways.items()}


def scores_without(cls, splits: list[Split], chosen: list[dict], dropout: float) -> dict[str, np.ndarray]:
    "Scores of a head with both modalities and with one, trained with both or with one left out at times."
    parts = {k: [] for k in WITHOUT}
    for split, setting in zip(splits, chosen):
        heads = [trained(cls, split.train, setting, seed=s, names=True, dropout=dropout) for s in SEEDS]
        for k, there in WITHOUT.items():
            parts[k].append(np.stack([predict(Blind(h, *there), split.test).numpy() for h in heads]))
    return {k: np.concatenate(v, 1) for k, v in parts.items()}


def missing(splits: list[Split], y: np.ndarray) -> dict:
    lean, found, late = pooled(splits), {}, None
    for name, cls in HEADS.items():
        mine, found[name] = lean if cls.pools_image else splits, {}
        if cls not in (LateHead, JointHead):
            mine = [Split(two_words(s.train), two_words(s.test)) for s in mine]
        for how, dropout in (("trained with both", 0.0), ("a third with one", 0.33)):
            scores = scores_without(cls, mine, chosen_by_the_ledger(name, splits), dropout)
            found[name][how] = {k: summary(s, y) for k, s in scores.items()}
            print(name, how, {k: round(found[name][how][k]["mAP"], 3) for k in WITHOUT}, flush=True)
            if name == "late" and not dropout:
                late = scores["both"]
    return dict(heads=found, votes=votes(lean, y, late))


def main(what: str, root: str):
    torch.set_num_threads(1)
    start, measure = time.perf_counter(), dict(repair=repair, missing=missing)[what]
    content = {name: measure(*data(where)) for name, where in (("toy", None), ("real", root))}
    about = "toy COCO of seed 0: 1000 pictures to train on, 500 to test; real: 427 labelled pictures of COCO val2017, five folds; one caption at test time"
    minutes = round((time.perf_counter() - start) / 60, 1)
    content |= provenance(data=about, seeds=SEEDS, epochs=EPOCHS, minutes=minutes)
    with atomic(RESULTS / f"pooled_{what}.json") as path:
        path.write_text(json.dumps(content, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
