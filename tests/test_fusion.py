"""The contract that every head in HEADS keeps, whatever it is called; and heads from published projects that break it."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim
from torch.func import functional_call

from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS, make_head
from mmfuse.pooled_fusion import FusionHead

DI, DT, C, B = 6, 8, 5, 4
every_head = pytest.mark.parametrize("name", HEADS)


def away(head, seed=0):
    "The same head with its statistics set and every parameter moved away from where it began."
    g = torch.Generator().manual_seed(seed)
    if hasattr(head, "set_statistics"):
        head.set_statistics(*inputs(seed=seed + 1, b=12))
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return head


def make(name, seed=0, *, named=True, width=16, **kwargs):
    torch.manual_seed(seed)
    names = torch.randn(C, DT, generator=torch.Generator().manual_seed(seed)) if named else None
    return away(make_head(name, DI, DT, C, width=width, names=names, **kwargs), seed)


def inputs(seed=0, b=B, p=5, t=7, dtype=torch.float32, shortest=1):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(shortest, t + 1, (b, 1), generator=g)
    return torch.randn(b, p, DI, generator=g, dtype=dtype), torch.randn(b, t, DT, generator=g, dtype=dtype), mask


def ways(img, txt, mask):
    "Both modalities, no image, no text."
    return (img, txt, mask), (None, txt, mask), (img, None, None)


def leaves(out):
    "Every tensor with a gradient that took part in `out`."
    found, seen, todo = set(), set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [n for n, _ in node.next_functions]
    return found


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def answer(head, *args):
    with torch.no_grad():
        return head(*args)


# The clauses. Each takes a function that makes a head from a seed, so that it can be shown to refuse a bad one.


def registers_and_trains_every_parameter(build):
    head, used = build(0).train(), set()
    for args in ways(*inputs()):
        out = head(*args)
        used |= leaves(out)
        out.square().sum().backward()
    assert used <= set(head.parameters()), "the output depends on a tensor that no optimizer sees"
    before = {k: p.detach().clone() for k, p in head.named_parameters()}
    for k, p in head.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, f"{k} has no gradient"
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    for k, p in head.named_parameters():
        assert not torch.equal(p, before[k]), f"{k} does not change in a step"


def answers_each_sample_alone(build, seed=0, b=3, p=4, t=5, train=False):
    head = build(0).train(train)
    for m in head.modules():  # in training, nothing but dropout may differ
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    img, txt, mask = inputs(seed, b, p, t, shortest=0)
    out = answer(head, img, txt, mask)
    assert out.shape == (b, C) and out.isfinite().all()
    same(torch.cat([answer(head, *(x[i : i + 1] for x in (img, txt, mask))) for i in range(b)]), out)


def ignores_padding(build, seed=0, b=3, p=4, t=5):
    head = build(0).eval()
    img, txt, mask = inputs(seed, b, p, t)
    out = answer(head, img, txt, mask)
    longer = torch.cat([txt, torch.full((b, 3, DT), 1e3)], 1), torch.cat([mask, torch.zeros(b, 3, dtype=torch.bool)], 1)
    same(answer(head, img, *longer), out)
    same(answer(head, img, torch.where(mask[..., None], txt, -50.0), mask), out)


def reads_what_it_claims_and_nothing_else(build, image=True, text=True):
    head = build(0).eval()
    img, txt, mask = inputs()
    out = answer(head, img, txt, mask)
    for other, claimed in (((img.flip(-1), txt, mask), image), ((img, txt.flip(-1), mask), text)):
        moved = (answer(head, *other) - out).abs().amax(1)  # (B,)
        assert (moved > 1e-4).all() if claimed else (moved == 0).all()


def welcomes_a_missing_modality(build, train=False):
    head = build(0).train(train)
    img, txt, mask = inputs()
    for args in ways(img, txt, mask):
        out = head(*args)
        assert out.shape == (B, C) and out.isfinite().all()
    head.eval()
    same(answer(head, img, txt, torch.zeros_like(mask)), answer(head, img, None, None))
    same(answer(head, img, txt, None), answer(head, img, txt, torch.ones_like(mask)))


def has_the_right_gradients(build):
    head = build(0).double().eval()
    img, txt, mask = inputs(b=2, p=2, t=3, dtype=torch.float64)
    params = dict(head.named_parameters())
    for k in range(3):

        def call(img, txt, *values):
            return functional_call(head, dict(zip(params, values)), ways(img, txt, mask)[k])

        used = leaves(call(img.requires_grad_(), txt.requires_grad_(), *params.values()))
        inner = [x.detach().requires_grad_(x in used) for x in (img, txt, *params.values())]
        assert torch.autograd.gradcheck(call, inner, atol=1e-5, fast_mode=True)


def travels_as_a_state_dict_and_repeats_itself(build):
    head, other, args = build(0).eval(), build(3).eval(), inputs()
    out = answer(head, *args)
    assert torch.equal(answer(head, *args), out), "two answers to one question"
    assert not torch.equal(answer(other, *args), out)
    other.load_state_dict(head.state_dict())
    assert torch.equal(answer(other, *args), out), "the state dict lacks something"


def can_be_exported(build):
    "One program for any batch, any number of places and words; and for each missing modality."
    head, args = build(0).eval(), inputs()
    b, p, t = Dim("b"), Dim("p"), Dim("t")
    program = torch.export.export(head, args, dynamic_shapes=({0: b, 1: p}, {0: b, 1: t}, {0: b, 1: t})).module()
    for other in (args, inputs(seed=5, b=7, p=3, t=9)):
        same(program(*other), answer(head, *other))
    for lacking in ways(*args)[1:]:
        same(torch.export.export(head, lacking).module()(*lacking), answer(head, *lacking))


def can_be_compiled(build):
    "As one graph, with both modalities and with one."
    torch._dynamo.reset()
    head = build(0).eval()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    for args in ways(*inputs()):
        same(answer(compiled, *args), answer(head, *args))


@pytest.mark.parametrize("named", [True, False])
@every_head
def test_every_parameter_is_registered_and_trained(name, named):
    registers_and_trains_every_parameter(partial(make, name, named=named))


any_size = dict(seed=st.integers(0, 99), b=st.integers(1, 5), p=st.integers(1, 9), t=st.integers(1, 9))


@pytest.mark.parametrize("train", [True, False])
@every_head
@settings(max_examples=10, deadline=None)
@given(**any_size)
def test_batch_mates_have_no_say(name, train, **size):
    answers_each_sample_alone(partial(make, name), train=train, **size)


@every_head
@settings(max_examples=10, deadline=None)
@given(**any_size)
def test_padding_has_no_say(name, **size):
    ignores_padding(partial(make, name), **size)


@every_head
def test_it_reads_what_it_claims_and_nothing_else(name):
    reads_what_it_claims_and_nothing_else(partial(make, name), image=not name.startswith("text"), text=not name.startswith("image"))


@pytest.mark.parametrize("train", [True, False])
@every_head
def test_a_missing_modality_is_welcome(name, train):
    welcomes_a_missing_modality(partial(make, name), train)
    with pytest.raises(MmfuseError, match="neither"):
        make(name)(None, None, None)


@every_head
def test_gradients_are_right(name):
    has_the_right_gradients(partial(make, name))


@every_head
def test_state_travels_and_evaluation_repeats(name):
    travels_as_a_state_dict_and_repeats_itself(partial(make, name))


@every_head
def test_it_can_be_exported(name):
    can_be_exported(partial(make, name))


@every_head
def test_it_can_be_compiled(name):
    can_be_compiled(partial(make, name))


def block(w):  # three norms, attention, a network twice as wide
    return 6 * w + 4 * (w * w + w) + (2 * w + 1) * w + (w + 1) * 2 * w


def tokens(i, t, w):  # two projections, two modality vectors
    return (i + t) * w + 2 * w


FORMULAS = dict(  # of the trained numbers, without names; i, t, c, w: widths of image and text, classes, hidden width
    image=lambda i, t, c, w: c * (i + 1) + i,
    text=lambda i, t, c, w: c * (t + 1) + t,
    late=lambda i, t, c, w: c * (i + t + 2) + i + t,
    concat=lambda i, t, c, w: (i + t + 1) * w + (w + 1) * c + i + t,
    joint=lambda i, t, c, w: c * (i + t + 1) + i + t,
    article=lambda i, t, c, w: (i + 1) * t + 4 * (t * t + t) + (t + 1) * c + i + t,
    gated=lambda i, t, c, w: (2 * i + 2 * t + 3) * w + (w + 1) * c + i + t,
    film=lambda i, t, c, w: (i + 1) * w + 2 * w + (t + 1) * 2 * w + (w + 1) * c + i + t,
    low_rank=lambda i, t, c, w: 4 * (i + t + 2) * w + 4 + w + (w + 1) * c + i + t,
    cross_attention=lambda i, t, c, w: tokens(i, t, w) + 2 * block(w) + 4 * w + (2 * w + 1) * c + i + t,
    bottleneck=lambda i, t, c, w: tokens(i, t, w) + 4 * block(w) + 4 * w + 2 * w + (w + 1) * c + i + t,
    label_query=lambda i, t, c, w: tokens(i, t, w) + c * w + block(w) + 2 * w + w + 1 + c * (i + t + 1) + 2 * (i + t),
    named=lambda i, t, c, w: c * (i + t + 1) + i + t + c * c,  # joint, and what each label says of each
    image_named=lambda i, t, c, w: c * (i + 1) + i + c * c,
    text_named=lambda i, t, c, w: c * (t + 1) + t + c * c,
)
NAMED = dict(text=lambda t, c, w: 2, late=lambda t, c, w: 2, joint=lambda t, c, w: 2,  # more of them with names
             named=lambda t, c, w: 3, text_named=lambda t, c, w: 3,
             label_query=lambda t, c, w: 2 + (t + 1) * w - c * w)


@every_head
@settings(max_examples=10, deadline=None)
@given(i=st.integers(1, 40), t=st.integers(1, 40), c=st.integers(1, 9), w=st.integers(1, 40), named=st.booleans())
def test_the_count_is_the_formula(name, i, t, c, w, named):
    head = make_head(name, i, t, c, width=w, names=torch.ones(c, t) if named else None)
    more = NAMED[name](t, c, w) if named and name in NAMED else 0
    assert sum(p.numel() for p in head.parameters()) == FORMULAS[name](i, t, c, w) + more


# Heads that break a clause, as found in the wild: the clause must say no.


class Broken(FusionHead):
    "Sound so far: two linear layers, and one of their product."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image, self.text, self.out = nn.Linear(DI, 16), nn.Linear(DT, 16), nn.Linear(16, C)

    def vectors(self, *args):
        x_i, x_t = self.pooled(*args)
        return self.image(x_i), self.text(x_t)

    def forward(self, img, txt=None, mask=None):
        a, b = self.vectors(img, txt, mask)
        return self.out(a * b + a + b)


class AcrossTheBatch(Broken):
    "fusilli's cross-modal attention: (B, D) is taken for one sequence of B tokens."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, img, txt=None, mask=None):
        a, b = self.vectors(img, txt, mask)
        return self.out(a + self.attention(a, b, b, need_weights=False)[0])


class NotRegistered(Broken):
    "MultiBench's low-rank layer: factors in a plain list."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factors = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]

    def forward(self, img, txt=None, mask=None):
        a, b = self.vectors(img, txt, mask)
        return self.out((a @ self.factors[0]) * (b @ self.factors[1]) + a + b)


class OneKey(Broken):
    "Cross-attention from the caption to one pooled image vector: queries that change nothing."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, img, txt=None, mask=None):
        a, b = (x.unsqueeze(1) for x in self.vectors(img, txt, mask))
        return self.out(self.attention(b, a, a, need_weights=False)[0].squeeze(1))


class ReadsPadding(Broken):
    "A mean over all tokens, padding included."

    def pooled(self, img, txt, mask):
        return super().pooled(img, txt, None)


class BatchNormed(Broken):
    "Batch statistics in the head: in training a sample's answer is its neighbours' too."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image = nn.Sequential(nn.Linear(DI, 16), nn.BatchNorm1d(16))


class AlwaysDropping(Broken):
    "The functional dropout, whose default is training."

    def vectors(self, *args):
        return [nn.functional.dropout(x) for x in super().vectors(*args)]


class Detached(Broken):
    "A gradient that is not the function's."

    def forward(self, img, txt=None, mask=None):
        a, b = self.vectors(img, txt, mask)
        return self.out(a * b.detach() + a + b)


class NeedsText(Broken):
    "No stand-in for a caption."

    def forward(self, img, txt=None, mask=None):
        return super().forward(img, txt[:, :], mask)


class LooksAtNumbers(Broken):
    "Python decides by a tensor's value: one graph cannot hold that."

    def forward(self, img, txt=None, mask=None):
        out = super().forward(img, txt, mask)
        return out if out.max() > 9 else out + 1


class KnowsItsBatch(Broken):
    "`len` of a tensor is a plain number: a program for batches of that size only."

    def forward(self, img, txt=None, mask=None):
        out = super().forward(img, txt, mask)
        return out + out.new_zeros(len(out), 1)


CLAUSES = [
    registers_and_trains_every_parameter, answers_each_sample_alone, partial(answers_each_sample_alone, train=True), ignores_padding,
    reads_what_it_claims_and_nothing_else, welcomes_a_missing_modality, has_the_right_gradients,
    travels_as_a_state_dict_and_repeats_itself, can_be_exported, can_be_compiled]


def build_broken(cls, seed=0):
    torch.manual_seed(seed)
    return away(cls(DI, DT, C), seed)


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_sound_head_passes(clause):
    clause(partial(build_broken, Broken))


@pytest.mark.parametrize("cls, clause", [
    (NotRegistered, registers_and_trains_every_parameter), (NotRegistered, travels_as_a_state_dict_and_repeats_itself),
    (OneKey, registers_and_trains_every_parameter), (OneKey, reads_what_it_claims_and_nothing_else),
    (AcrossTheBatch, answers_each_sample_alone), (BatchNormed, partial(answers_each_sample_alone, train=True)),
    (ReadsPadding, ignores_padding), (AlwaysDropping, travels_as_a_state_dict_and_repeats_itself),
    (Detached, has_the_right_gradients), (NeedsText, welcomes_a_missing_modality),
    (LooksAtNumbers, can_be_compiled), (KnowsItsBatch, can_be_exported)])
def test_the_contract_refuses_what_others_shipped(cls, clause):
    with pytest.raises(Exception) as refused:
        clause(partial(build_broken, cls))
    assert not isinstance(refused.value, NameError)


# What a head is, beyond the contract.


def interaction(head):
    "f(i, t) - f(i', t) - f(i, t') + f(i', t'), for two pictures and two captions."
    img, txt, mask = inputs(b=2)
    f = [[answer(head.eval(), img[i : i + 1], txt[t : t + 1], mask[t : t + 1]) for t in range(2)] for i in range(2)]
    return (f[0][0] - f[1][0] - f[0][1] + f[1][1]).abs().max()


@every_head
def test_additive_heads_have_no_interaction_and_the_others_do(name):
    found = interaction(make(name))
    assert found < 1e-4 if name in ("image", "text", "late", "joint", "image_named", "text_named") else found > 1e-4


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
