"""Does closing the modality gap, or better retrieval, raise mAP after fusion? Toy and real tokens, three interventions.

    python tests/bench/bench_alignment.py toy              the toy half of nbs/results/alignment.json; 3 minutes on one core
    python tests/bench/bench_alignment.py COCO_ROOT        the real half; 6 minutes
    python tests/bench/bench_alignment.py WHICH sum swap moves     these heads, this part (weights, moves); other numbers stay

Frozen tokens are projected to unit vectors of one width; a head reads them. **weight**: projections and head learn from
BCE + weight * InfoNCE, and every weight tunes its learning rate. **shift**: projections learn from InfoNCE alone and are
frozen; a constant coordinate moves the two clouds apart and leaves every ranking of retrieval as it was; heads learn on
top. **turn**: the same, with the captions rotated at random: nothing is lost but the correspondence of directions.
Toy: 1000 pictures to learn from, 500 to judge. Real: COCO_ROOT holds val2017 and `folds.json`; all of it is out of fold.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.alignment import LogitScale, info_nce, modality_gap, pair_distance, retrieval, uniformity
from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.image_encoder import make_image_encoder
from mmfuse.losses import bce
from mmfuse.metrics import mean_average_precision, paired_bootstrap
from mmfuse.text_encoder import make_text_encoder, masked_mean
from mmfuse.token_cache import Tokens, cache_tokens
from mmfuse.toy import toy_coco
from mmfuse.training import decay_groups, warmup_cosine

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "alignment.json"
KINDS = ("concat", "sum", "attention", "swap")
WEIGHTS = (0, 0.001, 0.01, 0.1, 1)
RATES = (1e-3, 3e-3)
WIDTH, BATCH, STEPS, SEEDS = 128, 64, 150, (0, 1, 2)
DIRECTIONS = 384  # principal directions of the training pictures that a wider image vector is cut down to
LEVELS = (0, 0.3, 0.6, 0.9)  # of the constant coordinate; the gap becomes about twice as much


@dataclass
class Vectors:
    "Pooled tokens of N pictures and of their five captions, and the tokens themselves for the one head that looks."
    img: Tensor  # (N, Di)
    txt: Tensor  # (N, K, Dt)
    places: Tensor  # (N, P, Di)
    words: Tensor  # (N, K, T, Dt)
    mask: Tensor  # (N, K, T)
    y: Tensor  # (N, C)
    ids: Tensor  # (N,)
    names: Tensor  # (C, Dt)

    def take(self, rows: Tensor | slice) -> "Vectors":
        parts = (self.img, self.txt, self.places, self.words, self.mask, self.y, self.ids)
        return Vectors(*(x[rows] for x in parts), self.names)

    def __len__(self) -> int:
        return len(self.ids)


def vectors(tokens: Tokens) -> Vectors:
    img, txt = (torch.tensor(np.asarray(x)).float() for x in (tokens.img, tokens.txt))
    mask, side = torch.tensor(np.asarray(tokens.mask)), int(tokens.img.shape[1] ** 0.5)
    grid = img.transpose(1, 2).unflatten(2, (side, side))  # (N, Di, h, w)
    places = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)  # (N, 9, Di)
    labels, ids, names = (torch.tensor(np.asarray(x)) for x in (tokens.labels, tokens.image_id, tokens.names))
    return Vectors(img.mean(1), masked_mean(txt, mask), places, txt, mask, labels, ids, names)


def prepare(train: Vectors, test: Vectors) -> tuple[Vectors, Vectors]:
    "Scaled by the training data's spread; not centred, so that there is a gap to close."
    stds = train.img.std(0), train.txt.flatten(0, 1).std(0)
    of_image, of_text = (s + 1e-3 * s.mean() for s in stds)  # a feature may never change
    turn = torch.linalg.svd(train.img / of_image, full_matrices=False).Vh[:DIRECTIONS].T

    def one(x: Vectors) -> Vectors:
        img, places = (v / of_image @ turn for v in (x.img, x.places))
        txt, words, names = (v / of_text for v in (x.txt, x.words, x.names))
        return Vectors(img, txt, places, words, x.mask, x.y, x.ids, names)

    return one(train), one(test)


class Projections(nn.Module):
    "Both modalities onto the unit sphere of one space, linearly."

    def __init__(self, data: Vectors):
        super().__init__()
        self.image, self.text = nn.Linear(data.img.shape[-1], WIDTH), nn.Linear(data.txt.shape[-1], WIDTH)
        self.scale = LogitScale()

    def see(self, img: Tensor) -> Tensor:
        return F.normalize(self.image(img), dim=-1)

    def read(self, txt: Tensor) -> Tensor:
        return F.normalize(self.text(txt), dim=-1)


class Head(nn.Module):
    "concat and sum read two vectors, attention lets words look at places, swap learns from captions and is asked pictures."

    def __init__(self, kind: str, n_classes: int, width: int = WIDTH):
        super().__init__()
        self.kind, d_in = kind, width * (2 if kind in ("concat", "attention") else 1)
        self.mlp = nn.Sequential(nn.Linear(d_in, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, n_classes))
        self.sharp = nn.Parameter(torch.tensor(10.0).log())
        nn.init.constant_(self.mlp[-1].bias, -3.0)

    def forward(self, u: Tensor, v: Tensor, places: Tensor | None, words: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.kind == "attention":
            scores = self.sharp.exp() * words @ places.transpose(1, 2)  # (B, T, P)
            u = masked_mean(scores.softmax(-1) @ places, mask)  # (B, d)
        x = {"sum": u + v, "swap": v if self.training else u}.get(self.kind)
        x = torch.cat([u, v], -1) if x is None else x
        return self.mlp(x * WIDTH**0.5)


def inputs(p: nn.Module, data: Vectors, rows: Tensor, k: Tensor, tokens: bool) -> tuple:
    "What a head reads of some pictures and of caption k of each."
    u, v = p.see(data.img[rows]), p.read(data.txt[rows, k])
    if not tokens:
        return u, v, None, None, None
    mask = data.mask[rows, k]
    longest = int(mask.sum(1).max())
    return u, v, p.see(data.places[rows]), p.read(data.words[rows, k, :longest]), mask[:, :longest]


def learn(
    data: Vectors, kind: str, weight: float, lr: float, seed: int, frozen: nn.Module | None = None
) -> tuple[nn.Module, Head | None]:
    "Projections and a head together; with `frozen`, the head alone; with kind 'none', the projections alone."
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    p = frozen or Projections(data)
    wide = WIDTH + (frozen is not None)
    head = None if kind == "none" else Head(kind, data.y.shape[1], wide)
    moving = nn.ModuleList(m for m in (head, None if frozen else p) if m)
    optimizer = torch.optim.AdamW(decay_groups(moving, 0.1), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warmup_cosine(s, STEPS))
    moving.train()
    for _ in range(STEPS):
        rows = torch.randperm(len(data), generator=g)[:BATCH]
        k = torch.randint(data.txt.shape[1], (len(rows),), generator=g)
        x = inputs(p, data, rows, k, kind == "attention")
        loss = bce(head(*x), data.y[rows]) if head else 0.0
        if weight:
            loss = loss + weight * info_nce(x[0], x[1], data.ids[rows], logit_scale=p.scale())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return p, moving.eval() and head


@torch.no_grad()
def scores_of(p: nn.Module, head: Head, data: Vectors) -> Tensor:
    rows = torch.arange(len(data))
    return head(*inputs(p, data, rows, torch.zeros_like(rows), head.kind == "attention"))


@torch.no_grad()
def measure(p: nn.Module, data: Vectors) -> dict:
    "Gap, distance, uniformity of pictures and first captions; Recall@K with all five captions."
    u, v = p.see(data.img), p.read(data.txt)  # (N, d), (N, K, d)
    found = retrieval(u, v.flatten(0, 1), data.ids, data.ids.repeat_interleave(v.shape[1]))
    out = dict(gap=modality_gap(u, v[:, 0]), distance=pair_distance(u, v[:, 0]))
    out |= dict(uniform_image=uniformity(u), uniform_text=uniformity(v[:, 0]))
    for way, short in (("image to text", "i2t"), ("text to image", "t2i")):
        out |= {f"{short}@{k}": r for k, r in found[way].items()}
    return out


def averaged(rows: list[dict]) -> dict:
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}


def best_rate(data: Vectors, kind: str, weight: float, frozen: nn.Module | None = None) -> float:
    "The rate with the best mAP on a quarter of the training pictures."
    cut = round(0.75 * len(data))
    inner, held = data.take(slice(0, cut)), data.take(slice(cut, None))
    tried = [learn(inner, kind, weight, lr, 0, frozen) for lr in RATES]
    return RATES[int(np.argmax([mean_average_precision(scores_of(*t, held), held.y) for t in tried]))]


def weight_rows(splits: list[tuple[Vectors, Vectors]], kind: str) -> tuple[list[dict], dict]:
    "One head under every weight."
    rows, kept = [], {}
    for weight in WEIGHTS:
        scores, rates = [], [best_rate(train, kind, weight) for train, _ in splits]
        for seed in SEEDS:
            parts, found, zero = [], [], []
            for (train, test), lr in zip(splits, rates):
                p, head = learn(train, kind, weight, lr, seed)
                parts.append(scores_of(p, head, test))
                found.append(measure(p, test))
                with torch.no_grad():
                    zero.append(p.see(test.img) @ p.read(test.names).T)
            scores.append(torch.cat(parts).numpy())
            y = labels(splits)
            row = dict(head=kind, weight=weight, seed=seed, mAP=mean_average_precision(scores[-1], y), **averaged(found))
            rows.append(row | dict(zero_shot=mean_average_precision(torch.cat(zero).numpy(), y), rates=rates))
        kept[weight] = np.stack(scores)
        print(kind, weight, {k: round(row[k], 3) for k in ("mAP", "gap", "t2i@1")}, rates, flush=True)
    return rows, kept


class Given(nn.Module):
    "Vectors that are projected already."

    def see(self, img: Tensor) -> Tensor:
        return img

    def read(self, txt: Tensor) -> Tensor:
        return txt


class Moved:
    """Frozen projections, then: centred; a constant coordinate, of opposite sign; captions rotated.

    Of the unit vector, the constant is `level`. It is added, so that the head reads the other coordinates as they were.
    """

    def __init__(self, p: Projections, train: Vectors, *, centred: bool = True, level: float = 0.0, turn: int | None = None):
        self.p, self.level, self.turn = p.eval(), level, torch.eye(WIDTH)
        with torch.no_grad():
            self.of_image = p.see(train.img).mean(0) * centred
            self.of_text = p.read(train.txt).flatten(0, 1).mean(0) * centred
        if turn is not None:
            self.turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(turn)))[0]

    def _at(self, x: Tensor, level: float) -> Tensor:
        x = F.normalize(x, dim=-1)
        return torch.cat([x, torch.full_like(x[..., :1], level / (1 - level**2) ** 0.5)], -1)

    @torch.no_grad()
    def __call__(self, data: Vectors) -> Vectors:
        def see(x: Tensor) -> Tensor:
            return self._at(self.p.see(x) - self.of_image, self.level)

        def read(x: Tensor) -> Tensor:
            return self._at((self.p.read(x) - self.of_text) @ self.turn.T, -self.level)

        img, txt, places, words = see(data.img), read(data.txt), see(data.places), read(data.words)
        return Vectors(img, txt, places, words, data.mask, data.y, data.ids, read(data.names))


def moves(seed: int) -> dict[str, dict]:
    return {
        "as trained": dict(centred=False),
        **{f"level {level}": dict(level=level) for level in LEVELS},
        "turned": dict(turn=100 + seed),
    }


def moved_rows(splits: list[tuple[Vectors, Vectors]], kind: str) -> tuple[list[dict], dict]:
    "One head on frozen projections that were moved; the rate is tuned for each move."
    rows, kept, rates = [], {}, {}
    for seed in SEEDS:
        aligned = [learn(train, "none", 1.0, 3e-3, seed)[0] for train, _ in splits]
        for name, how in moves(seed).items():
            movers = [Moved(p, train, **how) for p, (train, _) in zip(aligned, splits)]
            moved = [(move(train), move(test)) for move, (train, test) in zip(movers, splits)]
            found = averaged([measure(Given(), test) for _, test in moved])
            if name not in rates:
                rates[name] = [best_rate(train, kind, 0, Given()) for train, _ in moved]
            parts = []
            for (train, test), lr in zip(moved, rates[name]):
                parts.append(scores_of(*learn(train, kind, 0, lr, seed, Given()), test))
            scores, y = torch.cat(parts).numpy(), labels(splits)
            kept.setdefault(name, []).append(scores)
            rows.append(dict(head=kind, move=name, seed=seed, mAP=mean_average_precision(scores, y), **found))
            print(kind, name, seed, {k: round(rows[-1][k], 3) for k in ("mAP", "gap", "t2i@1")}, flush=True)
    return rows, {k: np.stack(v) for k, v in kept.items()}


def differences(kept: dict, pairs: list[tuple], y: np.ndarray) -> list[dict]:
    "mAP of the first minus mAP of the second of each pair, 95 % over pictures."
    out = []
    for what, a, b in pairs:
        value, low, high = paired_bootstrap(kept[a], kept[b], y)
        out.append(what | dict(difference=value, ci95=[low, high]))
        print(out[-1], flush=True)
    return out


def weighed(splits: list[tuple[Vectors, Vectors]], kind: str) -> dict[str, list]:
    "The first intervention, and what each weight changes against none."
    rows, kept = weight_rows(splits, kind)
    against = [(dict(head=kind, weight=w, reference=0), w, 0) for w in WEIGHTS[1:]]
    return dict(weights=rows, weight_gains=differences(kept, against, labels(splits)))


def moved(splits: list[tuple[Vectors, Vectors]], kind: str) -> dict[str, list]:
    "The second and the third, and what each move changes."
    rows, kept = moved_rows(splits, kind)
    named = [("level 0", "as trained"), (f"level {LEVELS[-1]}", "level 0"), ("turned", "level 0")]
    against = [(dict(head=kind, move=a, reference=b), a, b) for a, b in named]
    return dict(moves=rows, move_gains=differences(kept, against, labels(splits)))


def labels(splits: list[tuple[Vectors, Vectors]]) -> np.ndarray:
    return torch.cat([test.y for _, test in splits]).numpy()


def toy() -> list[tuple[Vectors, Vectors]]:
    root = toy_coco()
    encoders = make_image_encoder("tiny").freeze(), make_text_encoder("tiny").freeze()
    sets = [vectors(cache_tokens(CocoPairs(root, s), *encoders, progress=False)) for s in ("train2017", "val2017")]
    return [prepare(*sets)]


def real(root: str) -> list[tuple[Vectors, Vectors]]:
    data = CocoPairs(root, "val2017")
    encoders = make_image_encoder("efficientnet_lite0").freeze(), make_text_encoder("minilm").freeze()
    every = vectors(cache_tokens(data, *encoders, progress=False))
    fold_of = json.loads((Path(root) / "folds.json").read_text())
    folds = torch.tensor([fold_of[str(i)] for i in every.ids.tolist()])
    return [prepare(every.take(folds != f), every.take(folds == f)) for f in folds.unique()]


ABOUT = dict(
    toy="toy COCO of seed 0, tiny encoders: 1000 pictures to learn from, 500 to judge",
    real="427 labelled pictures of COCO val2017, efficientnet_lite0 and minilm, five folds",
)


def main(which: str, *asked: str):
    torch.set_num_threads(1)
    name, parts = "toy" if which == "toy" else "real", dict(weights=weighed, moves=moved)
    splits = toy() if name == "toy" else real(which)
    kinds, wanted = ([a for a in every if a in asked] or every for every in (KINDS, list(parts)))
    for kind, part in ((k, p) for k in kinds for p in wanted):
        start, found = time.perf_counter(), parts[part](splits, kind)
        content = json.loads(OUT.read_text()) if OUT.exists() else {}
        old = content.get(name, {})
        for key, rows in found.items():
            rest = [r for r in old.get(key, []) if r["head"] != kind]
            found[key] = sorted(rest + rows, key=lambda r: KINDS.index(r["head"]))
        settings = dict(width=WIDTH, steps=STEPS, batch=BATCH, rates=RATES, test=len(labels(splits)))
        minutes = old.get("minutes", {}) | {f"{kind} {part}": round((time.perf_counter() - start) / 60, 1)}
        content[name] = old | found | settings | provenance(data=ABOUT[name], seeds=SEEDS, minutes=minutes)
        with atomic(OUT) as path:
            path.write_text(json.dumps(content, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
