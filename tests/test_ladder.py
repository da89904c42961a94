"""The drawn ladder: its truth, its ceilings, and what theory says of heads on it."""

from itertools import product

import pytest
import torch

from mmfuse.fusion import (
    CODE,
    HEADS,
    NOISE,
    RUNGS,
    SIDE,
    WIDE,
    draw_rungs,
    make_head,
    rung_accuracy,
    rung_posterior,
)

CHANCE, XOR, LOOK = 0.5, RUNGS.index("xor"), RUNGS.index("look-up")


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    a, b, c = draw_rungs(50, 3), draw_rungs(50, 3), draw_rungs(50, 4)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(x, y) for x, y in zip(a, c))
    assert [tuple(x.shape) for x in a] == [(50, SIDE, WIDE), (50, SIDE, WIDE), (50, len(RUNGS))]


def test_every_question_is_balanced():
    assert (draw_rungs(20_000)[2].mean(0) - 0.5).abs().max() < 0.02


def test_labels_are_what_the_tokens_say():
    "From the tokens themselves: means over tokens take the noise away."
    img, txt, y = draw_rungs(4000)
    a, b = img.mean(1), txt.mean(1)
    pictures = [b[:, 0] + a[:, 0], a[:, 1], b[:, 1], -a[:, 2] * b[:, 2]]
    for k, score in enumerate(pictures):
        assert ((score > 0) == (y[:, k] > 0)).float().mean() > 0.98, RUNGS[k]
    votes = (a[:, 3] > 0).int() + (b[:, 3] > 0).int() + (a[:, 4] * b[:, 4] < 0).int()
    assert ((votes >= 2) == (y[:, 4] > 0)).float().mean() > 0.98
    named = txt[..., 6 : 6 + SIDE].amax(1).argmax(1)
    colour = img[torch.arange(len(img)), named, 5]
    assert ((colour > 0) == (y[:, LOOK] > 0)).float().mean() > 0.8


def test_one_modality_says_nothing_of_what_it_cannot_know():
    img, txt, y = draw_rungs(20_000)
    image, text = rung_posterior(img, None), rung_posterior(None, txt)
    for p, silent in ((image, ("text only", "xor")), (text, ("image only", "xor", "look-up"))):
        for rung in silent:
            torch.testing.assert_close(p[:, RUNGS.index(rung)], torch.full((len(y),), CHANCE))


def test_a_posterior_is_calibrated():
    "Among samples with p near .9, nine of ten are a 1: for every rung and every reader."
    img, txt, y = draw_rungs(60_000, seed=5)
    for args in ((img, txt), (img, None), (None, txt)):
        p = rung_posterior(*args)
        assert p.min() >= 0 and p.max() <= 1
        for k in range(len(RUNGS)):
            group = (p[:, k] * 10).long().clamp(max=9)
            for g in range(10):
                rows = group == g
                if rows.sum() > 300:
                    assert abs(p[rows, k].mean() - y[rows, k].mean()) < 0.06, (RUNGS[k], g)


def test_the_posterior_by_enumeration():
    "The look-up, with every place and every word tried: densities of a normal, no formula."
    img, txt, _ = draw_rungs(40, seed=2)
    normal = torch.distributions.Normal(0, NOISE)
    found = []
    for x, t in zip(img.double(), txt.double()):
        mass = torch.zeros(2, dtype=torch.float64)
        for place, word, colour in product(range(SIDE), range(SIDE), (0, 1)):
            mean = torch.zeros(SIDE, SIDE, dtype=torch.float64)
            mean[word, place] = CODE
            words = normal.log_prob(t[:, 6 : 6 + SIDE] - mean).sum()
            mass[colour] += (words + normal.log_prob(x[place, 5] - (2 * colour - 1))).exp() / sum(
                normal.log_prob(x[place, 5] - c).exp() for c in (-1, 1)
            )
        found.append(mass[1] / mass.sum())
    torch.testing.assert_close(
        rung_posterior(img, txt)[:, LOOK].double(), torch.stack(found), atol=1e-4, rtol=1e-3
    )


def test_a_guess_is_half_right_and_the_posterior_beats_its_neighbours():
    img, txt, y = draw_rungs(20_000)
    best = rung_accuracy(rung_posterior(img, txt), y)
    assert abs(rung_accuracy(torch.rand(y.shape), y).mean() - CHANCE) < 0.02
    for args in ((img, None), (None, txt)):
        assert (rung_accuracy(rung_posterior(*args), y) <= best + 0.01).all()


@pytest.mark.parametrize("name", ["late", "joint", "image", "text"])
def test_no_additive_head_gets_all_four_cases_of_the_xor(name):
    "Whatever its weights: 300 draws, all signs."
    a, b = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1]]).view(2, 4, 1, 1)
    differ = torch.tensor([False, True, True, False])
    for seed in range(300):
        torch.manual_seed(seed)
        head = make_head(name, 1, 1, 1).eval()
        with torch.no_grad():
            for p in head.parameters():
                p.normal_(std=3)
            scores = head(a, b).squeeze(1)
        assert ((scores > 0) == differ).sum() < 4


def test_one_product_of_rank_one_learns_the_xor_and_a_sum_does_not():
    "Width 1, rank 1, one class: nothing but w (u.x + u0)(v.y + v0) + c."
    img, txt, y = draw_rungs(1500)
    new = draw_rungs(1500, seed=1)
    found = {}
    for name, more in (("low_rank", dict(rank=1, width=1, dropout=0.0)), ("late", {})):
        torch.manual_seed(1)
        head = make_head(name, WIDE, WIDE, 1, **more)
        head.set_statistics(img, txt, torch.ones(img.shape[:2], dtype=torch.bool))
        optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
        for _ in range(400):
            parts = head.parts(img, txt) if name == "late" else [head(img, txt)]
            loss = sum(
                torch.nn.functional.binary_cross_entropy_with_logits(p, y[:, [XOR]]) for p in parts
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores = head.eval()(*new[:2])
        found[name] = ((scores > 0) == (new[2][:, [XOR]] > 0)).float().mean().item()
    assert found["low_rank"] > 0.97 and found["late"] < 0.56


def test_a_pooled_head_cannot_tell_two_boards_with_the_same_mean_apart():
    "Swap the colours of two places: every head that pools the picture gives the same answer, whatever the word."
    img, txt, _ = draw_rungs(6)
    swapped = img.clone()
    swapped[:, [0, 1], 5] = img[:, [1, 0], 5]
    for name, head in HEADS.items():
        torch.manual_seed(0)
        made = make_head(name, WIDE, WIDE, 2, width=16)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn_like(p) * 0.2)
            same = torch.allclose(made.eval()(img, txt), made(swapped, txt), atol=1e-4)
        assert same == head.pools_image or name == "text", name
