"""Staged unfreezing: encoders frozen, all at once, all at once with a small rate, and the head alone first.

    python tests/bench/bench_unfreezing.py        writes nbs/results/unfreezing.json; eight minutes on one core

The toy COCO, tiny encoders, the joint head, `mmfuse.runs.train_end_to_end`; 300 pictures to train on, 250 to judge on, the same
number of epochs and the same seeds for each arm. Differences to "frozen" are paired over test pictures, seeds averaged.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmfuse.data import CocoPairs
from mmfuse.feeds import PictureFeed
from mmfuse.files import atomic, provenance
from mmfuse.metrics import mean_average_precision, paired_bootstrap
from mmfuse.runs import load_head, train_end_to_end
from mmfuse.settings import Settings
from mmfuse.toy import toy_coco
from mmfuse.trainer import make_accelerator

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "unfreezing.json"
EPOCHS, SEEDS = 3, 2
ARMS = {"frozen": dict(head_epochs=EPOCHS), "all at once, full rate": dict(head_epochs=0, encoder_lr=1.0),
        "all at once, a tenth": dict(head_epochs=0, encoder_lr=0.1), "head alone for an epoch, then a tenth": dict(head_epochs=1, encoder_lr=0.1)}


class First:
    "A dataset's first n pictures."
    def __init__(self, data, n): self.data, self.n, self.labels, self.image_ids, self.classes, self.key = data, n, data.labels[:n], data.image_ids[:n], data.classes, data.key
    def __len__(self): return self.n
    def __getitem__(self, i): return self.data[i]


def main():
    torch.set_num_threads(1)
    root, start, found, scores = toy_coco(), time.perf_counter(), {}, {}
    train, val = First(CocoPairs(root, "train2017"), 300), First(CocoPairs(root, "val2017"), 250)
    for name, more in ARMS.items():
        each, histories = [], []
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as folder:
                s = Settings(end_to_end=True, epochs=EPOCHS, batch_size=32, lr=3e-3, seed=seed, workers=0, **more)
                done = train_end_to_end(s, train, val, Path(folder) / "run", progress=False)
                model = load_head(Path(folder) / "run", "last")
                each.append(PictureFeed(val, model.image, model.text, s, make_accelerator()).logits(model, 0, len(val)))
                histories.append([line["val_map"] for line in done.history])
        scores[name] = each
        found[name] = dict(mAP=[round(mean_average_precision(x, val.labels), 4) for x in each], curves=[[round(m, 4) for m in h] for h in histories])
        print(name, found[name], flush=True)
    for name in list(ARMS)[1:]:
        gains = [paired_bootstrap(a, b, val.labels, n=1000) for a, b in zip(scores[name], scores["frozen"])]
        found[name]["minus_frozen"] = [round(float(x), 4) for x in np.mean(gains, 0)]
    content = dict(epochs=EPOCHS, arms=found, provenance=provenance(data="toy COCO, 300 and 250 pictures", seeds=SEEDS, minutes=round((time.perf_counter() - start) / 60, 1)))
    with atomic(OUT) as path: path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
