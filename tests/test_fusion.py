"""The contract that every head in HEADS keeps, whatever it is called."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS, make_head

DI, DT, C, B = 6, 8, 5, 4
BOTH = [name for name in HEADS if name not in ("image", "text")]


def make(name, *, named=True, seed=0, double=False, **kwargs):
    "A head away from its initialization, with statistics set."
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = make_head(name, DI, DT, C, width=16, names=torch.randn(C, DT, generator=g) if named else None, **kwargs)
    img, txt, mask = inputs(seed=seed + 1, b=12)
    if hasattr(head, "set_statistics"):
        head.set_statistics(img, txt, mask)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return head.double() if double else head


def inputs(seed=0, b=B, p=5, t=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    return torch.randn(b, p, DI, generator=g, dtype=dtype), torch.randn(b, t, DT, generator=g, dtype=dtype), mask


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_is_trained(name, named):
    head = make(name, named=named)
    img, txt, mask = inputs()
    for args in ((img, txt, mask), (None, txt, mask), (img, None, None)):
        head(*args).square().sum().backward()
    before = {k: p.detach().clone() for k, p in head.named_parameters()}
    for k, p in head.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, k
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    for k, p in head.named_parameters():
        assert not torch.equal(p, before[k]), k


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=15, deadline=None)
@given(p=st.integers(1, 9), t=st.integers(1, 9), b=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_number_of_tokens_and_no_say_for_neighbours_or_padding(name, p, t, b, seed):
    head = make(name).eval()
    img, txt, mask = inputs(seed, b, p, t)
    with torch.no_grad():
        out = head(img, txt, mask)
        assert out.shape == (b, C) and torch.isfinite(out).all()
        alone = torch.cat([head(img[i:i + 1], txt[i:i + 1], mask[i:i + 1]) for i in range(b)])
        padded = head(img, torch.cat([txt, torch.full((b, 3, DT), 1e3)], 1), torch.cat([mask, torch.zeros(b, 3, dtype=torch.bool)], 1))
        other = head(img, torch.where(mask[..., None], txt, torch.full_like(txt, -50.0)), mask)
    for same in (alone, padded, other):
        torch.testing.assert_close(same, out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_it_depends_on_what_it_claims_to_read_and_on_nothing_else(name):
    head = make(name).eval()
    img, txt, mask = inputs()
    with torch.no_grad():
        out, other_img, other_txt = head(img, txt, mask), head(img + 1, txt, mask), head(img, txt.flip(-1), mask)
    assert torch.equal(out, other_img) == (name == "text")
    assert torch.equal(out, other_txt) == (name == "image")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_a_missing_modality_is_welcome(name, train):
    head = make(name).train(train)
    img, txt, mask = inputs()
    for args in ((None, txt, mask), (img, None, None)):
        out = head(*args)
        assert out.shape == (B, C) and torch.isfinite(out).all()
    head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(img, txt, torch.zeros_like(mask)), head(img, None, None), atol=1e-5, rtol=1e-5)
    with pytest.raises(MmfuseError, match="neither"):
        head(None, None, None)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_right(name):
    head = make(name, double=True).eval()
    img, txt, mask = inputs(b=2, p=2, t=3, dtype=torch.float64)
    img.requires_grad_(name != "text")
    txt.requires_grad_(name != "image")
    assert torch.autograd.gradcheck(lambda i, t: head(i, t, mask), (img, txt), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_state_travels_and_evaluation_repeats(name):
    head, other = make(name).eval(), make(name, seed=3).eval()
    args = inputs()
    with torch.no_grad():
        assert torch.equal(head(*args), head(*args))
        assert not torch.equal(head(*args), other(*args))
        other.load_state_dict(head.state_dict())
        assert torch.equal(head(*args), other(*args))


@pytest.mark.parametrize("name", HEADS)
def test_it_can_be_exported_and_compiled(name):
    head = make(name).eval()
    args = inputs()
    with torch.no_grad():
        expected = head(*args)
        torch.testing.assert_close(torch.export.export(head, args).module()(*args), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.compile(head, backend="eager")(*args), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["late", "joint"])
def test_additive_heads_have_no_interaction(name):
    head = make(name).eval()
    img, txt, mask = inputs(b=2)
    with torch.no_grad():
        f = [[head(img[i:i + 1], txt[t:t + 1], mask[t:t + 1]) for t in range(2)] for i in range(2)]
    torch.testing.assert_close(f[0][0] - f[1][0], f[0][1] - f[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["concat", "gated", "film", "low_rank", "cross_attention", "bottleneck", "label_query", "article"])
def test_other_heads_can_interact(name):
    head = make(name).eval()
    img, txt, mask = inputs(b=2)
    with torch.no_grad():
        f = [[head(img[i:i + 1], txt[t:t + 1], mask[t:t + 1]) for t in range(2)] for i in range(2)]
    assert ((f[0][0] - f[1][0]) - (f[0][1] - f[1][1])).abs().max() > 1e-4


def test_the_article_against_the_library():
    "Its two-token attention by hand: softmax of scaled dot products of the projected tokens."
    head = make("article").eval()
    args = inputs()
    x, a = head.two_tokens(*args), head.attention
    q, k, v = (x @ w.T + b for w, b in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)))
    split = lambda y: y.unflatten(-1, (a.num_heads, -1)).transpose(1, 2)
    weights = (split(q) @ split(k).transpose(-1, -2) / (DT // a.num_heads) ** 0.5).softmax(-1)
    fused = a.out_proj((weights @ split(v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(head(*args), head.classifier(fused[:, 0]), atol=1e-5, rtol=1e-5)


def test_label_query_begins_as_the_joint_head_and_answers_to_new_names():
    head = make_head("label_query", DI, DT, C, width=16, names=torch.randn(C, DT)).eval()
    args = inputs()
    with torch.no_grad():
        assert torch.equal(head(*args), head.residual(*args))
        head.out.weight.normal_()
        assert head.ask(*args, names=torch.randn(2, DT)).shape == (B, 2)
        torch.testing.assert_close(head.ask(*args, names=head.names), head.ask(*args))


@pytest.mark.parametrize("args, words", [
    (("sum", DI, DT, C), "no head is called 'sum'"), (("text", 0, DT, C), "at least 1"), (("text", DI, DT, 0), "at least 1")])
def test_bad_arguments_are_one_line(args, words):
    with pytest.raises(MmfuseError, match=words):
        make_head(*args)


def test_wrong_shapes_are_named():
    head = make("joint")
    img, txt, mask = inputs()
    with pytest.raises(MmfuseError, match=r"image tokens are \(4, 6\)"):
        head(img[:, 0], txt, mask)
    with pytest.raises(MmfuseError, match=r"text tokens are .*expected \(B, n, 8\)"):
        head(img, txt[..., :3], mask)
    with pytest.raises(MmfuseError, match="names are"):
        make_head("joint", DI, DT, C, names=torch.randn(C, DT + 1))
