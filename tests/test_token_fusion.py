"""Token heads against the same operators from PyTorch's layers, and what each of their parts is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmfuse.files import MmfuseError
from mmfuse.fusion import make_head
from mmfuse.metrics import mean_average_precision
from mmfuse.token_fusion import Block, NameHead, heads_for, sinusoids
from torch_heads import DecoderBlock, MhaBlock, PlainBottleneck, encoder_layer, with_torch

DI, DT, C, B = 6, 8, 5, 4
TOKEN_HEADS = ["cross_attention", "bottleneck", "label_query"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shake(module, seed=0):
    "Away from initialization, in float64."
    module = module.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.2)
    return module.eval()


def inputs(b=B, p=5, t=7, seed=0):
    "Captions of different lengths, one of them of a single word."
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    mask[0, 1:] = False
    return draw(b, p, DI, seed=seed), draw(b, t, DT, seed=seed + 1), mask


def head_of(name, **kwargs):
    torch.manual_seed(0)
    names = kwargs.pop("names", draw(C, DT, seed=9).float())
    head = shake(make_head(name, DI, DT, C, width=64, names=names, **kwargs))
    for block in (m for m in head.modules() if isinstance(m, Block)):
        block.norm_kv.load_state_dict(block.norm_q.state_dict())  # nn.TransformerEncoderLayer has one norm
    return head


def both(run, theirs, *args):
    "Output and gradients of the inputs, ours and theirs."
    ends = []
    for f in (run, theirs):
        leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        out = f(*leaves)
        out.square().sum().backward()
        ends.append([out.detach(), *(a.grad for a in leaves if a.requires_grad)])
    return zip(*ends)


@settings(max_examples=25, deadline=None)
@given(q=st.integers(1, 6), k=st.integers(1, 9), b=st.integers(1, 4), masked=st.booleans())
@pytest.mark.parametrize("kind", [MhaBlock, DecoderBlock])
def test_a_block_is_the_librarys_layer(kind, q, k, b, masked):
    block = shake(Block(64, 2))
    theirs = kind(block).double().eval()
    mask = torch.arange(k) < torch.randint(1, k + 1, (b, 1)) if masked else None
    args = draw(b, q, 64), draw(b, k, 64, seed=1)
    for a, c in both(lambda *x: block(*x, mask), lambda *x: theirs(*x, mask), *args):
        torch.testing.assert_close(a, c)


def test_a_block_that_reads_itself_is_an_encoder_layer():
    block = shake(Block(64, 2))
    block.norm_kv.load_state_dict(block.norm_q.state_dict())
    theirs, x = encoder_layer(block).double().eval(), draw(B, 6, 64)
    for a, c in both(lambda x: block(x, x), theirs, x):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("kind", [MhaBlock, DecoderBlock])
@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_a_head_is_the_same_with_the_librarys_layers(name, kind):
    head = head_of(name)
    theirs = with_torch(head, kind).double().eval()
    assert not any(isinstance(m, Block) for m in theirs.modules())
    for a, c in both(head, theirs, *inputs()):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_bottleneck_is_mbt_written_out(n_layers):
    "Its last layer asks with the shared tokens only, and loses nothing by it."
    head = head_of("bottleneck", n_layers=n_layers)
    for a, c in both(head, PlainBottleneck(head).double().eval(), *inputs()):
        torch.testing.assert_close(a, c)


def test_nothing_passes_a_bottleneck_before_the_second_layer():
    "With one layer, places and words meet in the shared tokens alone: what is added is a mean of two sides."
    head = head_of("bottleneck", n_layers=1)
    shared = []
    head.norm.register_forward_pre_hook(lambda m, x: shared.append(x[0].detach()))
    img, txt, mask = inputs()
    for args in ((img, txt, mask), (img + 1, txt, mask), (img, txt + 1, mask), (img + 1, txt + 1, mask)):
        head(*args)
    neither, image, text, moved = shared
    torch.testing.assert_close(moved - text, image - neither)
    assert (image - neither).abs().max() > 1e-3 and (text - neither).abs().max() > 1e-3


@pytest.mark.parametrize("name", TOKEN_HEADS)
@pytest.mark.parametrize("positions", [False, True])
def test_the_order_of_tokens_matters_only_with_positions(name, positions):
    head = head_of(name, positions=positions)
    img, txt, mask = inputs()
    places, words = torch.randperm(5), torch.cat([torch.arange(1), 1 + torch.randperm(6)])
    moved = head(img[:, places.flip(0)], txt[:, words.flip(0)], mask[:, words.flip(0)])
    assert torch.allclose(moved, head(img, txt, mask)) != positions


def test_sinusoids_by_hand():
    waves = sinusoids(3, 4)
    expected = torch.tensor([[i, i, i / 100, i / 100] for i in range(3)])
    expected = torch.stack([f(x) for f, x in zip((torch.sin, torch.cos) * 2, expected.T)], 1)
    torch.testing.assert_close(waves, expected)
    assert sinusoids(2, 5).shape == (2, 5)


def test_a_position_can_be_moved_by_one_matrix():
    "Vaswani et al. 2017, section 3.5: a shift is a linear map, the same at every place."
    waves = sinusoids(40, 16).double()
    shift = torch.linalg.lstsq(waves[:-3], waves[3:]).solution
    torch.testing.assert_close(waves[:-3] @ shift, waves[3:], atol=1e-3, rtol=1e-3)


def test_the_mark_is_what_tells_the_modalities_apart():
    torch.manual_seed(0)
    head = make_head("label_query", 8, 8, C, width=64, residual=None).double().eval()
    head.text.load_state_dict(head.image.state_dict())
    a, b = draw(B, 3, 8), draw(B, 3, 8, seed=1)
    assert not torch.allclose(head(a, b), head(b, a))
    torch.nn.init.zeros_(head.modality)
    torch.testing.assert_close(head(a, b), head(b, a))


@pytest.mark.parametrize("width", [1, 16, 33, 64, 100, 256, 768])
def test_heads_divide_the_width(width):
    n = heads_for(width)
    assert width % n == 0 and 1 <= n <= 8 and (n == 1 or width // n >= 25)


@pytest.mark.parametrize("residual", ["joint", "names"])
def test_a_correction_begins_at_zero(residual):
    torch.manual_seed(0)
    head = make_head("label_query", DI, DT, C, width=16, names=draw(C, DT).float(), residual=residual).double()
    args = inputs()
    head.set_statistics(*args)
    head.eval()
    torch.testing.assert_close(head(*args), head.residual(*args), rtol=0, atol=0)
    assert head.ask(*args).eq(0).all()


@pytest.mark.parametrize("residual", ["names", None])
def test_a_class_added_by_name_gets_what_it_would_have_got(residual):
    "The weights of a head trained on some classes are a head for others: nothing belongs to a class."
    head = head_of("label_query", residual=residual)
    img, txt, mask = inputs()
    others = draw(3, DT, seed=4)
    added = head.answer(img, txt, mask, others)
    torch.manual_seed(0)
    made = make_head("label_query", DI, DT, 3, width=64, names=others.float(), residual=residual).double().eval()
    skip = ("names", "z.mean", "z.std")
    state = {k: v for k, v in head.state_dict().items() if not k.endswith(skip) or "z_" in k}
    made.load_state_dict(state, strict=False)
    if residual:
        z = made.residual.similar.z
        z.mean.copy_(head.residual.similar.z.mean.mean(1, keepdim=True).expand_as(z.mean))
        z.std.copy_(head.residual.similar.z.std[:, :1].expand_as(z.std))
    torch.testing.assert_close(added, made(img, txt, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", ["names", None])
def test_what_is_asked_for_decides_the_answer_and_its_neighbours_do_not(residual):
    head = head_of("label_query", residual=residual)
    args, others = inputs(), draw(3, DT, seed=4)
    together = head.answer(*args, others)
    alone = torch.cat([head.answer(*args, one[None]) for one in others], 1)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(head.ask(*args, 5 * others), head.ask(*args, others))
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


def test_name_similarity_of_a_missing_caption_and_of_padding():
    head = shake(NameHead(DI, DT, C, names=draw(C, DT).float()))
    img, txt, mask = inputs()
    assert head(img).shape == (B, C) and head(img, names=draw(2, DT)).shape == (B, 2)
    torch.testing.assert_close(head(img, txt.masked_fill(~mask[..., None], 1e6), mask), head(img, txt, mask))
    longer = F.pad(txt, (0, 0, 0, 3), value=7.0), F.pad(mask, (0, 3))
    torch.testing.assert_close(head(img, *longer, names=draw(2, DT)), head(img, txt, mask, draw(2, DT)))


def test_what_cannot_be_asked_is_refused():
    args = inputs()
    with pytest.raises(MmfuseError, match="residual='names'"):
        head_of("label_query").answer(*args, draw(1, DT))
    with pytest.raises(MmfuseError, match="learned"):
        head_of("label_query", names=None).ask(*args, draw(1, DT))
    with pytest.raises(MmfuseError, match="needs names"):
        make_head("label_query", DI, DT, C, residual="names")
    with pytest.raises(MmfuseError, match="'joint', 'names' or None"):
        make_head("label_query", DI, DT, C, residual="late")


def worded(n, seed, names):
    "Three classes a sample; each is said by a noisy copy of its name; the picture says nothing."
    g = torch.Generator().manual_seed(seed)
    there = torch.rand(n, len(names), generator=g).topk(3).indices  # (n, 3)
    txt = names[there] + 0.2 * torch.randn(n, 3, names.shape[1], generator=g)
    y = torch.zeros(n, len(names)).scatter(1, there, 1.0)
    return torch.randn(n, 2, DI, generator=g), txt, torch.ones(n, 3, dtype=torch.bool), y


def test_classes_that_were_never_trained_are_found_by_name():
    "Forty-eight names, eight of them without a label: far above chance by their own names, at chance by others'."
    names = F.normalize(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.manual_seed(0)
    head = make_head("label_query", DI, 16, 40, width=64, names=names[:40], dropout=0.0, residual=None)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for step in range(400):
        *args, y = worded(64, step, names)
        loss = F.binary_cross_entropy_with_logits(head(*args), y[:, :40])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *args, y = worded(1000, 1000, names)
    head.eval()
    chance = y[:, 40:].mean().item()
    with torch.no_grad():
        trained = mean_average_precision(head(*args), y[:, :40])
        own = mean_average_precision(head.answer(*args, names[40:]), y[:, 40:])
        others = mean_average_precision(head.answer(*args, names[40:].roll(1, 0)), y[:, 40:])
    assert trained > 0.9 and own > 3 * chance, (trained, own, chance)
    assert others < 1.5 * chance, (others, chance)


def test_a_name_head_finds_untrained_classes_at_once():
    "No step of training: the similarity of word and name, whatever classes it was made with."
    names = F.normalize(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    *args, y = worded(1000, 1, names)
    head = make_head("label_query", DI, 16, 40, width=16, names=names[:40], residual="names").eval()
    head.set_statistics(*args)
    with torch.no_grad():
        assert mean_average_precision(head.answer(*args, names[40:]), y[:, 40:]) > 0.8
