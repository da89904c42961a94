"""COCO's own files in numbers: labels, licences, what captions name, and what a split by caption would have claimed.

    python tests/bench/bench_coco.py COCO_ROOT      writes nbs/results/coco_anatomy.json; half a minute on one core

COCO_ROOT holds val2017 (`mmfuse download --subset mini`). Only numbers are written, no picture and no caption.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import interpolate

from mmfuse.data import CocoPairs, mentions
from mmfuse.files import atomic, provenance
from mmfuse.metrics import mean_average_precision

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "coco_anatomy.json"


def content(root: Path) -> dict:
    "Counts from `instances_val2017.json` as it is, before anything is left out."
    notes = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    name_of = {row["id"]: row["name"] for row in notes["licenses"]}
    licences = Counter(name_of[row["license"]] for row in notes["images"])
    return dict(pictures=len(notes["images"]), objects=len(notes["annotations"]),
                crowds=sum(a["iscrowd"] for a in notes["annotations"]), licences=dict(licences.most_common()))


def named(ds: CocoPairs, exact: bool) -> tuple[Tensor, Tensor]:
    "What five captions name, and five times what is there: two bool tensors (N, 5, C)."
    said = torch.stack([torch.stack([mentions(c, ds.classes, exact=exact) for c in five[:5]]) for five in ds.captions])
    return said, ds.labels.bool()[:, None].expand_as(said)


def mention_rates(ds: CocoPairs) -> dict:
    "For each category: of its labels, the share that one caption names, and any of the five; and over all labels."
    found = {}
    for name, exact in (("exact", True), ("synonyms", False)):
        said, there = named(ds, exact)
        one, five, labels = (said & there).sum((0, 1)), (said.any(1) & there[:, 0]).sum(0), there[:, 0].sum(0)
        found[name] = dict(
            one=[round(v, 4) for v in (one / (5 * labels)).tolist()], five=[round(v, 4) for v in (five / labels).tolist()],
            all=dict(one=round((one.sum() / (5 * labels.sum())).item(), 4), five=round((five.sum() / labels.sum()).item(), 4),
                     absent=round(((said & ~there).sum() / (~there).sum()).item(), 5)))
    return found


def leak(ds: CocoPairs, seed: int) -> dict:
    "mAP of two models on a fifth of the rows (picture, caption), drawn by caption and by picture."
    rng, n = np.random.default_rng(seed), len(ds)
    rows = np.repeat(np.arange(n), 5)
    test = dict(caption=rng.permutation(5 * n) < n, picture=(rng.permutation(n) < n // 5)[rows])
    thumbs = torch.stack([interpolate(ds[i].image[None].float(), (12, 16), mode="area").flatten() for i in range(n)])
    words = CountVectorizer(binary=True).fit_transform([c for five in ds.captions for c in five[:5]])
    y, found = ds.labels.numpy()[rows], {}
    for split, held in test.items():
        nearest = torch.cdist(thumbs[rows[held]], thumbs[rows[~held]]).argmin(1).numpy()
        fitted = Ridge(alpha=3.0).fit(words[~held], y[~held])
        found[split] = dict(thumbnail=mean_average_precision(y[~held][nearest], y[held]),
                            words=mean_average_precision(fitted.predict(words[held]), y[held]))
    return found


if __name__ == "__main__":
    start, root = time.perf_counter(), Path(sys.argv[1])
    ds = CocoPairs(root, "val2017")
    runs = [leak(ds, seed) for seed in range(5)]
    mean = {s: {m: round(float(np.mean([r[s][m] for r in runs])), 4) for m in runs[0][s]} for s in runs[0]}
    result = dict(**content(root), labelled=len(ds), classes=ds.classes, labels=ds.labels.sum(0).int().tolist(),
                  labels_a_picture=round(ds.labels.sum(1).mean().item(), 2),
                  words_a_caption=round(float(np.mean([len(c.split()) for five in ds.captions for c in five])), 2),
                  together=[" ".join(map(str, row)) for row in (ds.labels.T @ ds.labels).int().tolist()],
                  mentioned=mention_rates(ds), leak=mean)
    result["provenance"] = provenance(data="430 pictures of val2017, the subset mini", seeds=5,
                                      minutes=round((time.perf_counter() - start) / 60, 1))
    with atomic(OUT) as p:
        p.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("classes", "labels", "together", "mentioned")}, indent=1))
    print({k: v["all"] for k, v in result["mentioned"].items()})
