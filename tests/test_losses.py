"""losses: equal to torch's, torchvision's and the paper's formulas; gradients; extreme input; errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from timm.loss import AsymmetricLossMultiLabel
from torchvision.ops import sigmoid_focal_loss

from mmfuse.files import MmfuseError
from mmfuse.losses import LossError, asymmetric, bce, focal, positive_weights


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 5, generator=g, dtype=torch.float64)
    return logits, (torch.rand(7, 5, generator=g) < 0.3).double()


def published_asl(x, y, gamma_neg, gamma_pos, clip):
    "Equations 4 to 7 of Ridnik et al. 2021, element by element, without a thought for stability."
    p = torch.sigmoid(x)
    shifted = (p - clip).clamp(min=0)
    return torch.where(y == 1, -(1 - p) ** gamma_pos * torch.log(p), -shifted ** gamma_neg * torch.log(1 - shifted))


LOSSES = {"bce": bce, "focal": focal, "asymmetric": asymmetric,
          "half": lambda x, y, **k: focal(x, y, gamma=0.5, **k),
          "clip": lambda x, y, **k: asymmetric(x, y, gamma_neg=0.5, gamma_pos=0.5, clip=0.05, **k),
          "only_clip": lambda x, y, **k: asymmetric(x, y, gamma_neg=0, gamma_pos=0, clip=0.05, **k)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def test_bce_is_torchs(batch):
    x, y = batch
    w = torch.tensor([1.0, 2, 3, 4, 0.5], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(bce(x, y, reduction=reduction), F.binary_cross_entropy_with_logits(x, y, reduction=reduction))
        torch.testing.assert_close(bce(x, y, pos_weight=w, reduction=reduction),
                                   F.binary_cross_entropy_with_logits(x, y, pos_weight=w, reduction=reduction))


def test_bce_takes_probabilities_as_labels(batch):
    x, y = batch
    y = 0.9 * y + 0.02
    torch.testing.assert_close(bce(x, y), F.binary_cross_entropy_with_logits(x, y))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_is_torchvisions(batch, gamma, alpha):
    x, y = batch
    theirs = sigmoid_focal_loss(x, y, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction="mean")
    torch.testing.assert_close(focal(x, y, gamma=gamma, alpha=alpha), theirs)


@pytest.mark.parametrize("gammas", [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0), (0, 0, 0.2), (1, 3, 0.5), (0.5, 0.5, 0.1)])
def test_asymmetric_is_the_papers(batch, gammas):
    x, y = batch
    ours = asymmetric(x, y, gamma_neg=gammas[0], gamma_pos=gammas[1], clip=gammas[2], reduction="none")
    torch.testing.assert_close(ours, published_asl(x, y, *gammas))


@pytest.mark.parametrize("gammas", [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0), (0, 0, 0.2), (1, 3, 0.5)])
@pytest.mark.parametrize("detach", [False, True])
def test_asymmetric_is_timms_in_value_and_gradient(batch, gammas, detach):
    x, y = (t[:1].float() for t in batch) # one picture: there a sum over classes is a sum, in every release of timm
    theirs = AsymmetricLossMultiLabel(*gammas, disable_torch_grad_focal_loss=detach)
    ours = lambda x, y: asymmetric(x, y, gamma_neg=gammas[0], gamma_pos=gammas[1], clip=gammas[2], detach=detach, reduction="sum")
    found = [(loss(v, y), v) for loss, v in ((ours, x.clone().requires_grad_()), (theirs, x.clone().requires_grad_()))]
    (a, in_a), (b, in_b) = found
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(a, in_a)[0], torch.autograd.grad(b, in_b)[0], rtol=1e-3, atol=1e-5)


def test_without_focus_they_are_bce(batch):
    for x, y in [batch, (batch[0].float(), batch[1].float()), (torch.tensor([[80.0, -80, 300, -300]]), torch.tensor([[0.0, 1, 1, 0]]))]:
        torch.testing.assert_close(focal(x, y, gamma=0), bce(x, y), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(asymmetric(x, y, gamma_neg=0, gamma_pos=0, clip=0), bce(x, y), atol=1e-6, rtol=1e-6)


@every_loss
def test_gradients(batch, loss):
    x, y = batch
    x = x[(torch.sigmoid(x) - 0.05).abs().amin(1) > 1e-3].clone().requires_grad_() # away from the clip's corner
    assert len(x) > 3
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:len(x)]), x)


def test_detached_weights_pass_no_gradient(batch):
    x, y = batch[0].clone().requires_grad_(), batch[1]
    p = torch.sigmoid(batch[0])
    asymmetric(x, y, gamma_neg=2, gamma_pos=1, clip=0, detach=True, reduction="sum").backward()
    torch.testing.assert_close(x.grad, torch.where(y == 1, -(1 - p) * (1 - p), p ** 2 * p))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss, dtype):
    x = torch.tensor([[-6e4, -200, -20, -0.0, 0, 20, 200, 6e4]] * 2, dtype=dtype, requires_grad=True)
    y = torch.tensor([[0.0] * 8, [1.0] * 8])
    value = loss(x, y)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_loss
def test_a_certain_mistake_still_has_a_gradient(loss):
    x = torch.tensor([[30.0, -30.0]], requires_grad=True)
    loss(x, torch.tensor([[0.0, 1.0]]), reduction="sum").backward()
    clipped = loss in (LOSSES["asymmetric"], LOSSES["clip"], LOSSES["only_clip"])
    assert x.grad[0, 1] < -0.5
    assert abs(x.grad[0, 0]) < 1e-3 if clipped else x.grad[0, 0] > 0.5 # a clipped negative costs -log clip at most


@every_loss
def test_the_sum_of_many_halves_does_not_overflow(loss):
    x = torch.full((500, 80), 12.0, dtype=torch.float16)
    assert loss(x, torch.zeros(500, 80), reduction="sum").isfinite()


@every_loss
def test_sum_is_mean_times_elements(batch, loss):
    x, y = batch
    torch.testing.assert_close(loss(x, y, reduction="sum"), loss(x, y) * y.numel())
    torch.testing.assert_close(loss(x, y, reduction="none").sum(), loss(x, y, reduction="sum"))


@every_loss
def test_labels_of_any_type(batch, loss):
    x, y = batch
    for other in (y.bool(), y.long(), y.half()):
        torch.testing.assert_close(loss(x, other), loss(x, y))


@settings(deadline=None, max_examples=50)
@given(st.floats(-50, 50), st.floats(0, 6), st.booleans())
def test_focus_never_adds(x, gamma, positive):
    x, y = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[float(positive)]], dtype=torch.float64)
    assert focal(x, y, gamma=gamma) <= bce(x, y) + 1e-12


def test_positive_weights():
    y = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(positive_weights(y), torch.tensor([1.0, 3.0, 4.0]))
    torch.testing.assert_close(positive_weights(y, power=0), torch.ones(3))
    torch.testing.assert_close(positive_weights(y, largest=2.0), torch.tensor([1.0, 2.0, 2.0]))


@every_loss
def test_wrong_shapes(loss):
    with pytest.raises(LossError, match=r"\(4, 3\) and labels \(4,\)") as error:
        loss(torch.zeros(4, 3), torch.zeros(4))
    assert isinstance(error.value, (MmfuseError, ValueError)) and "\n" not in str(error.value)
    with pytest.raises(LossError, match="reduction"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3), reduction="average")


def test_wrong_numbers():
    with pytest.raises(LossError, match="clip"):
        asymmetric(torch.zeros(1, 1), torch.zeros(1, 1), clip=1.0)
    with pytest.raises(LossError, match="none below 0"):
        focal(torch.zeros(1, 1), torch.zeros(1, 1), gamma=-1)
