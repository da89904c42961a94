"""Each instrument on heads whose answer is known, and on every head of the course."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmfuse.diagnostics import (attention_maps, emap, gradient_share, modality_shapley, pair_grid, permutation_score,
                                robustness_curve, token_shapley)
from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS, make_head
from mmfuse.token_cache import Tokens
from mmfuse.verdict import collect, diagnose, report, text_report

N, P, T, DI, DT, C = 6, 4, 5, 12, 8, 3


class Table(nn.Module):
    "A head that looks its logits up: f (V, W, C); a missing modality is the mean over its values."

    def __init__(self, f):
        super().__init__()
        self.f = nn.Parameter(f)

    def forward(self, img, txt, mask=None):
        if img is None:
            return self.f.mean(0)[txt[:, 0, 0].long()]
        if txt is None:
            return self.f.mean(1)[img[:, 0, 0].long()]
        return self.f[img[:, 0, 0].long(), txt[:, 0, 0].long()]


def numbered(n):
    return torch.arange(float(n)).view(n, 1, 1), torch.arange(float(n)).view(n, 1, 1), torch.ones(n, 1, dtype=torch.bool)


def tokens(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)
    return torch.randn(n, P, DI, generator=g), torch.randn(n, T, DT, generator=g), mask


def awake(name):
    "A head away from its initialization, where nothing is zero any more."
    torch.manual_seed(0)
    head = make_head(name, DI, DT, C, width=16, names=torch.randn(C, DT))
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head.eval()


@given(st.integers(2, 6), st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_the_grid_is_the_two_way_analysis_of_variance(n, seed, at_once):
    f = torch.randn(n, n, 2, generator=torch.Generator().manual_seed(seed))
    grid = pair_grid(Table(f), *numbered(n), at_once=at_once)
    f = f.double().numpy()
    row, col, mean = f.mean(1), f.mean(0), f.mean((0, 1))
    rest = f - row[:, None] - col[None] + mean
    np.testing.assert_allclose(grid.emap, row + col - mean, atol=1e-5)
    np.testing.assert_allclose(grid.both, f[range(n), range(n)], atol=1e-6)
    parts = np.stack([row.var(0), col.var(0), (rest**2).mean((0, 1))])
    np.testing.assert_allclose(np.stack([s.numpy() for s in grid.shares().values()]), parts / f.var((0, 1)), atol=1e-4)


ADDITIVE = ["image", "text", "late", "joint", "named", "image_named", "text_named"]


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_sum_of_opinions_is_its_own_additive_part(name):
    head, x = awake(name), tokens()
    with torch.no_grad():
        torch.testing.assert_close(emap(head, *x), head(*x), rtol=1e-4, atol=1e-4)
    shares = pair_grid(head, *x).shares()
    assert shares["interaction"].max() < 1e-5
    if name in ("image", "text"):
        assert shares[name].min() > 1 - 1e-5


@pytest.mark.parametrize("name", sorted(set(HEADS) - set(ADDITIVE)))
def test_heads_that_can_relate_do(name):
    shares = pair_grid(awake(name), *tokens()).shares()
    assert shares["interaction"].max() > 1e-4
    torch.testing.assert_close(sum(shares.values()), torch.ones(C, dtype=torch.float64))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_gets_a_report_and_keeps_its_mode(name):
    img, txt, mask = tokens(12)
    y = (torch.arange(12)[:, None] % torch.tensor([2, 3, 4]) == 0).float()
    toks = Tokens(img.numpy(), txt.numpy()[:, None], mask.numpy()[:, None], y.numpy(), np.arange(12), np.zeros((C, DT), "f4"), list("abc"))
    head = awake(name).train()
    r = report([collect(head, toks, permutations=2)], resamples=20)
    assert head.training and json.loads(json.dumps(r)) == r
    assert r["shapley"]["image"] + r["shapley"]["text"] == pytest.approx(r["mAP"] - y.double().mean().item())
    assert 0 <= r["gradient"] <= 1 and r["pictures"] == 12
    if name in ("image", "text"):
        other = {"image": "text", "text": "image"}[name]
        assert r["permuted"][other]["drop"] == 0 and r["shapley"][other] == pytest.approx(0, abs=1e-9)


def test_two_folds_are_judged_together():
    f = torch.randn(8, 8, 2)
    img, txt, mask = numbered(8)
    y = (torch.rand(8, 2, generator=torch.Generator().manual_seed(1)) > .5).float()
    y[0], y[-1] = 1, 1
    toks = Tokens(img.numpy(), txt.numpy()[:, None], mask.numpy()[:, None], y.numpy(), np.arange(8), np.zeros((2, 1), "f4"), ["a", "b"])
    halves = [collect(Table(f), toks.subset(slice(s, s + 4)), permutations=2) for s in (0, 4)]
    r = report(halves, resamples=20)
    assert r["pictures"] == 8 and r["mAP"] == pytest.approx(report([collect(Table(f), toks, permutations=2)], resamples=20)["mAP"])


def test_a_head_that_says_nothing_gets_a_report_that_json_can_hold():
    img, txt, mask = numbered(6)
    y = (torch.arange(6)[:, None] % torch.tensor([2, 3]) == 0).float()
    toks = Tokens(img.numpy(), txt.numpy()[:, None], mask.numpy()[:, None], y.numpy(), np.arange(6), np.zeros((2, 1), "f4"), ["a", "b"])
    r = report([collect(Table(torch.ones(6, 6, 2)), toks, permutations=2)], resamples=20)
    assert json.loads(json.dumps(r, allow_nan=False)) == r and r["verdict"].startswith("It reads neither")


XOR = torch.tensor([[0., 1], [1, 0]]).unsqueeze(-1)


def test_xor_is_all_interaction():
    v, t = torch.tensor([0., 0, 1, 1]).view(4, 1, 1), torch.tensor([0., 1, 0, 1]).view(4, 1, 1)
    mask, y = torch.ones(4, 1, dtype=torch.bool), torch.tensor([[0.], [1], [1], [0]])
    grid = pair_grid(Table(XOR), v, t, mask)
    assert grid.shares()["interaction"].item() == pytest.approx(1)
    assert modality_shapley(grid, y) == pytest.approx(dict(neither=.5, image_alone=.5, text_alone=.5, both=1., image=.25, text=.25, synergy=.5))


def test_the_same_told_twice_is_negative_synergy():
    v = torch.tensor([0., 0, 1, 1]).view(4, 1, 1)  # the caption says what the picture shows
    grid = pair_grid(Table(torch.tensor([[0., 1], [1, 2]]).unsqueeze(-1)), v, v, torch.ones(4, 1, dtype=torch.bool))
    earned = modality_shapley(grid, v[:, 0])
    assert earned["synergy"] == pytest.approx(-.5) and earned["image"] == pytest.approx(earned["text"])


def test_a_constant_logit_has_no_shares():
    assert all(s.isnan().all() or (s == 0).all() for s in pair_grid(Table(torch.zeros(3, 3, 1)), *numbered(3)).shares().values())


def test_permutations_are_seeded_and_the_score_itself_is_not_permuted():
    x, y = tokens(40), (tokens(40)[1][:, 0, :C] > 0).float()
    head = awake("text")
    a, b = (permutation_score(head, *x, y, modality="text", n=4, seed=1) for _ in range(2))
    with torch.no_grad():
        own = head(*x)
    from sklearn.metrics import average_precision_score
    assert a == b and a.score == pytest.approx(average_precision_score(y, own, average="macro"), abs=1e-6)
    assert permutation_score(head, *x, y, modality="text", n=1).std != permutation_score(head, *x, y, modality="text", n=1).std  # nan


class Linear(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, img, txt, mask):
        return (img @ self.a).sum(1, keepdim=True) + (txt @ self.b * mask).sum(1, keepdim=True)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_token_shapley_of_a_linear_head_is_known(seed):
    img, txt, mask = tokens(1, seed)
    head, background = Linear(torch.randn(DI), torch.randn(DT)), torch.randn(DI)
    places, words = token_shapley(head, img[0], txt[0], mask[0], 0, background=background, n=2, seed=seed)
    torch.testing.assert_close(places, (img[0] - background) @ head.a, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(words, txt[0] @ head.b * mask[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_token_shapley_adds_up(name):
    head, (img, txt, mask), background = awake(name), tokens(1, seed=3), torch.zeros(DI)
    with torch.no_grad():
        full = head(img, txt, mask)[0, 1]
        empty = head(torch.zeros(1, P, DI), txt, torch.zeros_like(mask))[0, 1]
    places, words = token_shapley(head, img[0], txt[0], mask[0], 1, background=background, n=3)
    torch.testing.assert_close(places.sum() + words.sum(), full - empty, rtol=1e-3, atol=1e-3)
    assert (words[~mask[0]] == 0).all()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_curves_end_where_everything_is_hit(modality):
    x, head = tokens(30), awake("concat")
    y = (torch.arange(30)[:, None] % torch.tensor([2, 3, 4]) == 0).float()
    first, *_, last = robustness_curve(head, *x, y, modality=modality)
    from mmfuse.metrics import mean_average_precision as m
    with torch.no_grad():
        assert first == pytest.approx(m(head(*x), y))
        assert last == pytest.approx(m(head(x[0], None, None) if modality == "text" else head(None, *x[1:]), y))
    untouched = robustness_curve(awake("image" if modality == "text" else "text"), *x, y, modality=modality, how="contradicting")
    assert untouched == pytest.approx([untouched[0]] * 5)


def test_the_gradient_is_pulled_where_the_weight_is():
    img, txt, mask = tokens(50)
    y = torch.zeros(50, 1)
    class Sum(nn.Module):
        def forward(self, v, t, m):
            return (3 * v[..., :1] / img[..., 0].std()).mean(1) + (t[..., :1] * m.unsqueeze(-1) / txt[mask][:, 0].std()).sum(1) / m.sum(1, keepdim=True)
    assert gradient_share(Sum(), img, txt, mask, y) == pytest.approx(.25, abs=.01)
    assert gradient_share(awake("image"), img, txt, mask, torch.zeros(50, C)) == 0


@pytest.mark.parametrize("name", ["article", "cross_attention", "bottleneck", "label_query"])
def test_attention_maps_change_nothing_and_leave_nothing(name):
    head, x = awake(name), tokens()
    with torch.no_grad():
        before = head(*x)
        maps = attention_maps(head, *x)
        torch.testing.assert_close(head(*x), before)
    for w in maps.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())


def test_what_cannot_be_asked():
    head, x, y = awake("concat"), tokens(), torch.ones(N, C)
    with pytest.raises(MmfuseError, match="no attention"):
        attention_maps(head, *x)
    with pytest.raises(MmfuseError, match="as many of each"):
        emap(head, x[0][:2], *x[1:])
    with pytest.raises(MmfuseError, match="'image' or 'text'"):
        permutation_score(head, *x, y, modality="sound")
    with pytest.raises(MmfuseError, match="'missing' or 'contradicting'"):
        robustness_curve(head, *x, y, modality="text", how="wrong")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["joint", "concat", "label_query"])
def test_on_a_gpu_it_reads_the_same(name):
    head, x, y = awake(name), tokens(12), (torch.arange(12)[:, None] % torch.tensor([2, 3, 4]) == 0).float()
    def readings(device):
        head.to(device)
        img, txt, mask = (a.to(device) for a in x)
        places, words = token_shapley(head, img[0], txt[0], mask[0], 0, background=img.mean((0, 1)), n=2)
        curve = robustness_curve(head, img, txt, mask, y.to(device), modality="text", how="contradicting")
        return [*(m.cpu() for m in vars(pair_grid(head, img, txt, mask)).values()), places.cpu(), words.cpu(), torch.tensor(curve)]
    for a, b in zip(readings("cpu"), readings("cuda")):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def command(*args):
    return subprocess.run([sys.executable, "-c", "from mmfuse.cli import main; main()", "diagnose", *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A toy COCO of a few pictures, a run of `mmfuse train` on it, and a cache."
    from mmfuse.runs import train
    from mmfuse.settings import Settings
    from mmfuse.toy import toy_coco
    folder = tmp_path_factory.mktemp("diagnose")
    root = toy_coco(folder / "toy", n_train=60, n_val=30)
    train(Settings(data=str(root), arm="concat", epochs=2, width=16), folder / "run", cache_dir=folder / "cache", progress=False)
    return folder


def test_the_command_judges_a_run(small):
    done = command("--run", small / "run", "--cache-dir", small / "cache", "--n", 20, "--out", small / "verdict.json")
    assert done.returncode == 0, done.stderr
    kept = json.loads((small / "verdict.json").read_text())
    assert list(kept["arms"]) == ["concat"] and kept["arms"]["concat"]["pictures"] == 20 and "torch" in kept
    assert kept["arms"]["concat"]["verdict"] in done.stdout and (small / "verdict.png").stat().st_size > 5000


def test_arms_are_trained_and_judged_out_of_fold(small):
    from mmfuse.data import CocoPairs
    ids = CocoPairs(small / "toy", "train2017").image_ids
    (small / "folds.json").write_text(json.dumps({str(i): k % 2 for k, i in enumerate(ids)}))
    r = diagnose(small / "toy", folds=small / "folds.json", arms=["image"], cache_dir=small / "cache", progress=False)
    assert r["image"]["pictures"] == len(ids) and r["image"]["permuted"]["text"]["drop"] == 0
    assert "Not fusion" in text_report(r) or "neither" in text_report(r)


@pytest.mark.parametrize("judge", [{}, dict(folds="f.json", test_split="val2017")])
def test_it_must_be_said_what_judges(judge):
    with pytest.raises(MmfuseError, match="either a test split .* or folds"):
        diagnose("anywhere", arms=["image"], progress=False, **judge)


@pytest.mark.parametrize("args, says", [
    (["--run", "nowhere"], "no run in 'nowhere'"),
    (["--run", ".", "--data", "."], "--run knows its own data"),
    (["--run", "."], "no run in '.'"),
    (["--arms", "joit"], "no arm is called 'joit'"),
    (["--data", "."], "COCO's layout"),
    (["--n", "1"], "--n"),
])
def test_a_wrong_call_is_one_line(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    done = command(*args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and says in done.stderr
