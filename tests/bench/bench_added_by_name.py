"""A class that no label was given for: each of the toy COCO's 24 is left out once and then asked for by its name.

    python tests/bench/bench_added_by_name.py            writes nbs/results/added_by_name.json; about four minutes on one core
    python tests/bench/bench_added_by_name.py quick      one seed: about a minute

Three groups of eight classes. A head of label queries is trained on the labels of the other sixteen, three seeds, and
asked for the eight; average precision on validation pictures, first captions. Beside it: chance (the share of pictures
with the class), the caption's similarity with the name, untrained, and the same head trained with all labels.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.fusion import make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.metrics import paired_bootstrap, per_class_ap
from mmfuse.text_encoder import make_text_encoder
from mmfuse.token_cache import cache_tokens
from mmfuse.token_fusion import NameHead
from mmfuse.toy import toy_coco
from mmfuse.training import fit, take

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "added_by_name.json"
GROUPS, SEEDS, SETTING = 3, 3, dict(epochs=20, lr=3e-3)


def load():
    encoders = make_image_encoder("tiny"), make_text_encoder("tiny")
    root = toy_coco()
    sets = [CocoPairs(root, s) for s in ("train2017", "val2017")]
    return [cache_tokens(s, *encoders, progress=False) for s in sets]


def first_captions(tokens):
    rows = torch.arange(len(tokens))
    return take(tokens, rows, torch.zeros_like(rows))[:3]


def without(tokens, classes):
    "The same pictures without the labels of some classes."
    keep = [c for c in range(len(tokens.classes)) if c not in classes]
    names = [tokens.classes[c] for c in keep]
    return replace(tokens, labels=tokens.labels[:, keep], names=tokens.names[keep], classes=names)


def trained(tokens, seed, **kwargs):
    torch.manual_seed(seed)
    sizes = tokens.img.shape[-1], tokens.txt.shape[-1], len(tokens.classes)
    head = make_head(
        "label_query", *sizes, width=64, names=torch.tensor(tokens.names), **kwargs
    )
    fit(head, tokens, seed=seed, **SETTING)
    return head


@torch.no_grad()
def left_out(train, val, residual, seed):
    "Scores (2, N, C) of classes that the head had no labels for: with the caption, and with the picture alone."
    args, scores = first_captions(val), np.zeros((2, len(val), len(val.classes)), np.float32)
    for g in range(GROUPS):
        group = list(range(g, len(val.classes), GROUPS))
        with torch.enable_grad():
            head = trained(without(train, group), seed, residual=residual)
        names = torch.tensor(train.names[group])
        scores[0][:, group] = head.answer(*args, names)
        scores[1][:, group] = head.answer(args[0], None, None, names)
        print(residual, seed, g, per_class_ap(scores[0], val.labels)[group].round(2), flush=True)
    return scores


@torch.no_grad()
def name_similarity(train, val):
    head = NameHead(train.img.shape[-1], train.txt.shape[-1], len(train.classes),
                    names=torch.tensor(train.names)).eval()  # fmt: skip
    head.set_statistics(*first_captions(train))
    return head(*first_captions(val)).numpy()


if __name__ == "__main__":
    if "quick" in sys.argv:
        SEEDS = 1
    torch.set_num_threads(1)
    start = time.perf_counter()
    train, val = load()
    y, found = val.labels, {"name similarity": name_similarity(train, val)[None]}
    for label, residual in (("queries", None), ("queries + name similarity", "names")):
        both = np.stack([left_out(train, val, residual, seed) for seed in range(SEEDS)])
        found[label], found[f"{label}, no caption"] = both[:, 0], both[:, 1]
    heads = [trained(train, seed, residual="names") for seed in range(SEEDS)]
    with torch.no_grad():
        found["trained with its labels"] = np.stack([h(*first_captions(val)).numpy() for h in heads])
    gains = {a: paired_bootstrap(s, found["name similarity"], y) for a, s in found.items() if a != "name similarity"}
    result = dict(
        classes=val.classes, groups=GROUPS, seeds=SEEDS, setting=SETTING | dict(width=64),
        chance=y.mean(0).round(4).tolist(),
        ap={a: np.mean([per_class_ap(each, y) for each in s], 0).round(4).tolist() for a, s in found.items()},
        gain_over_name_similarity={a: [round(x, 4) for x in g] for a, g in gains.items()},
    )  # fmt: skip
    minutes = round((time.perf_counter() - start) / 60, 1)
    result["provenance"] = provenance(data="toy COCO, train2017 and val2017", threads=1, minutes=minutes)
    with atomic(OUT) as p:
        p.write_text(json.dumps(result, indent=1) + "\n")
    print(OUT.name, "written")
