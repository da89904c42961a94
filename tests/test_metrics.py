"""metrics: equal to scikit-learn and torchmetrics on random and on adversarial input; the bootstrap; errors."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from torchmetrics.functional.classification import (binary_average_precision, binary_calibration_error,
                                                    multilabel_average_precision, multilabel_f1_score)
from torchmetrics.functional.retrieval import retrieval_hit_rate

from mmfuse import metrics
from mmfuse.files import MmfuseError
from mmfuse.metrics import (Accumulator, MetricError, average_precision, bootstrap, cf1_of1, choose_threshold, ece,
                            mean_average_precision, micro_average_precision, paired_bootstrap, per_class_ap, recall_at_k,
                            reliability)

RNG = np.random.default_rng(0)


def made(n=200, c=6, seed=0, rare=0.1):
    "Labels, and the scores of a middling model."
    rng = np.random.default_rng(seed)
    y = rng.random((n, c)) < rare
    y[rng.integers(0, n, c), np.arange(c)] = True
    return (rng.standard_normal((n, c)) + y).astype(np.float32), y.astype(np.float32)


# few levels, so that ties are everywhere; infinities and neighbours in floating point too
LEVELS = [-np.inf, -1e300, -1.0, -0.0, 0.0, 5e-324, 1.0, np.nextafter(1.0, 2), 3.0, np.inf]
columns = st.integers(1, 40).flatmap(lambda n: st.tuples(
    hnp.arrays(np.float64, n, elements=st.sampled_from(LEVELS)), hnp.arrays(bool, n), hnp.arrays(np.int64, n, elements=st.integers(0, 3))))


@settings(deadline=None, max_examples=200)
@given(columns)
def test_ap_is_scikit_learns(column):
    scores, y, weight = column
    finite = np.nan_to_num(scores, posinf=2e300, neginf=-2e300) # scikit-learn refuses infinities
    if not y.any():
        assert np.isnan(average_precision(scores, y))
        return
    assert average_precision(scores, y) == pytest.approx(average_precision_score(y, finite), abs=1e-12)
    if (weight * y).sum():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = average_precision_score(y, finite, sample_weight=weight)
        assert average_precision(scores, y, weight) == pytest.approx(theirs, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(columns, st.integers(0, 5))
def test_the_fast_weighted_ap_is_the_slow_one(column, seed):
    scores, y, _ = column
    if not y.any():
        return
    weights = np.random.default_rng(seed).integers(0, 3, (len(y), 4)).astype(np.float32)
    fast = metrics._Ranking(scores, y).ap(weights)
    slow = [average_precision(scores, y, w) for w in weights.T]
    np.testing.assert_allclose(fast, slow, rtol=2e-6)


@settings(deadline=None, max_examples=50)
@given(columns, st.randoms())
def test_ap_sees_only_the_order(column, random):
    scores, y, weight = column
    if not y.any():
        return
    ap, order = average_precision(scores, y), random.sample(range(len(y)), len(y))
    assert average_precision(scores[order], y[order]) == pytest.approx(ap, abs=1e-12)
    levels = np.unique(scores)
    assert average_precision(np.searchsorted(levels, scores), y) == pytest.approx(ap, abs=1e-12)
    repeated = average_precision(np.repeat(scores, weight), np.repeat(y, weight)) if weight.any() else np.nan
    assert repeated == pytest.approx(average_precision(scores, y, weight), abs=1e-12, nan_ok=True)


# probabilities on a coarse grid, with the ends, bin edges, the smallest number above 0 and the largest below 1
PROBS = [0.0, 5e-324, 0.1, 1 / 15, 0.2, 0.5, np.nextafter(0.5, 1), 0.9, np.nextafter(1.0, 0), 1.0]
tables = st.tuples(st.integers(1, 25), st.integers(1, 5)).flatmap(lambda shape: st.tuples(
    hnp.arrays(np.float64, shape, elements=st.sampled_from(PROBS)), hnp.arrays(bool, shape)))


@settings(deadline=None, max_examples=100)
@given(tables)
def test_ap_of_tied_probabilities_is_torchmetrics_too(table):
    scores, y = table
    if not y.any():
        return
    of_class = [float(binary_average_precision(torch.tensor(s), torch.tensor(t).long())) if t.any() else np.nan
                for s, t in zip(scores.T, y.T)]
    np.testing.assert_allclose(per_class_ap(scores, y), of_class, atol=1e-6)
    assert mean_average_precision(scores, y) == pytest.approx(np.nanmean(of_class), abs=1e-6)
    seen = y.any(0)
    assert mean_average_precision(scores, y) == pytest.approx(average_precision_score(y[:, seen], scores[:, seen]), abs=1e-12)
    assert micro_average_precision(scores, y) == pytest.approx(average_precision_score(y.ravel(), scores.ravel()), abs=1e-12)
    whole = float(multilabel_average_precision(torch.tensor(scores), torch.tensor(y).long(), y.shape[1], average="micro")) if y.shape[1] > 1 else None
    assert whole is None or micro_average_precision(scores, y) == pytest.approx(whole, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(tables, st.sampled_from(PROBS))
def test_f1s_are_scikit_learns_and_torchmetrics(table, threshold):
    scores, y = table
    if not y.any():
        return
    seen, chosen = y.any(0), scores >= threshold
    cp = precision_score(y[:, seen], chosen[:, seen], average=None, zero_division=0).mean() if seen.sum() > 1 else None
    cf1, of1 = cf1_of1(scores, y, threshold)
    assert of1 == pytest.approx(f1_score(y.ravel(), chosen.ravel(), zero_division=0), abs=1e-12)
    if y.shape[1] > 1:
        theirs = multilabel_f1_score(torch.tensor(chosen).float(), torch.tensor(y).long(), y.shape[1], average="micro")
        assert of1 == pytest.approx(float(theirs), abs=1e-6)
    if cp is not None:
        cr = recall_score(y[:, seen], chosen[:, seen], average=None).mean()
        assert cf1 == pytest.approx(2 * cp * cr / (cp + cr) if cp + cr else 0, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(tables, st.sampled_from([1, 4, 10, 15]))
def test_ece_at_edges_of_bins(table, bins):
    "A loop over the definition: bins closed below, the last one closed above too."
    probs, y = table[0].ravel(), table[1].ravel()
    edges, expected = np.arange(bins + 1) / bins, 0.0
    for k in range(bins):
        inside = (probs >= edges[k]) & ((probs < edges[k + 1]) if k < bins - 1 else (probs <= 1))
        if inside.any():
            expected += inside.mean() * abs(probs[inside].mean() - y[inside].mean())
    assert ece(probs, y, bins=bins) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_recall_at_k_is_torchmetrics_hit_rate(seed, per_picture):
    rng = np.random.default_rng(seed)
    ids, captions = np.arange(12), np.repeat(np.arange(12), per_picture)
    sim = rng.standard_normal((12, len(captions)))
    for similarity, query, gallery in ((sim, ids, captions), (sim.T, captions, ids)):
        for k, value in recall_at_k(similarity, query, gallery, ks=(1, 5, 10)).items():
            theirs = [float(retrieval_hit_rate(torch.tensor(row), torch.tensor(gallery == q), top_k=min(k, len(gallery)))) for row, q in zip(similarity, query)]
            assert value == pytest.approx(np.mean(theirs))


def test_map_is_torchmetrics_and_scikit_learns():
    scores, y = made(500, 20, rare=0.05)
    theirs = multilabel_average_precision(torch.tensor(scores), torch.tensor(y).long(), 20, average=None)
    np.testing.assert_allclose(per_class_ap(scores, y), theirs, atol=1e-6)
    assert mean_average_precision(scores, y) == pytest.approx(average_precision_score(y, scores), abs=1e-12)
    assert micro_average_precision(scores, y) == pytest.approx(average_precision_score(y, scores, average="micro"), abs=1e-12)


def test_a_class_without_positives_is_left_out():
    scores, y = made()
    y[:, 2] = 0
    assert np.isnan(per_class_ap(scores, y)[2])
    keep = [c for c in range(6) if c != 2]
    assert mean_average_precision(scores, y) == mean_average_precision(scores[:, keep], y[:, keep])


@pytest.mark.parametrize("convert", [np.float16, np.float64, lambda a: torch.tensor(a), lambda a: torch.tensor(a).half(),
                                     lambda a: torch.tensor(a, requires_grad=True), lambda a: torch.tensor(a).bfloat16(),
                                     lambda a: (a * 100).astype(int), lambda a: (a * 10 + 100).astype(np.uint8), lambda a: a > 0, list])
def test_scores_of_any_type(convert):
    scores, y = made()
    scores = convert(scores)
    plain = metrics._numpy(scores).astype(np.float64)
    for labels in (y, y.astype(bool), torch.tensor(y).long(), y.tolist()):
        assert mean_average_precision(scores, labels) == mean_average_precision(plain, y)


def published_f1s(chosen, y):
    "CP, CR, CF1 and so on as in the COCO papers' tables, by loops."
    n_class = y.shape[1]
    correct, predicted, true = np.zeros(n_class), np.zeros(n_class), np.zeros(n_class)
    for row, truth in zip(chosen, y):
        for c in range(n_class):
            correct[c] += row[c] and truth[c]
            predicted[c] += row[c]
            true[c] += truth[c]
    op, or_ = correct.sum() / predicted.sum(), correct.sum() / true.sum()
    cp = np.mean([k / p if p else 0 for k, p in zip(correct, predicted)])
    cr = np.mean(correct / true)
    return 2 * cp * cr / (cp + cr), 2 * op * or_ / (op + or_)


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.5, 2.8])
def test_cf1_of1(threshold):
    scores, y = made(300, 8)
    assert cf1_of1(scores, y, threshold) == pytest.approx(published_f1s(scores >= threshold, y), abs=1e-12)
    assert cf1_of1(scores, y, threshold)[1] == pytest.approx(f1_score(y, scores >= threshold, average="micro"), abs=1e-12)


def test_f1_when_nothing_is_predicted_or_right():
    scores, y = made()
    assert cf1_of1(scores, y, threshold=100) == (0, 0)
    assert cf1_of1(1 - y, y) == (0, 0)
    assert cf1_of1(y, y) == (1, 1)
    y[:, 0] = 0
    perfect = cf1_of1(y, y)
    assert perfect == (1, 1), "a class without positives does not lower CF1"


def test_a_threshold_for_each_class():
    scores, y = made()
    each = np.linspace(-1, 1, 6)
    assert cf1_of1(scores, y, each) == pytest.approx(published_f1s(scores >= each, y))
    with pytest.raises(MetricError, match="threshold"):
        cf1_of1(scores, y, each[:5])


@settings(deadline=None, max_examples=100)
@given(columns)
def test_no_threshold_is_better_than_the_chosen_one(column):
    scores, y, _ = column
    if not y.any():
        return
    of1 = lambda t: cf1_of1(scores[:, None], y[:, None], t)[1]
    best = max(of1(t) for t in scores)
    assert of1(choose_threshold(scores[:, None], y[:, None])) == pytest.approx(best)
    assert of1(choose_threshold(scores[:, None], y[:, None], per_class=True)) == pytest.approx(best)


def test_recall_at_k_with_five_captions():
    ids, captions = np.arange(40), np.repeat(np.arange(40), 5)
    sim = RNG.standard_normal((40, 200)) + 2 * (ids[:, None] == captions)
    to_text, to_image = recall_at_k(sim, ids, captions), recall_at_k(sim.T, captions, ids)
    for k in (1, 5, 10):
        nearest = np.argsort(-sim, 1)[:, :k]
        assert to_text[k] == pytest.approx(np.mean([(captions[n] == i).any() for i, n in zip(ids, nearest)]))
        nearest = np.argsort(-sim.T, 1)[:, :k]
        assert to_image[k] == pytest.approx(np.mean([(ids[n] == i).any() for i, n in zip(captions, nearest)]))
    assert recall_at_k(sim, ids, captions, ks=(500,)) == {500: 1.0}


def test_equal_similarities_are_a_fair_draw():
    ids, captions = np.arange(10), np.repeat(np.arange(10), 5)
    collapsed = recall_at_k(np.ones((10, 50)), ids, captions)
    assert collapsed[1] == pytest.approx(0.1)
    sim = RNG.integers(0, 3, (10, 50)).astype(float)
    shuffled = []
    for _ in range(2000):
        order = RNG.permutation(50)
        nearest = order[np.argsort(-sim[:, order], 1, kind="stable")[:, :5]]
        shuffled.append(np.mean([(captions[n] == i).any() for i, n in zip(ids, nearest)]))
    assert recall_at_k(sim, ids, captions)[5] == pytest.approx(np.mean(shuffled), abs=0.01)


@pytest.mark.parametrize("bins", [5, 15])
def test_ece_is_torchmetrics(bins):
    probs = RNG.random((300, 4))
    y = RNG.random((300, 4)) < probs ** 2
    theirs = binary_calibration_error(torch.tensor(probs).ravel(), torch.tensor(y).ravel().long(), n_bins=bins)
    assert ece(probs, y, bins=bins) == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_keeps_everything():
    probs, y = RNG.random((300, 4)) ** 4, RNG.random((300, 4)) < 0.2
    for equal_mass in (False, True):
        promised, came, share = reliability(probs, y, equal_mass=equal_mass)
        assert share.sum() == pytest.approx(1)
        assert (share * promised).sum() == pytest.approx(probs.mean())
        assert (share * came).sum() == pytest.approx(y.mean())
    assert share == pytest.approx(np.full(10, 0.1))
    assert len(reliability(np.zeros((5, 2)), np.zeros((5, 2)))[0]) == 1


def slow_paired_bootstrap(a, b, y, n, seed):
    "The same resamples, one scikit-learn call for each class of each."
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(n):
        rows = rng.integers(0, len(y), len(y))
        present = np.flatnonzero(y[rows].any(0))
        ap = [np.mean([average_precision_score(y[rows, c], s[rows, c]) for c in present]) for s in (a, b)]
        drawn.append(ap[0] - ap[1])
    return np.quantile(drawn, [0.025, 0.975])


def test_paired_bootstrap_is_the_slow_one():
    a, y = made(60, 5, rare=0.03)
    b = np.round(made(60, 5, seed=1)[0] + 1.5 * y)
    value, low, high = paired_bootstrap(a, b, y, n=150, seed=3)
    assert value == pytest.approx(mean_average_precision(a, y) - mean_average_precision(b, y))
    assert (low, high) == pytest.approx(tuple(slow_paired_bootstrap(a, b, y, 150, 3)), abs=1e-6)


def test_bootstrap_properties():
    a, y = made()
    b = made(seed=1)[0]
    forth, back = paired_bootstrap(a, b, y, n=200), paired_bootstrap(b, a, y, n=200)
    assert forth == pytest.approx((-back[0], -back[2], -back[1]))
    assert paired_bootstrap(a, a, y, n=50) == (0, 0, 0)
    assert paired_bootstrap(a, b, y, n=200) == forth, "the same seed, the same numbers"
    assert paired_bootstrap(a, b, y, n=200, seed=1) != forth
    assert paired_bootstrap(2 * a + 1, b, y, n=200) == pytest.approx(forth)
    narrow = paired_bootstrap(a, b, y, n=200, level=0.5)
    assert forth[1] < narrow[1] < narrow[2] < forth[2]
    value, low, high = bootstrap(a, y, n=200)
    assert low < value < high and value == mean_average_precision(a, y)


def test_seeds_are_averaged_within_a_resample():
    runs = [made(seed=s)[0] for s in range(3)]
    y = made()[1]
    b = made(seed=9)[0]
    value, low, high = paired_bootstrap(runs, b, y, n=100)
    assert value == pytest.approx(np.mean([mean_average_precision(r, y) for r in runs]) - mean_average_precision(b, y))
    assert paired_bootstrap(np.stack(runs), b, y, n=100) == (value, low, high)
    assert paired_bootstrap([torch.tensor(r) for r in runs], torch.tensor(b), torch.tensor(y), n=100) == (value, low, high)
    same = paired_bootstrap([runs[0]] * 4, [b] * 2, y, n=100)
    assert same == pytest.approx(paired_bootstrap(runs[0], b, y, n=100))


def test_classes_that_vanish_leave_both_models():
    "A class with one positive is absent from a third of the resamples; it must not count as a failure of either model."
    scores, y = made(50, 3)
    y[:, 0] = 0
    y[7, 0] = 1
    assert bootstrap(y, y, n=200) == (1, 1, 1)
    assert paired_bootstrap(y, 2 * y, y, n=200) == (0, 0, 0)


def test_one_positive_in_all():
    y = np.zeros((5, 2))
    y[0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap(y, y, n=100) == (1, 1, 1), "resamples without any positive are left out"


def test_accumulating_in_any_order_gives_the_same():
    scores, y = made()
    ids = RNG.permutation(1000)[:200]
    whole = Accumulator().update(scores, y, ids)
    parts = [Accumulator() for _ in range(3)]
    for k, rows in enumerate(np.array_split(RNG.permutation(200), 9)):
        parts[k % 3].update(torch.tensor(scores[rows]), torch.tensor(y[rows]), torch.tensor(ids[rows]))
    parts[0].update(scores[:10], y[:10], ids[:10]) # a sampler that pads repeats pictures
    merged = Accumulator().merge(parts[2], Accumulator()).merge(parts[0], parts[1])
    assert len(merged) == 200
    for ours, theirs in zip(merged.stack(), whole.stack()):
        np.testing.assert_array_equal(ours, theirs)
    assert mean_average_precision(*merged.stack()[:2]) == mean_average_precision(scores, y)


def test_accumulator_refuses_confusion():
    scores, y = made()
    with pytest.raises(MetricError, match="twice, with different labels"):
        Accumulator().update(scores, y, np.zeros(200, int))
    with pytest.raises(MetricError, match="no scores"):
        Accumulator().stack()
    with pytest.raises(MetricError, match="image ids"):
        Accumulator().update(scores, y, [1, 2])


PROCESS = """
import sys
import numpy as np
import torch
from mmfuse.metrics import Accumulator, gather, mean_average_precision
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
scores, y = np.load(f"{folder}/scores.npy"), np.load(f"{folder}/y.npy")
rows = list(torch.utils.data.DistributedSampler(range(len(y)), 2, rank, shuffle=False))
together = gather(Accumulator().update(scores[rows], y[rows], rows))
print(len(rows), len(together), mean_average_precision(*together.stack()[:2]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    scores, y = made(41) # odd: the sampler pads with a picture that it repeats
    np.save(tmp_path / "scores.npy", scores)
    np.save(tmp_path / "y.npy", y)
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for rank in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert said == [["21", "41", str(mean_average_precision(scores, y))]] * 2


WRONG = {
    "scores are (3, 2) and labels (3, 3)": lambda: mean_average_precision(np.zeros((3, 2)), np.zeros((3, 3))),
    "both must be (N, C)": lambda: mean_average_precision(np.zeros(3), np.zeros(3)),
    "both must be (N,)": lambda: average_precision(np.zeros((3, 2)), np.zeros((3, 2))),
    "not empty": lambda: mean_average_precision(np.zeros((0, 2)), np.zeros((0, 2))),
    "hold NaN, first in row 1": lambda: mean_average_precision([[0, 0], [0, np.nan]], [[0, 1], [1, 0]]),
    "labels must be 0 or 1; row 0": lambda: mean_average_precision([[0, 0]], [[0, -1]]),
    "none of the 2 classes has a positive": lambda: mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2))),
    "micro AP is undefined": lambda: micro_average_precision(np.zeros((3, 2)), np.zeros((3, 2))),
    "F1 is undefined": lambda: cf1_of1(np.zeros((3, 2)), np.zeros((3, 2))),
    "no threshold": lambda: choose_threshold(np.zeros((3, 2)), np.zeros((3, 2))),
    "nothing to resample": lambda: bootstrap(np.zeros((3, 2)), np.zeros((3, 2))),
    "expected (N, C), or (S, N, C)": lambda: bootstrap(np.zeros(3), np.zeros(3)),
    "apply a sigmoid": lambda: ece([-1.0, 2.0], [0, 1]),
    "finite and at least 0": lambda: average_precision([0.0, 1], [0, 1], [1.0, -1]),
    "for 2 queries and 3 gallery items": lambda: recall_at_k(np.zeros((2, 2)), [1, 2], [1, 2, 3]),
    "picture 9 has no right item": lambda: recall_at_k(np.zeros((1, 2)), [9], [1, 2]),
    "similarity holds NaN": lambda: recall_at_k([[np.nan]], [1], [1]),
    "scores must be numbers": lambda: mean_average_precision([["a"]], [[1]]),
}


@pytest.mark.parametrize("says", WRONG)
def test_errors_are_one_line(says):
    with pytest.raises(MetricError) as error:
        WRONG[says]()
    assert says in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, MmfuseError) and isinstance(error.value, ValueError)
