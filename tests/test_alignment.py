"""alignment: equal to the papers' formulas, image ids respected everywhere, several processes equal to one."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mmfuse.alignment import (AlignmentError, LogitScale, all_gather, cosine_embedding, hard_negatives, info_nce,
                              matching_loss, modality_gap, pair_distance, retrieval, siglip, supcon, uniformity)
from mmfuse.files import MmfuseError


def vectors(b=6, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, d, generator=g, dtype=torch.float64) for _ in range(2))


IDS = torch.tensor([3, 1, 3, 2, 1, 3])
PAIRED = {"cosine_embedding": cosine_embedding, "info_nce": info_nce, "siglip": siglip}
every_loss = pytest.mark.parametrize("loss", PAIRED.values(), ids=PAIRED)


def test_info_nce_is_clips():
    img, txt = vectors()
    logits = 7 * F.normalize(img) @ F.normalize(txt).T
    right = torch.arange(6)
    torch.testing.assert_close(info_nce(img, txt, logit_scale=7), (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2)


def test_info_nce_with_several_captions_by_loops():
    img, txt = vectors()
    cosine, total = F.normalize(img) @ F.normalize(txt).T, 0
    for table in (cosine, cosine.T):
        for i in range(6):
            below = math.log(sum(math.exp(5 * table[i, j]) for j in range(6)))
            right = [j for j in range(6) if IDS[j] == IDS[i]]
            total += sum(below - 5 * table[i, j].item() for j in right) / len(right) / 12
    torch.testing.assert_close(info_nce(img, txt, IDS, logit_scale=5).item(), total)


@pytest.mark.parametrize("ids", [None, IDS])
def test_the_first_loss_is_ln_b(ids):
    same = torch.ones(6, 5)
    assert info_nce(same, same, ids).item() == pytest.approx(math.log(6))
    img, txt = torch.randn(2, 64, 4096, generator=torch.Generator().manual_seed(0))
    assert info_nce(img, txt, logit_scale=10).item() == pytest.approx(math.log(64), abs=0.05)


def test_siglip_is_the_papers():
    img, txt = vectors()
    logits = 4 * F.normalize(txt) @ F.normalize(img).T - 3
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    theirs = -F.logsigmoid(signs * logits).sum(1).mean()
    torch.testing.assert_close(siglip(img, txt, logit_scale=4, logit_bias=-3), theirs)
    signs = 2 * (IDS[:, None] == IDS).double() - 1
    torch.testing.assert_close(siglip(img, txt, IDS, logit_scale=4, logit_bias=-3), -F.logsigmoid(signs * logits).sum(1).mean())


@pytest.mark.parametrize("margin", [0, 0.3])
def test_cosine_embedding_is_torchs(margin):
    img, txt = vectors()
    pull = F.cosine_embedding_loss(img, txt, torch.ones(6))
    torch.testing.assert_close(cosine_embedding(img, txt, negatives=False), pull)
    i, j = torch.where(~torch.eye(6, dtype=torch.bool))
    push = F.cosine_embedding_loss(img[i], txt[j], -torch.ones(30), margin=margin)
    torch.testing.assert_close(cosine_embedding(img, txt, margin=margin), pull + push)


def test_supcon_by_loops():
    x, _ = vectors()
    y = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
    cosine, costs = F.normalize(x) @ F.normalize(x).T, []
    for i in range(6):
        below = math.log(sum(math.exp(3 * cosine[i, j]) for j in range(6) if j != i))
        w = {j: (y[i] & y[j]).sum().item() / max(1, (y[i] | y[j]).sum().item()) for j in range(6) if j != i}
        if sum(w.values()): costs.append(sum(w[j] * (below - 3 * cosine[i, j].item()) for j in w) / sum(w.values()))
    assert len(costs) == 5
    torch.testing.assert_close(supcon(x, y, logit_scale=3).item(), sum(costs) / 5)


def test_supcon_without_positives_is_zero():
    x = torch.randn(4, 3, requires_grad=True)
    for y in (torch.eye(4), torch.zeros(4, 2)):
        loss = supcon(x, y)
        grad, = torch.autograd.grad(loss, x)
        assert loss == 0 and (grad == 0).all()


@every_loss
def test_gradients(loss):
    img, txt = (v.requires_grad_() for v in vectors())
    for ids in (None, IDS):
        assert torch.autograd.gradcheck(lambda a, b: loss(a, b, ids), (img, txt))
    assert torch.autograd.gradcheck(lambda a: supcon(a, IDS[:, None] == torch.arange(4)), img)


@every_loss
@settings(deadline=None, max_examples=20)
@given(st.permutations(range(6)))
def test_the_order_of_the_batch_does_not_matter(loss, order):
    img, txt = vectors()
    torch.testing.assert_close(loss(img[order], txt[order], IDS[order]), loss(img, txt, IDS))


@every_loss
def test_both_ways_alike_and_length_does_not_matter(loss):
    img, txt = vectors()
    torch.testing.assert_close(loss(txt, img, IDS), loss(img, txt, IDS))
    torch.testing.assert_close(loss(3 * img, 0.1 * txt), loss(img, txt))


@every_loss
def test_the_right_partner_is_better_than_a_wrong_one(loss):
    img, _ = vectors()
    noisy = img + 0.1 * next(vectors(seed=1))
    assert loss(img, noisy) < loss(img, noisy.roll(1, 0))


@every_loss
def test_a_second_caption_of_the_same_picture_is_no_negative(loss):
    "Repeating a pair under the same id must not push it away from itself."
    img, txt = vectors()
    img, txt = torch.cat([img, img[:1]]).requires_grad_(), torch.cat([txt, txt[:1]])
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    alike, apart = (torch.autograd.grad(loss(img, txt, i), img)[0] for i in (ids, None))
    direction = F.normalize(txt[6], dim=0)
    assert (-alike[6] @ direction) > (-apart[6] @ direction)


def test_ids_change_nothing_where_the_rows_of_a_picture_are_one_vector():
    "What its first row pushes, its second row pulls: the sum is half a target each, which is what the ids say."
    img, txt = vectors()
    img = img[[0, 1, 0, 3, 1, 0]].clone().requires_grad_()  # as IDS has it
    tied, plain = info_nce(img, txt, IDS), info_nce(img, txt)
    torch.testing.assert_close(tied, plain)
    apart = img + 0.1 * next(vectors(seed=2))
    assert (info_nce(apart, txt, IDS) - info_nce(apart, txt)).abs() > 1e-4
    assert siglip(img, txt, IDS) - siglip(img, txt) > 1e-4


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_odd_input_stays_finite(loss, dtype):
    for img in (torch.zeros(4, 8), 6e4 * torch.ones(4, 8), torch.full((4, 8), 1e-7)):
        img = img.to(dtype).requires_grad_()
        value = loss(img, torch.ones(4, 8, dtype=dtype))
        grad, = torch.autograd.grad(value, img)
        assert value.isfinite() and value.dtype == torch.float32 and grad.isfinite().all()
    one = loss(torch.ones(1, 8, dtype=dtype), torch.ones(1, 8, dtype=dtype))
    assert one.isfinite()


def test_the_temperature_is_learned_and_kept_below_its_limit():
    scale = LogitScale(start=90)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    scale().neg().backward()
    optimizer.step()
    assert scale().item() == pytest.approx(100, rel=1e-5)
    optimizer.zero_grad()
    (0.001 * scale()).backward()
    assert scale.log.grad > 0, "at the limit there is still a gradient that leads back"
    assert LogitScale()().item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_hard_negatives_are_never_the_same_picture():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 6, generator=g)
    for _ in range(50):
        captions, pictures = hard_negatives(logits, IDS, generator=g)
        assert (IDS[captions] != IDS).all() and (IDS[pictures] != IDS).all()


def test_hard_negatives_are_drawn_by_similarity():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, generator=g).requires_grad_()
    drawn = torch.stack([torch.stack(hard_negatives(logits, generator=g)) for _ in range(3000)]) # (3000, 2, 4)
    for side, table in enumerate((logits, logits.T)):
        share = F.one_hot(drawn[:, side], 4).float().mean(0)
        wanted = table.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf).softmax(1)
        torch.testing.assert_close(share, wanted.detach(), atol=0.04, rtol=0)


def test_matching_pairs_the_right_tokens_and_masks():
    b = torch.arange(6.0)
    img, txt = b.view(6, 1, 1).expand(6, 2, 3), b.view(6, 1, 1).expand(6, 4, 3)
    mask = torch.arange(4) <= b.view(6, 1) % 4
    def score(img, txt, mask):
        assert img.shape == (18, 2, 3) and (mask.sum(1) == txt[:, 0, 0] % 4 + 1).all()
        return torch.where(IDS[img[:, 0, 0].long()] == IDS[txt[:, 0, 0].long()], 50.0, -50.0)
    assert matching_loss(score, img, txt, mask, torch.zeros(6, 6), IDS).item() == pytest.approx(0, abs=1e-6)
    chance = matching_loss(lambda i, t, m: torch.zeros(len(i), 1), img, txt, mask, torch.zeros(6, 6), IDS)
    assert chance.item() == pytest.approx(math.log(2))


def test_gap_distance_and_uniformity():
    img, txt = torch.tensor([[2.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 3]])
    assert modality_gap(img, txt) == pytest.approx(math.sqrt(2))
    assert modality_gap(img, img) == 0 == pair_distance(img, img)
    assert pair_distance(img, txt) == pytest.approx(2) and pair_distance(img, -img) == pytest.approx(4)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)
    x = F.normalize(torch.randn(50, 3), dim=1)
    i, j = torch.triu_indices(50, 50, 1)
    by_hand = (-2 * (x[i] - x[j]).square().sum(1)).exp().mean().log().item()
    assert uniformity(7 * x) == pytest.approx(by_hand, abs=1e-5)


def test_retrieval_both_ways():
    img = torch.eye(4)
    captions = img.repeat_interleave(5, 0) + 0.01
    found = retrieval(img, captions, torch.arange(4), torch.arange(4).repeat_interleave(5), ks=(1, 2))
    assert found == {"image to text": {1: 1.0, 2: 1.0}, "text to image": {1: 1.0, 2: 1.0}}
    collapsed = retrieval(torch.ones(4, 3), torch.ones(4, 3), torch.arange(4), ks=(1,))
    assert collapsed["image to text"][1] == pytest.approx(0.25)


@every_loss
def test_wrong_shapes(loss):
    x = torch.ones(4, 3)
    for bad in (lambda: loss(x, torch.ones(3, 3)), lambda: loss(x[0], x[0]), lambda: loss(x[:0], x[:0]),
                lambda: loss(x, x, torch.arange(3))):
        with pytest.raises(AlignmentError) as error: bad()
        assert "\n" not in str(error.value) and isinstance(error.value, (MmfuseError, ValueError))


def test_measures_refuse_what_they_cannot_measure():
    x = torch.ones(4, 3)
    for bad in (lambda: modality_gap(x, x[0]), lambda: modality_gap(x[:0], x), lambda: pair_distance(x, x[:3]),
                lambda: uniformity(x[:1]), lambda: retrieval(x, x[0], torch.arange(4)), lambda: supcon(x, torch.ones(3, 2))):
        with pytest.raises(AlignmentError) as error: bad()
        assert "\n" not in str(error.value)


def test_a_shift_and_a_turn_leave_a_linear_head_all_its_answers():
    "The chapter's argument, and its limit: the gap and the ranks change, what can be said does not."
    img, txt = vectors(b=40, d=8)
    turn, shift = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0], torch.ones(8, dtype=torch.float64)
    weight, moved = torch.randn(3, 16, dtype=torch.float64), txt @ turn.T + shift
    new = torch.cat([weight[:, :8], weight[:, 8:] @ turn.T], 1)
    answers = torch.cat([img, moved], 1) @ new.T - new[:, 8:] @ shift
    torch.testing.assert_close(answers, torch.cat([img, txt], 1) @ weight.T)
    assert modality_gap(img, moved) > modality_gap(img, txt) + 0.3


@pytest.mark.parametrize("level", [0.3, 0.9])
def test_a_constant_coordinate_moves_the_clouds_and_not_one_rank(level):
    img, txt = (F.normalize(v, dim=1) for v in vectors(b=60, d=8))
    far = level / math.sqrt(1 - level**2)
    img_far, txt_far = (torch.cat([v, torch.full_like(v[:, :1], c)], 1) for v, c in ((img, far), (txt, -far)))
    ids = torch.arange(60)
    assert retrieval(img_far, txt_far, ids) == retrieval(img, txt, ids)
    assert modality_gap(img_far, txt_far) > 2 * level


def test_a_batch_of_one_picture_has_no_negatives():
    with pytest.raises(AlignmentError, match="no wrong partner"):
        hard_negatives(torch.zeros(3, 3), torch.ones(3))


PROCESS = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from mmfuse.alignment import all_gather, info_nce, siglip
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
task = torch.load(f"{folder}/task.pt")
model = torch.nn.Linear(5, 4, dtype=torch.float64)
model.load_state_dict(task["model"])
model = DistributedDataParallel(model)
rows = slice(0, 4) if rank == 0 else slice(4, None) # 4 rows and 3: an uneven last batch
img, txt = model(torch.cat([task["img"][rows], task["txt"][rows]])).chunk(2)
ids = all_gather(task["ids"][rows])
img, txt = all_gather(img), all_gather(txt)
loss = info_nce(img, txt, ids) + siglip(img, txt, ids)
loss.backward()
torch.save(dict(loss=loss.detach(), grad=model.module.weight.grad, ids=ids), f"{folder}/{rank}.pt")
dist.barrier() # neither leaves while the other still talks to it
dist.destroy_process_group()
os._exit(0) # gloo's threads do not always survive the interpreter's own end
"""


def test_two_processes_equal_one(tmp_path):
    img, txt = vectors(b=7)
    ids, model = torch.tensor([0, 1, 2, 3, 3, 1, 4]), torch.nn.Linear(5, 4, dtype=torch.float64)
    torch.save(dict(img=img, txt=txt, ids=ids, model=model.state_dict()), tmp_path / "task.pt")
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=180) for process in both] == [0, 0]
    loss = info_nce(model(img), model(txt), ids) + siglip(model(img), model(txt), ids)
    loss.backward()
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(theirs["ids"], ids)
        torch.testing.assert_close(theirs["loss"], loss.detach())
        torch.testing.assert_close(theirs["grad"], model.weight.grad)


def test_alone_gathering_does_nothing():
    x = torch.ones(2, 3)
    assert all_gather(x) is x
