"""What each fusion head costs, and the token heads against the same operators from PyTorch's layers.

    python tests/bench/bench_heads.py            writes nbs/results/heads_cost.json; Linux, about three minutes on one core
    python tests/bench/bench_heads.py quick      each thing once: about a minute
    python tests/bench/bench_heads.py ratios     the second part alone, again

Milliseconds are processor time on one thread (a busy machine changes them little); a training step is forward and
backward. Peak memory is the process's own high-water mark above where it stood before the call.
"""

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmfuse.files import atomic, provenance
from mmfuse.fusion import HEADS, make_head

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torch_heads import DecoderBlock, MhaBlock, PlainBottleneck, with_torch

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "heads_cost.json"
BASE = dict(batch=16, places=49, words=16, width=256, d_image=1280, d_text=384, classes=80)
AXES = dict(batch=[1, 4, 16, 64], places=[49, 100, 196, 400], width=[64, 128, 256, 512])


def inputs(at: dict) -> tuple:
    "Tokens, and a mask under which captions have 8 to 16 words."
    b, t = at["batch"], at["words"]
    mask = torch.arange(t) < torch.randint(t // 2, t + 1, (b, 1))
    return torch.randn(b, at["places"], at["d_image"]), torch.randn(b, t, at["d_text"]), mask


def head_of(name: str, at: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    names = torch.randn(at["classes"], at["d_text"])
    sizes = at["d_image"], at["d_text"], at["classes"]
    return make_head(name, *sizes, width=at["width"], names=names)


def step(head, args):
    "Forward and backward in training."
    head.train().zero_grad()
    head(*args).sum().backward()


@torch.no_grad()
def answer(head, args):
    "Forward in evaluation."
    head.eval()(*args)


def milliseconds(run, *args) -> float:
    start = time.process_time()
    run(*args)
    return 1e3 * (time.process_time() - start)


def megabytes(run, *args) -> float:
    "Peak above where memory stood; what was freed goes back first, so that taking it again counts."
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run(*args)
    return max(0, memory("VmHWM") - before) / 1e6


def memory(field: str) -> int:
    "VmRSS or VmHWM of this process in bytes."
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def flops(head, args) -> int:
    "Floating-point operations of all matrix products of a forward pass (with gradients: no path that hides them)."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        head.eval()(*args)
    return counter.get_total_flops()


def cost(name: str, repeats: int, **changed) -> dict:
    "One head at one size."
    at = BASE | changed
    head, args = head_of(name, at), inputs(at)
    step(head, args)
    times = {run.__name__: [milliseconds(run, head, args) for _ in range(repeats)] for run in (step, answer)}
    return dict(
        params=sum(p.numel() for p in head.parameters()),
        flops=flops(head, args),
        **{f"{k}_ms": round(statistics.median(v), 3) for k, v in times.items()},
        step_mb=round(statistics.median(megabytes(step, head, args) for _ in range(repeats)), 2),
    )


def costs(repeats: int) -> dict:
    "Every head along every axis: {head: {axis: [cost at each size]}}."
    found = {}
    for name in HEADS:
        found[name] = {a: [cost(name, repeats, **{a: v}) for v in values] for a, values in AXES.items()}
        print(name, found[name]["batch"][2], flush=True)
    return found


def rivals(name: str, head) -> dict:
    "The same operator, written with PyTorch's layers."
    found = {"nn.MultiheadAttention": with_torch(head, MhaBlock)}
    if name == "bottleneck":
        return found | {"nn.TransformerEncoderLayer": PlainBottleneck(head)}
    return found | {"nn.TransformerDecoderLayer": with_torch(head, DecoderBlock)}


def ratios(repeats: int) -> dict:
    "How many times ours goes through while theirs goes once; interleaved, the median."
    found = {}
    for name in ("cross_attention", "bottleneck", "label_query"):
        ours, args = head_of(name, BASE), inputs(BASE)
        for rival, theirs in rivals(name, ours).items():
            for run in (step, answer):
                pairs = [
                    (milliseconds(run, ours, args), milliseconds(run, theirs, args))
                    for _ in range(repeats)
                ]
                ratio = statistics.median(b / a for a, b in pairs)
                found.setdefault(name, {}).setdefault(rival, {})[run.__name__] = round(ratio, 3)
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is read from /proc: run this on Linux")
    torch.set_num_threads(1)
    start, quick = time.perf_counter(), "quick" in sys.argv
    if "ratios" in sys.argv:
        result = json.loads(OUT.read_text()) | dict(throughput=ratios(9))
    else:
        result = dict(base=BASE, axes=AXES, throughput=ratios(7 if quick else 15))
        result["heads"] = costs(1 if quick else 3)
    minutes = round((time.perf_counter() - start) / 60, 1)
    result["provenance"] = provenance(threads=1, seed=0, minutes=minutes)
    with atomic(OUT) as p:
        p.write_text(json.dumps(result, indent=1) + "\n")
    print(OUT.name, "written")
