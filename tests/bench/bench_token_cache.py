"""What the token cache saves, and what half precision costs.

    python tests/bench/bench_token_cache.py [COCO]      writes nbs/results/token_cache.json; five minutes on one core

Part one: an epoch of fusion heads over toy pictures, with encoders of ResNet-50's and BERT-base's shapes (random weights
cost the same), in three ways: end to end, where the encoders learn along as in the article; frozen encoders in the loop; and
from the cache. Processor seconds of this process on one thread, so that a busy machine does not count; the ways take turns,
three times, and medians are kept (the cache's, which is short, of five in each turn).

Part two: mAP of the same predictors on tokens in float32 and in smaller formats. Toy COCO, `tiny` encoders, 1000 pictures to
train on and 500 to test; and, where COCO is given (a folder with val2017 and folds.json), real pictures out of fold with
EfficientNet-Lite0 and MiniLM.
"""

import copy
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.fusion import make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.losses import bce
from mmfuse.metrics import mean_average_precision, paired_bootstrap
from mmfuse.preprocessing import tokenize
from mmfuse.text_encoder import TextEncoder, make_text_encoder, masked_mean, name_similarity
from mmfuse.token_cache import Tokens, cache_tokens
from mmfuse.toy import toy_coco
from mmfuse.training import fit, predict

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "token_cache.json"
BATCH, ROUNDS, PICTURES = 16, 3, 16
HEADS = ("joint", "concat", "article", "cross_attention", "label_query")
SEEDS = (0, 1, 2)
FORMATS = {
    "float32": lambda x: x,
    "float16": lambda x: x.half().float(),
    "bfloat16": lambda x: x.bfloat16().float(),
    "float8": lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
}


def seconds(run) -> float:
    "Processor time of one call."
    start = time.process_time()
    run()
    return time.process_time() - start


class Epochs:
    "One epoch of a head, each way, over the same pictures."

    def __init__(self, folder: Path):
        self.data = CocoPairs(toy_coco(folder / "toy", n_train=PICTURES, n_val=1), "train2017")
        self.images = make_image_encoder("resnet50", pretrained=False).freeze()
        self.texts = TextEncoder(BertModel(BertConfig()), make_text_encoder("minilm").tokenizer, "bert-base").freeze()
        self.prepare, self.folder = self.images.transform(train=False), folder
        self.learning = nn.ModuleList(copy.deepcopy(e) for e in (self.images, self.texts)).requires_grad_(True)
        for encoder in self.learning:
            encoder.frozen = False
        self.slowly = torch.optim.AdamW(self.learning.parameters(), lr=1e-5)

    def fill(self):
        self.tokens = cache_tokens(
            self.data, self.images, self.texts, cache_dir=self.folder, n_captions=1, batch_size=BATCH, progress=False
        )

    def choose(self, name: str):
        self.head = make_head(name, self.images.dim, self.texts.dim, len(self.data.classes))
        self.optimizer = torch.optim.AdamW(self.head.parameters())

    def step(self, img: Tensor, txt: Tensor, mask: Tensor, y: Tensor):
        self.optimizer.zero_grad()
        bce(self.head(img, txt, mask), y).backward()
        self.optimizer.step()

    def pairs(self):
        for s in range(0, PICTURES, BATCH):
            rows = [self.data[i] for i in range(s, s + BATCH)]
            captions = tokenize(self.texts.tokenizer, [r.captions[0] for r in rows])
            yield torch.stack([self.prepare(r.image) for r in rows]), *captions, torch.stack([r.labels for r in rows])

    def end_to_end(self):
        self.learning.train()
        images, texts = self.learning
        for pictures, ids, mask, y in self.pairs():
            self.slowly.zero_grad()
            self.step(images(pictures), texts(ids, mask), mask, y)
            self.slowly.step()

    def frozen(self):
        for pictures, ids, mask, y in self.pairs():
            with torch.no_grad():
                img, txt = self.images(pictures), self.texts(ids, mask)
            self.step(img, txt, mask, y)

    def from_cache(self):
        for s in range(0, PICTURES, BATCH):
            rows = self.tokens.subset(slice(s, s + BATCH))
            img, txt = (torch.from_numpy(x.astype(np.float32)) for x in (rows.img, rows.txt[:, 0]))
            self.step(img, txt, torch.from_numpy(np.array(rows.mask[:, 0])), torch.from_numpy(rows.labels))


