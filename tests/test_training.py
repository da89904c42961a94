"""Training on cached tokens: invariants that the page does not carry."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS, make_head
from mmfuse.token_cache import Tokens
from mmfuse.training import choose_captions, decay_groups, fit, predict, take, warmup_cosine

N, P, DI, K, T, DT, C = 48, 4, 6, 3, 5, 8, 4


def make_tokens(seed=0):
    "Tokens whose first C image features and text features say the labels, with noise; captions of different number and length."
    rng = np.random.default_rng(seed)
    labels = (rng.random((N, C)) < 0.4).astype(np.float32)
    img = rng.normal(size=(N, P, DI)) * 0.3
    img[..., :C] += labels[:, None]
    txt = rng.normal(size=(N, K, T, DT)) * 0.3
    txt[..., :C] += labels[:, None, None]
    lengths = rng.integers(1, T + 1, (N, K))
    lengths[np.arange(K)[None] >= rng.integers(1, K + 1, N)[:, None]] = 0  # pictures with fewer captions
    mask = np.arange(T) < lengths[..., None]
    return Tokens(img=img.astype(np.float16), txt=txt.astype(np.float16), mask=mask, labels=labels,
                  image_id=np.arange(100, 100 + N), names=rng.normal(size=(C, DT)).astype(np.float32),
                  classes=[f"class {i}" for i in range(C)])


@pytest.fixture(scope="module")
def tokens():
    return make_tokens()


def head_of(name, seed=0):
    torch.manual_seed(seed)
    return make_head(name, DI, DT, C, width=16, names=torch.as_tensor(make_tokens().names))


@pytest.mark.parametrize("name", list(HEADS))
def test_same_seed_same_weights(name, tokens):
    states = []
    for seed in (0, 0, 1):
        head = head_of(name)
        fit(head, tokens, epochs=2, seed=seed, batch_size=16, modality_dropout=0.3)
        states.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ["image", "text", "joint", "cross_attention"])
def test_it_learns(name, tokens):
    history = fit(head := head_of(name), tokens, epochs=60, lr=1e-2, batch_size=16)
    prior = -(tokens.labels.mean() * math.log(tokens.labels.mean()) + (1 - tokens.labels.mean()) * math.log(1 - tokens.labels.mean()))
    assert history[-1] < 0.7 * prior
    assert not head.training


def test_a_caption_that_is_not_there_is_never_chosen(tokens):
    rows = torch.arange(N)
    for seed in range(50):
        k = choose_captions(tokens, rows, generator=torch.Generator().manual_seed(seed))
        assert tokens.mask[np.arange(N), k.numpy()].any(-1).all()
    last = choose_captions(tokens, rows, K - 1)
    assert tokens.mask[np.arange(N), last.numpy()].any(-1).all()


def test_take_cuts_nothing_that_is_real(tokens):
    rows, k = torch.arange(N), choose_captions(tokens, torch.arange(N), 0)
    _, txt, mask, _ = take(tokens, rows, k)
    assert mask.sum() == tokens.mask[:, 0].sum()
    assert mask.shape == txt.shape[:2]


def test_several_captions_are_averaged_over_those_that_exist(tokens):
    head = head_of("text").eval()
    mean = predict(head, tokens, captions=K)
    for i in range(N):
        n = int(tokens.mask[i].any(-1).sum())
        one = tokens.subset(np.array([i]))
        with torch.no_grad():
            each = [head(*take(one, torch.tensor([0]), torch.tensor([k]))[:3])[0] for k in range(n)]
        torch.testing.assert_close(mean[i], torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


def test_batch_size_does_not_change_a_prediction(tokens):
    head = head_of("cross_attention").eval()
    torch.testing.assert_close(predict(head, tokens, batch_size=7), predict(head, tokens, batch_size=N), atol=1e-5, rtol=1e-5)


def test_predict_puts_the_mode_back(tokens):
    head = head_of("joint").train()
    predict(head, tokens)
    assert head.training


def test_a_loss_that_is_no_number_names_its_pictures(tokens):
    broken = make_tokens()
    broken.img[3] = np.nan
    with pytest.raises(MmfuseError, match=r"the loss is nan on the pictures \[.*103"):
        fit(head_of("image"), broken, epochs=1, batch_size=N)


def test_history_is_a_mean_over_pictures_although_the_last_batch_is_short(tokens):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(C))

        def forward(self, img, txt, mask):
            return self.b.expand(len(img), -1)

    def loss(logits, y):
        return (y.sum(-1) + 0 * logits.sum(-1)).mean()

    (mean,) = fit(Constant(), tokens, epochs=1, batch_size=47, loss=loss)  # the last batch holds one picture
    assert mean == pytest.approx(tokens.labels.sum(-1).mean(), abs=1e-6)


def test_schedule_is_within_zero_and_one_and_ends_at_zero():
    for total in (1, 2, 7, 100):
        factors = [warmup_cosine(s, total) for s in range(total + 1)]
        assert all(0 <= f <= 1 for f in factors)
        assert max(factors) == 1
        assert total == 1 or factors[-1] == pytest.approx(0, abs=1e-9)


def test_decay_spares_vectors_and_scalars():
    head = head_of("cross_attention")
    matrices, rest = decay_groups(head, 0.1)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim < 2 for p in rest["params"])
    assert matrices["weight_decay"] == 0.1 and rest["weight_decay"] == 0
