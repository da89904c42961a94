"""Every head on the six questions of `mmfuse.fusion.draw_rungs`.

    python tests/bench/bench_ladder.py            writes nbs/results/ladder.json; about four minutes on one core
    python tests/bench/bench_ladder.py quick      one rate, one seed: about a minute

Two rates to choose from, on samples of their own; then three seeds, judged on other samples. Width 32, no dropout:
samples are as many as one likes, and the question is what a head can do. Seconds are processor time on one thread.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mmfuse.files import atomic, provenance
from mmfuse.fusion import HEADS, RUNGS, SIDE, WIDE, draw_rungs, make_head, rung_accuracy
from mmfuse.token_cache import Tokens
from mmfuse.training import fit, predict

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "ladder.json"
TRAIN, CHOOSE, JUDGE, EPOCHS, RATES, SEEDS = 4000, 1000, 2000, 25, (3e-3, 1e-2), 3
MORE = {
    name: dict(dropout=0.0) if hasattr(head, "widths") else {} for name, head in HEADS.items()
} | {"label_query, no linear start": dict(dropout=0.0, residual=None)}


def tokens(n, seed):
    img, txt, y = (x.numpy() for x in draw_rungs(n, seed))
    names = np.zeros((len(RUNGS), WIDE), np.float32)
    mask = np.ones((n, 1, SIDE), bool)
    return Tokens(img, txt[:, None], mask, y, np.arange(n), names, list(RUNGS))


def train(name, data, lr, seed):
    torch.manual_seed(seed)
    head = make_head(name.split(",")[0], WIDE, WIDE, len(RUNGS), width=32, **MORE[name])
    fit(head, data, epochs=EPOCHS, lr=lr, weight_decay=0.01, seed=seed)
    return head


def accuracy(head, data):
    return rung_accuracy(predict(head, data).sigmoid(), torch.tensor(data.labels))


def climb(name, data, choose, judge):
    start, heads = time.process_time(), [train(name, data, lr, 0) for lr in RATES]
    seconds = round((time.process_time() - start) / len(RATES), 2)
    best = int(np.argmax([accuracy(h, choose).mean().item() for h in heads]))
    lr, more = RATES[best], range(1, SEEDS)
    each = [accuracy(h, judge) for h in [heads[best], *(train(name, data, RATES[best], s) for s in more)]]
    mean = torch.stack(each).mean(0)
    print(name, lr, mean.numpy().round(3), seconds, flush=True)
    rounded = [[round(x, 4) for x in row] for row in [mean.tolist(), *(e.tolist() for e in each)]]
    return dict(accuracy=rounded[0], by_seed=rounded[1:], lr=lr, seconds=seconds)


if __name__ == "__main__":
    if "quick" in sys.argv:
        RATES, SEEDS = (5e-3,), 1
    torch.set_num_threads(1)
    start, data = time.perf_counter(), (tokens(TRAIN, 0), tokens(CHOOSE, 2), tokens(JUDGE, 1))
    result = dict(
        rungs=RUNGS, pictures=dict(train=TRAIN, choose=CHOOSE, judge=JUDGE), epochs=EPOCHS,
        rates=RATES, heads={name: climb(name, *data) for name in MORE},
    )  # fmt: skip
    minutes = round((time.perf_counter() - start) / 60, 1)
    result["provenance"] = provenance(data="drawn", threads=1, seeds=SEEDS, minutes=minutes)
    with atomic(OUT) as p:
        p.write_text(json.dumps(result, indent=1) + "\n")
    print(OUT.name, "written")
