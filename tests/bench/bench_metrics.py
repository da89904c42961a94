"""The bootstrap: how fast, how often right, how wide. Writes nbs/results/bench_metrics.json and metrics_intervals.json.

    python tests/bench/bench_metrics.py speed        2 minutes: 40,137 x 80 scores, two models, against a scikit-learn loop
    python tests/bench/bench_metrics.py intervals    20 minutes on one core: coverage by simulation; width against pictures
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from mmfuse import metrics
from mmfuse.files import provenance
from mmfuse.metrics import mean_average_precision, paired_bootstrap

RESULTS = Path(__file__).resolve().parents[2] / "nbs" / "results"
SHARES = np.concatenate([[0.55], np.geomspace(0.11, 0.002, 79)]) # of the pictures, for 80 classes: as uneven as COCO's


def pretend(n, strengths, seed):
    "Labels of `n` pictures, and the scores of models that see them through partly shared noise."
    rng = np.random.default_rng(seed)
    y = rng.random((n, len(SHARES))) < SHARES
    y[rng.integers(0, n, len(SHARES)), np.arange(len(SHARES))] = True # no class without a positive
    shared = 0.8 * rng.standard_normal(y.shape)
    return y, *[(k * y + shared + 0.6 * rng.standard_normal(y.shape)).astype(np.float32) for k in strengths]


def speed(n=40_137, resamples=1000, sklearn_resamples=3):
    "Seconds for two models, and for the same with scikit-learn: a few resamples timed, their values compared."
    y, a, b = pretend(n, (2.0, 1.97), seed=0)
    start = time.perf_counter()
    result = paired_bootstrap(a, b, y, n=resamples)
    ours = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rng, theirs = np.random.default_rng(0), []
    start = time.perf_counter()
    for _ in range(sklearn_resamples):
        rows = rng.integers(0, n, n)
        theirs.append([average_precision_score(y[rows], s[rows]) for s in (a, b)])
    loop = (time.perf_counter() - start) / sklearn_resamples * resamples
    same = metrics._resampled_map([a[None], b[None]], y, sklearn_resamples, 0).T
    assert np.allclose(theirs, same, atol=1e-6), "the two do not compute the same"
    return dict(pictures=n, classes=80, models=2, resamples=resamples, seconds=round(ours, 1), sklearn_seconds=round(loop),
                times_faster=round(loop / ours), peak_gb=round(peak, 1), result=[round(float(v), 4) for v in result])


def intervals(y, a, b, resamples, rng):
    "All the intervals that chapter 09 compares: {name: (low, high)}."
    drawn = metrics._resampled_map([a[None], b[None]], y, resamples, int(rng.integers(2**31)))
    apart = metrics._resampled_map([b[None]], y, resamples, int(rng.integers(2**31)))[0]
    value = mean_average_precision(a, y)
    return {"mAP, percentiles": metrics._interval(drawn[0]), "mAP, centred": metrics._interval(drawn[0], centre=value),
            "difference, paired": metrics._interval(drawn[0] - drawn[1]), "difference, not paired": metrics._interval(drawn[0] - apart)}


def coverage(n, sets, strengths, resamples=200):
    "How often each interval holds what such test sets show on average, over simulated test sets of `n` pictures."
    found, values = [], []
    for k in range(sets):
        y, a, b = pretend(n, strengths, seed=10_000 + k)
        values.append((mean_average_precision(a, y), mean_average_precision(b, y)))
        found.append(intervals(y, a, b, resamples, np.random.default_rng(k)))
    mean, truth = np.mean(values, axis=0), {}
    for name in found[0]:
        target = mean[0] if name.startswith("mAP") else mean[0] - mean[1]
        ends = np.array([f[name] for f in found])
        truth[name] = dict(covered=round(float(np.mean((ends[:, 0] <= target) & (target <= ends[:, 1]))), 3),
                           width=round(float(np.mean(ends[:, 1] - ends[:, 0])), 4))
    return dict(pictures=n, sets=sets, resamples=resamples, mAP=round(float(mean[0]), 4),
                difference=round(float(mean[0] - mean[1]), 4), intervals=truth)


def widths(sizes=(400, 1265, 4000, 12_650, 40_000), strengths=(2.0, 1.97), draws=3):
    "The interval for a true difference of about .01, at growing numbers of pictures, a few test sets of each size."
    rows = []
    for n in sizes:
        for k in range(draws if n < 10_000 else 1):
            y, a, b = pretend(n, strengths, seed=k)
            d, low, high = paired_bootstrap(a, b, y, n=1000 if n < 40_000 else 400)
            rows.append(dict(pictures=n, difference=round(d, 4), low=round(low, 4), high=round(high, 4)))
            print(rows[-1], flush=True)
    return rows


def write(name, **parts):
    "A results file, with where its numbers come from."
    start = parts.pop("start")
    where = provenance(data="simulated, 80 classes as uneven as COCO's", minutes=round((time.perf_counter() - start) / 60, 1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps({**parts, "provenance": where}, indent=1) + "\n")
    print(json.dumps(parts, indent=1))


if __name__ == "__main__":
    start = time.perf_counter()
    if sys.argv[1:] == ["speed"]:
        write("bench_metrics.json", start=start, speed=speed())
    elif sys.argv[1:] == ["intervals"]:
        covers = [coverage(n, sets, (2.0, other)) for n, sets in ((100, 400), (400, 400), (2000, 100)) for other in (1.97, 1.7)]
        write("metrics_intervals.json", start=start, coverage=covers, widths=widths())
    else:
        sys.exit(__doc__)