def epoch_times() -> dict:
    "Processor seconds of an epoch, by head and way."
    with tempfile.TemporaryDirectory() as folder:
        epochs, found = Epochs(Path(folder)), {}
        made = seconds(epochs.fill)
        for name in HEADS:
            epochs.choose(name)
            epochs.from_cache()  # the first epoch pays for allocations
            ways = epochs.end_to_end, epochs.frozen, epochs.from_cache
            turns = [[median(seconds(way) for _ in range(n)) for way, n in zip(ways, (1, 1, 5))] for _ in range(ROUNDS)]
            found[name] = dict(zip(("end_to_end", "frozen", "from_cache"), map(median, zip(*turns))))
            found[name]["parameters"] = sum(p.numel() for p in epochs.head.parameters())
            print(name, found[name], flush=True)
        shapes = dict(img=list(epochs.tokens.img.shape), txt=list(epochs.tokens.txt.shape))
        encoders = dict(image="ResNet-50", text="BERT-base")
        return dict(pictures=PICTURES, batch=BATCH, encoders=encoders, shapes=shapes, fill=made, heads=found)


def encode(data: CocoPairs, images, texts) -> Tokens:
    "As `cache_tokens`, in float32 and in memory, one caption a picture."
    prepare = images.transform(train=False)
    with torch.no_grad():
        img = torch.cat([images(prepare(s.image)[None]) for s in data])
    txt, mask = texts.encode([c[0] for c in data.captions])
    names = masked_mean(*texts.encode(data.classes)).numpy()
    ids = np.array(data.image_ids)
    return Tokens(img.numpy(), txt[:, None].numpy(), mask[:, None].numpy(), data.labels.numpy(), ids, names, data.classes)


def cast(tokens: Tokens, how) -> Tokens:
    return replace(tokens, **{k: how(torch.from_numpy(getattr(tokens, k))).numpy() for k in ("img", "txt")})


def pooled(tokens: Tokens) -> np.ndarray:
    "Both modalities' means, side by side."
    txt = masked_mean(torch.from_numpy(tokens.txt[:, 0]), torch.from_numpy(tokens.mask[:, 0]))
    return np.concatenate([tokens.img.mean(1), txt.numpy()], 1)


def scores_of(train: Tokens, test: Tokens) -> dict[str, np.ndarray]:
    "Three predictors: probe (N, C), a trained head by seed (S, N, C), and names without training (N, C)."
    probe = make_pipeline(StandardScaler(), RidgeCV(alphas=(10, 100, 1000, 10000))).fit(pooled(train), train.labels)
    txt, mask = torch.from_numpy(test.txt[:, 0]), torch.from_numpy(test.mask[:, 0])
    heads = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        widths = train.img.shape[-1], train.txt.shape[-1], len(train.classes)
        head = make_head("joint", *widths, names=torch.from_numpy(train.names))
        fit(head, train, epochs=20, seed=seed)
        heads.append(predict(head, test).numpy())
    names = name_similarity(txt, mask, torch.from_numpy(test.names), best=True).numpy()
    return {"linear probe": probe.predict(pooled(test)), "joint head": np.stack(heads), "name similarity": names}


def compare(splits: list[tuple[Tokens, Tokens]]) -> dict:
    "mAP in each format, and float16 less float32 with its interval."
    y, scores = np.concatenate([test.labels for _, test in splits]), {}
    for kind, how in FORMATS.items():
        parts = [scores_of(cast(a, how), cast(b, how)) for a, b in splits]
        scores[kind] = {k: np.concatenate([p[k] for p in parts], axis=-2) for k in parts[0]}
        print(kind, flush=True)

    def mean(s):
        return float(np.mean([mean_average_precision(x, y) for x in (s if s.ndim == 3 else s[None])]))

    values = {kind: {k: mean(s) for k, s in of.items()} for kind, of in scores.items()}
    change = {k: paired_bootstrap(scores["float16"][k], scores["float32"][k], y) for k in scores["float32"]}
    seeds = [mean_average_precision(s, y) for s in scores["float32"]["joint head"]]
    return dict(mAP=values, float16_less_float32={k: [float(x) for x in v] for k, v in change.items()}, seeds=seeds)


def real(root: str) -> dict:
    "Out of fold on real pictures."
    data = CocoPairs(root, "val2017")
    fold_of = json.loads((Path(root) / "folds.json").read_text())
    folds = np.array([fold_of[str(i)] for i in data.image_ids])
    all_ = encode(data, make_image_encoder("efficientnet_lite0").freeze(), make_text_encoder("minilm").freeze())
    return compare([(all_.subset(folds != f), all_.subset(folds == f)) for f in np.unique(folds)])


def main(root: str | None = None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    content = dict(epoch=epoch_times())
    images, texts = make_image_encoder("tiny").freeze(), make_text_encoder("tiny").freeze()
    toy = [encode(CocoPairs(toy_coco(), s), images, texts) for s in ("train2017", "val2017")]
    content["precision"] = {"toy": compare([tuple(toy)])} | ({"real": real(root)} if root else {})
    about = "toy COCO of seed 0; real: 427 labelled pictures of COCO val2017, one caption each, five folds"
    minutes = round((time.perf_counter() - start) / 60, 1)
    content |= provenance(data=about, seeds=SEEDS, minutes=minutes)
    print(json.dumps(content, indent=1))
    with atomic(OUT) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
