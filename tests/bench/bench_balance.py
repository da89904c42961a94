"""Gradient modulation and blending on real pictures: does balancing two modalities make their sum better?

    python tests/bench/bench_balance.py        writes nbs/results/modality_balance.json; two minutes on one core

427 pictures of $MMFUSE_COCO, out of fold over folds.json; frozen EfficientNet-Lite0 and MiniLM, one caption at test time. The rate of
each way is chosen on an inner quarter of its training pictures, from the same four; three seeds; gains over one loss are paired
bootstraps over pictures of scores averaged over seeds.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmfuse.balance import TwoBranches, blend_weights, judge, train_branches
from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.image_encoder import make_image_encoder
from mmfuse.metrics import mean_average_precision, paired_bootstrap
from mmfuse.text_encoder import make_text_encoder, masked_mean
from mmfuse.token_cache import cache_tokens

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "nbs" / "results" / "modality_balance.json"
REAL = Path(os.environ.get("MMFUSE_COCO", ROOT.parent / "shared" / "coco"))
RATES, SEEDS, EPOCHS = (1e-3, 3e-3, 1e-2, 3e-2), 3, 20
WAYS = {"one loss": {}, "OGM": dict(alpha=0.3), "OGM-GE": dict(alpha=0.3, noise=True), "blending": dict(blend=None), "equal weights": dict(blend=torch.full((3,), 1 / 3)),
        "each alone, added": None}


def new(tokens, seed):
    torch.manual_seed(seed)
    return TwoBranches(tokens.img.shape[-1], tokens.txt.shape[-1], len(tokens.classes))


def trial(inner, held, lr):
    "Gradient blending's weights."
    points = []
    for k, only in enumerate(("image", "text", None)):
        model = new(inner, 0)
        before = [judge(model, t)["losses"][k] for t in (inner, held)]
        train_branches(model, inner, held, epochs=EPOCHS, only=only, lr=lr)
        points.append([*before, *(judge(model, t)["losses"][k] for t in (inner, held))])
    a, b, c, d = torch.tensor(points).T
    return blend_weights(a, c, b, d)


def run(way, train, val, lr, seed, weights):
    "Logits of image, text and both."
    if way == "each alone, added":
        parts = {m: train_branches(new(train, seed), train, val, epochs=EPOCHS, only=m, lr=lr, seed=seed)[0][-1]["logits"][m] for m in ("image", "text")}
        return parts | {"both": parts["image"] + parts["text"]}
    more = dict(blend=weights) if way == "blending" else WAYS[way]
    return train_branches(new(train, seed), train, val, epochs=EPOCHS, lr=lr, seed=seed, **more)[0][-1]["logits"]


def main():
    torch.set_num_threads(1)
    if not (REAL / "annotations").is_dir(): sys.exit(f"no real COCO pictures at {REAL}: set MMFUSE_COCO")
    start, data = time.perf_counter(), CocoPairs(REAL, "val2017")
    tokens = cache_tokens(data, make_image_encoder("efficientnet_lite0"), make_text_encoder("minilm"), progress=False)
    words = masked_mean(torch.tensor(tokens.txt.astype("f4")), torch.tensor(np.array(tokens.mask))).unsqueeze(2).numpy()  # (N, K, 1, Dt)
    tokens = replace(tokens, img=tokens.img.astype("f4").mean(1, keepdims=True), txt=words, mask=tokens.mask.any(-1, keepdims=True))  # all that the branches see
    folds = json.loads((REAL / "folds.json").read_text())
    fold, scores, chosen, blends = np.array([folds[str(i)] for i in data.image_ids]), {}, {w: [] for w in WAYS}, []
    for f in np.unique(fold):
        train, val = tokens.subset(fold != f), tokens.subset(fold == f)
        cut = 3 * len(train) // 4
        inner, held = train.subset(slice(0, cut)), train.subset(slice(cut, None))
        weights = {lr: trial(inner, held, lr) for lr in RATES}
        for way in WAYS:
            quality = [mean_average_precision(run(way, inner, held, lr, 0, weights[lr])["both"], held.labels) for lr in RATES]
            lr = RATES[int(np.argmax(quality))]
            chosen[way].append(lr)
            if way == "blending": blends.append([round(float(w), 3) for w in weights[lr]])
            for seed in range(SEEDS):
                for k, logits in run(way, train, val, lr, seed, weights[lr]).items():
                    scores.setdefault((way, k, seed), torch.zeros(len(tokens), len(tokens.classes)))[torch.tensor(fold == f)] = logits
        print("fold", f, chosen, flush=True)
    y, ways = torch.tensor(np.array(tokens.labels)), {}
    mean = lambda way, k: torch.stack([scores[way, k, s].sigmoid() for s in range(SEEDS)]).mean(0)
    for way in WAYS:
        ways[way] = dict(mAP={k: round(float(np.mean([mean_average_precision(scores[way, k, s], y) for s in range(SEEDS)])), 4) for k in ("both", "image", "text")},
                         seeds=[round(mean_average_precision(scores[way, "both", s], y), 4) for s in range(SEEDS)], rates=chosen[way])
        if way != "one loss": ways[way]["gain"] = [round(float(x), 4) for x in paired_bootstrap(mean(way, "both"), mean("one loss", "both"), y, n=1000)]
    content = dict(ways=ways, blend_weights=blends, epochs=EPOCHS,
                   provenance=provenance(data="427 real COCO pictures, out of fold", seeds=SEEDS, minutes=round((time.perf_counter() - start) / 60, 1)))
    with atomic(OUT) as path: path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
