"""What attention costs: time and peak memory against the number of tokens, by hand and fused.

    python tests/bench/bench_attention.py        writes nbs/results/attention_cost.json; Linux, about two minutes on one core

One sample, width 256 in four heads, float32, forward and backward. Peak memory is the process's own high-water mark above
where it stood before the call, so a fused kernel that never makes the (Q, K) matrix shows.
"""

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from mmfuse.attention import attend, attention_weights
from mmfuse.files import atomic, provenance

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "attention_cost.json"
WIDTH, HEADS, WORDS = 256, 4, 15
SIZES = [49, 128, 256, 512, 1024, 2048, 4096]
ARMS = {
    "by hand": lambda q, k: attention_weights(q, k) @ k,
    "fused": lambda q, k: attend(q, k, k),
    "fused, 15 words read": lambda q, k: attend(q[:, :, :WORDS], k, k),
}


def memory(field: str) -> int:
    "VmRSS or VmHWM of this process in bytes."
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


def once(run, n: int) -> tuple[float, int]:
    "Seconds and bytes of one forward and backward pass over n tokens."
    q, k = (torch.randn(1, HEADS, n, WIDTH // HEADS, requires_grad=True) for _ in range(2))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that taking it again counts
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the high-water mark falls to where memory stands now
    before, start = memory("VmRSS"), time.perf_counter()
    run(q, k).sum().backward()
    return time.perf_counter() - start, max(0, memory("VmHWM") - before)


def measure(repeats: int = 7) -> dict:
    "Every arm at every size: the median time and the largest memory."
    rows = {}
    for arm, run in ARMS.items():
        once(run, 64)
        found = [[once(run, n) for _ in range(repeats if n < 2048 else 3)] for n in SIZES]
        rows[arm] = dict(
            milliseconds=[round(1e3 * statistics.median(s for s, _ in f), 3) for f in found],
            megabytes=[round(max(m for _, m in f) / 1e6, 2) for f in found],
        )
        print(arm, rows[arm], flush=True)
    return rows


if __name__ == "__main__":
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is read from /proc: run this on Linux")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = dict(
        tokens=SIZES,
        width=WIDTH,
        heads=HEADS,
        words=WORDS,
        passes="forward and backward",
        arms=measure(),
    )
    result["provenance"] = provenance(
        threads=1, seed=0, minutes=round((time.perf_counter() - start) / 60, 1)
    )
    with atomic(OUT) as p:
        p.write_text(json.dumps(result, indent=1) + "\n")
    print(OUT.name, "written")
