"""Attention against PyTorch's own, and the properties that a page should not carry."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from mmfuse.attention import (
    MultiHeadAttention,
    attend,
    attention_weights,
    from_torch,
    merge_heads,
    split_heads,
)
from mmfuse.files import MmfuseError


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_mask(batch, n, seed=0):
    "Random, with at least one real token a row."
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask[:, seed % n] = True
    return mask


def torch_mha(width, heads, d_kv=None, **kw):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(
        width, heads, batch_first=True, kdim=d_kv, vdim=d_kv, dtype=torch.float64, **kw
    )
    for name, p in mha.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    return mha


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 5),
    keys=st.integers(1, 7),
    heads=st.integers(1, 4),
    per_head=st.integers(1, 4),
    d_kv=st.one_of(st.none(), st.integers(1, 9)),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_torch_forward_and_backward(
    batch, queries, keys, heads, per_head, d_kv, masked, seed
):
    width = heads * per_head
    theirs = torch_mha(width, heads, d_kv)
    ours = from_torch(theirs)
    q, kv = draw(batch, queries, width, seed=seed), draw(batch, keys, d_kv or width, seed=seed + 1)
    mask = some_mask(batch, keys, seed) if masked else None
    ends = []
    for run in (
        lambda q, kv: ours(q, kv, mask),
        lambda q, kv: theirs(q, kv, kv, key_padding_mask=None if mask is None else ~mask)[0],
    ):
        leaves = q.clone().requires_grad_(), kv.clone().requires_grad_()
        out = run(*leaves)
        out.square().sum().backward()
        ends.append((out.detach(), *(x.grad for x in leaves)))
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b)
    w = theirs.out_proj.weight.grad
    torch.testing.assert_close(ours.out.weight.grad, w)
    if d_kv is None:
        packed = torch.cat([ours.q.weight.grad, ours.k.weight.grad, ours.v.weight.grad])
        torch.testing.assert_close(packed, theirs.in_proj_weight.grad)


@pytest.mark.parametrize(
    "mask_shape", [None, (5,), (2, 5), (1, 5), (2, 3, 5), (2, 1, 5), (1, 1, 5)]
)
@pytest.mark.parametrize("heads", [0, 4])
def test_fused_equals_by_hand_for_every_mask(mask_shape, heads):
    front = (2, heads) if heads else (2,)
    q, k, v = draw(*front, 3, 8), draw(*front, 5, 8, seed=1), draw(*front, 5, 6, seed=2)
    mask = (
        None
        if mask_shape is None
        else torch.rand(mask_shape, generator=torch.Generator().manual_seed(3)) > 0.6
    )
    torch.testing.assert_close(attend(q, k, v, mask), attention_weights(q, k, mask) @ v)


def test_a_mask_for_all_axes_of_a_plain_matrix():
    q, k = draw(3, 4), draw(5, 4, seed=1)
    causal = torch.ones(3, 5).tril().bool()
    expected = F.scaled_dot_product_attention(q[None], k[None], k[None], attn_mask=causal)[0]
    torch.testing.assert_close(attend(q, k, k, causal), expected)


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 4), (2, 5, 5), (2, 3, 1), (1, 2, 3, 5)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    q, k = draw(2, 3, 4), draw(2, 5, 4)
    for f in (lambda m: attend(q, k, k, m), lambda m: attention_weights(q, k, m)):
        with pytest.raises(MmfuseError, match=f"mask .{shape[0]}, ?.*does not fit|does not fit"):
            f(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.uint8])
def test_a_mask_of_numbers_is_refused(dtype):
    "PyTorch would add a float mask to the scores: ones change nothing, and padding is attended to."
    q = draw(2, 3, 4)
    with pytest.raises(MmfuseError, match="must be bool"):
        attend(q, q, q, torch.ones(2, 3, dtype=dtype))
    with pytest.raises(MmfuseError, match="must be bool"):
        MultiHeadAttention(4, 2).double()(q, q, torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("d_kv", [None, 6])
def test_a_fully_masked_row_is_zero_and_its_gradient_too(need_weights, d_kv):
    mha = from_torch(torch_mha(8, 2, d_kv))
    q, kv = draw(3, 4, 8).requires_grad_(), draw(3, 5, d_kv or 8, seed=1).requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    out = mha(q, kv, mask, need_weights)
    out, weights = out if need_weights else (out, None)
    assert out[1].eq(0).all() and out[0].ne(0).all()
    if need_weights:
        assert weights[1].eq(0).all()
        torch.testing.assert_close(
            weights[[0, 2]].sum(-1), torch.ones(2, 2, 4, dtype=torch.float64)
        )
    out.square().sum().backward()
    for x in (q, kv):
        assert x.grad.isfinite().all() and x.grad[1].eq(0).all() and x.grad[0].ne(0).any()
    assert all(p.grad.isfinite().all() for p in mha.parameters())


def test_all_rows_masked_with_anomaly_detection():
    mha = MultiHeadAttention(8, 2)
    q = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        out = mha(q, torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool))
        out.sum().backward()
    assert out.eq(0).all() and q.grad.eq(0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_lies_in_padding_never_matters(poison, need_weights):
    "Also NaN: a mask that only zeroes weights gives 0 * nan = nan, forward and in every weight's gradient."
    mha, q, kv = from_torch(torch_mha(8, 2)), draw(2, 3, 8), draw(2, 5, 8, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    bad = kv.masked_fill(~mask[..., None], poison)
    grads = []
    for x in (kv, bad):
        mha.zero_grad()
        out = mha(q, x, mask, need_weights)
        out = out[0] if need_weights else out
        out.square().sum().backward()
        grads.append((out.detach(), *(p.grad.clone() for p in mha.parameters())))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(attend(q, bad, bad, mask), attend(q, kv, kv, mask))


@settings(max_examples=30, deadline=None)
@given(extra=st.integers(1, 6), batch=st.integers(1, 4), seed=st.integers(0, 99))
def test_neither_padding_nor_batch_mates_change_a_row(extra, batch, seed):
    mha = from_torch(torch_mha(8, 2))
    q, kv, mask = (
        draw(batch, 3, 8, seed=seed),
        draw(batch, 5, 8, seed=seed + 1),
        some_mask(batch, 5, seed),
    )
    out = mha(q, kv, mask)
    longer = torch.cat([kv, draw(batch, extra, 8, seed=seed + 2) * 100], 1)
    torch.testing.assert_close(mha(q, longer, F.pad(mask, (0, extra))), out)
    alone = torch.cat([mha(q[i : i + 1], kv[i : i + 1], mask[i : i + 1]) for i in range(batch)])
    torch.testing.assert_close(alone, out)


def test_order_of_keys_is_nothing_and_order_of_queries_is_kept():
    mha, q, kv, mask = (
        from_torch(torch_mha(8, 4)),
        draw(2, 6, 8),
        draw(2, 5, 8, seed=1),
        some_mask(2, 5),
    )
    out, keys, queries = mha(q, kv, mask), torch.randperm(5), torch.randperm(6)
    torch.testing.assert_close(mha(q, kv[:, keys], mask[:, keys]), out)
    torch.testing.assert_close(mha(q[:, queries], kv, mask), out[:, queries])


def test_one_key_ignores_the_query_and_two_do_not():
    mha, q = from_torch(torch_mha(8, 2)), draw(1, 4, 8)
    one, two = mha(q, draw(1, 1, 8, seed=1)), mha(q, draw(1, 2, 8, seed=1))
    torch.testing.assert_close(one, one[:, :1].expand_as(one))
    assert (two - two[:, :1])[:, 1:].abs().amax() > 1e-3


def test_a_bias_of_keys_changes_nothing():
    "A shift of all keys adds the same number to all scores of a query."
    mha, q, kv = from_torch(torch_mha(8, 2)), draw(2, 3, 8), draw(2, 5, 8, seed=1)
    before = mha(q, kv)
    before.square().sum().backward()
    assert mha.k.bias.grad.abs().max() < 1e-12
    with torch.no_grad():
        mha.k.bias += 3
    torch.testing.assert_close(mha(q, kv), before)


def test_every_parameter_is_registered_and_learns():
    mha = MultiHeadAttention(12, 3, d_kv=5)
    assert sum(p.numel() for p in mha.parameters()) == 2 * (12 * 12 + 12) + 2 * (5 * 12 + 12)
    assert not list(mha.buffers())
    mha(torch.randn(2, 3, 12), torch.randn(2, 4, 5)).square().sum().backward()
    assert all(p.grad is not None for p in mha.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in mha.named_parameters() if name != "k.bias")


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_drops_in_training_only(need_weights):
    torch.manual_seed(0)
    mha, q, kv = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(2, 3, 8), torch.randn(2, 40, 8)

    def run():
        out = mha(q, kv, None, need_weights)
        return out[0] if need_weights else out

    assert not torch.equal(run(), run())
    mha.eval()
    assert torch.equal(run(), run())
    plain = MultiHeadAttention(8, 2)
    plain.load_state_dict(mha.state_dict())
    torch.testing.assert_close(run(), plain(q, kv))


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 2000, 4), torch.zeros(1, 50, 4), torch.ones(1, 50, 4)
    dropped = attend(q, k, v, dropout=0.5)
    assert dropped.std() > 0.05 and abs(dropped.mean().item() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    q, k = draw(2, 3, 16).to(dtype) * 20, draw(2, 5, 16, seed=1).to(dtype) * 20
    mask = some_mask(2, 5)
    mask[1] = False
    for out in (attend(q, k, k, mask), attention_weights(q, k, mask) @ k):
        assert out.dtype == dtype and out.isfinite().all() and out[1].eq(0).all()


def test_scores_of_any_size_stay_finite():
    q = draw(1, 3, 4) * 1e4
    assert attend(q, q, q).isfinite().all()
    assert attention_weights(q, q, torch.tensor([[True, True, False]])).isfinite().all()


@pytest.mark.parametrize(
    "q, kv, said",
    [
        (
            (4, 8),
            (4, 8),
            r"queries \(B, n, 8\), got \(4, 8\)",
        ),  # the batch would become the sequence
        ((4, 1, 8), (4, 8), r"tokens \(B, n, 8\), got \(4, 8\)"),
        ((4, 1, 8), (4, 2, 7), r"tokens \(B, n, 8\)"),
        ((4, 1, 8), (1, 2, 8), "queries are of 4 samples and tokens of 1"),
        ((2, 2, 1, 8), (2, 3, 8), "queries"),
    ],
)
def test_wrong_shapes_are_refused(q, kv, said):
    with pytest.raises(MmfuseError, match=said) as e:
        MultiHeadAttention(8, 2)(torch.zeros(q), torch.zeros(kv))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("shape", [(2, 3), (3, 5), (1, 5), (2, 3, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(MmfuseError, match="expected a mask"):
        MultiHeadAttention(8, 2)(
            torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), torch.ones(shape, dtype=torch.bool)
        )


@pytest.mark.parametrize("width, heads", [(8, 3), (8, 0), (8, -2)])
def test_heads_must_divide_the_width(width, heads):
    with pytest.raises(MmfuseError, match="do not divide"):
        MultiHeadAttention(width, heads)


@pytest.mark.parametrize(
    "kw",
    [
        dict(batch_first=False),
        dict(batch_first=True, add_zero_attn=True),
        dict(batch_first=True, add_bias_kv=True),
        dict(batch_first=True, kdim=4, vdim=6),
    ],
)
def test_what_cannot_be_copied_is_refused(kw):
    with pytest.raises(MmfuseError):
        from_torch(nn.MultiheadAttention(8, 2, **kw))


def test_a_copy_without_bias():
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).eval()
    ours, q = from_torch(theirs), torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(q, q), theirs(q, q, q)[0])
    assert not ours.training


def test_heads_are_cut_and_joined():
    x = draw(2, 3, 12)
    assert split_heads(x, 4).shape == (2, 4, 3, 3)
    assert torch.equal(merge_heads(split_heads(x, 4)), x)
    assert torch.equal(split_heads(x, 4)[:, 1], x[..., 3:6])


def test_export_with_any_number_of_tokens():
    "A graph for any batch, queries and keys, as chapter 13 needs it."

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = MultiHeadAttention(8, 2)

        def forward(self, q, kv, mask):
            return self.mha(q, kv, mask)

    dim, model = torch.export.Dim, Reader().eval()
    b, n, k = dim("b", min=2), dim("n", min=2), dim("k", min=2)
    graph = torch.export.export(
        model,
        (torch.randn(3, 4, 8), torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)),
        dynamic_shapes={"q": {0: b, 1: n}, "kv": {0: b, 1: k}, "mask": {0: b, 1: k}},
    )
    inputs = torch.randn(5, 2, 8), torch.randn(5, 9, 8), some_mask(5, 9)
    torch.testing.assert_close(graph.module()(*inputs), model(*inputs))


def test_scale_keeps_scores_at_one():
    q, k = draw(1, 200, 64), draw(1, 200, 64, seed=1)
    scores = attention_weights(q, k).log()
    assert abs((q @ k.transpose(1, 2) / math.sqrt(64)).std().item() - 1) < 0.1
    assert scores.isfinite().all()
