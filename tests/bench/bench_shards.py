"""What a picture costs in shards, as their number grows: to write, to index, to open and to read in an epoch's order.

    python tests/bench/bench_shards.py      writes nbs/results/shards.json; three minutes on one core, 1 GB of disk for a while

The pairs are generated: pictures of the toy COCO over and over, each time under another id. Processor time of this process, so
that a busy machine does not count; `write` is wall time, most of which is the disk's.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.shards import ShardPairs, make_shards
from mmfuse.toy import toy_coco

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "shards.json"
PAIRS = (1_000, 10_000, 100_000)
READ = 2_000  # pictures of an epoch, spread over it in the order of the epoch


class Repeated:
    "A dataset of n pairs from a small one."
    def __init__(self, small, n):
        self.small, self.n, self.classes, self.category_ids = small, n, small.classes, small.category_ids
        self.image_ids = range(1, n + 1)
        self.captions, self.labels = ([small.captions[i % len(small)] for i in range(n)], small.labels[torch.arange(n) % len(small)])

    def __len__(self): return self.n
    def path(self, i): return self.small.path(i % len(self.small))


def timed(run, clock=time.process_time):
    start = clock()
    out = run()
    return out, clock() - start


def one(small, n, folder):
    "Microseconds a picture."
    data, place = Repeated(small, n), Path(folder) / str(n) / "train2017"
    _, write = timed(lambda: make_shards(data, place, part=(1, 1), progress=False), time.perf_counter)
    _, index = timed(lambda: make_shards(data, place, progress=False))
    shards, opened = timed(lambda: ShardPairs(place.parent, "train2017"))
    order, ordered = timed(lambda: shards.order(np.random.default_rng(0)))
    rows = np.concatenate([order[s:s + READ // 10] for s in np.linspace(0, n - READ // 10, 10).astype(int)])
    read = min(timed(lambda: [shards[int(i)] for i in rows])[1] for _ in range(3)) / len(rows)
    return {"write (with the disk)": write / n, "check and index": index / n, "open": opened / n, "order of an epoch": ordered / n, "read and decode": read}


def main():
    torch.set_num_threads(1)
    start, small = time.perf_counter(), CocoPairs(toy_coco(), "train2017")
    with tempfile.TemporaryDirectory() as folder:
        rows = [one(small, n, folder) for n in PAIRS]
    content = dict(pairs=PAIRS, microseconds_a_picture={k: [round(1e6 * r[k], 3) for r in rows] for k in rows[0]},
                   provenance=provenance(data="toy COCO's pictures, repeated", seed=0, minutes=round((time.perf_counter() - start) / 60, 1)))
    print(json.dumps(content, indent=1))
    with atomic(OUT) as path: path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
