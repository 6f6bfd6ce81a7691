"""The losses against PyTorch's own and against explicit float64 formulas, and at the ends of the number range."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfn_fast.network.losses import (
    CrossEntropyLoss,
    SigmoidFocalLoss,
    cross_entropy,
    dfn_loss,
    focal_loss,
    torchseg_focal_loss,
)

LABEL_DTYPES = [torch.uint8, torch.int32, torch.int64]


def labels_with_ignored(shape, num_classes, share=0.3):
    labels = torch.randint(num_classes, shape)
    labels[torch.rand(shape) < share] = 255
    return labels


def gradient(loss, scores):
    return torch.autograd.grad(loss, scores)[0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Softmax cross entropy


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 5, 7, 9), (3, 21, 8, 4)], ids=str)
def test_cross_entropy_is_pytorchs_mean_over_valid_pixels(shape, dtype):
    batch, classes, *size = shape
    scores = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    labels = labels_with_ignored((batch, *size), classes)
    labels[0, 0, 0] = classes - 1  # at least one valid pixel
    expected = F.cross_entropy(scores, labels, ignore_index=255)
    loss = cross_entropy(scores, labels.to(dtype))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, scores), gradient(expected, scores), rtol=1e-10, atol=1e-14)


def test_cross_entropy_takes_another_ignored_label():
    scores, labels = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
    expected = F.cross_entropy(scores, labels, ignore_index=0)
    torch.testing.assert_close(cross_entropy(scores, labels, ignore_index=0), expected)
    torch.testing.assert_close(CrossEntropyLoss(ignore_index=0)(scores, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_scores_is_computed_in_float32(dtype):
    scores, labels = (10 * torch.randn(2, 30, 16, 16)).to(dtype), torch.randint(30, (2, 16, 16))
    loss = cross_entropy(scores, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(scores.double(), labels), rtol=1e-5, atol=0)


# Focal loss


def focal_formula(logits, targets, alpha, gamma):
    """Eq. 4 pixel by pixel from probabilities, in Python floats."""
    terms = []
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        if target == 255:
            continue
        p = 1 / (1 + math.exp(-logit))
        p_t, alpha_t = (p, alpha) if target == 1 else (1 - p, 1 - alpha)
        terms.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.25, 0.0), (0.9, 0.5), (0.5, 3.0)])
def test_focal_loss_is_the_formula(alpha, gamma, dtype):
    logits = 3 * torch.randn(2, 1, 5, 7, dtype=torch.float64)
    targets = labels_with_ignored((2, 5, 7), 2)
    loss = focal_loss(logits, targets.to(dtype), alpha=alpha, gamma=gamma)
    assert loss.item() == pytest.approx(focal_formula(logits, targets, alpha, gamma), rel=1e-12)


def test_focal_loss_of_one_pixel_by_hand():
    """p = 0.8 on a border: 0.25 x 0.04 x ln 1.25; off a border: 0.75 x 0.64 x ln 5."""
    logit = torch.tensor(math.log(4.0), dtype=torch.float64).view(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, dtype=torch.uint8)
    assert focal_loss(logit, one).item() == pytest.approx(0.01 * math.log(1.25), rel=1e-12)
    assert focal_loss(logit, one - 1).item() == pytest.approx(0.48 * math.log(5.0), rel=1e-12)


def test_focal_loss_has_the_formulas_gradient():
    logits = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = labels_with_ignored((1, 3, 4), 2)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, targets), logits)


@pytest.mark.parametrize("extreme", [100.0, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_finite_at_extreme_logits(extreme, dtype, gamma):
    logits = torch.tensor([-extreme, extreme], dtype=dtype).repeat(2).view(1, 1, 2, 2).requires_grad_()
    targets = torch.tensor([[[0, 0], [1, 1]]])
    loss = focal_loss(logits, targets, gamma=gamma)
    # Two pixels are right and cost nothing; the other two cost alpha_t times their logit.
    assert loss.item() == pytest.approx((0.75 + 0.25) * logits.max().item() / 4, rel=1e-3)
    d_logits = gradient(loss, logits)
    expected = torch.tensor([[0.0, 0.75], [-0.25, 0.0]]) / 4
    torch.testing.assert_close(d_logits.float().view(2, 2), expected, rtol=1e-2, atol=1e-4)


# TorchSeg's loss


def test_torchseg_focal_loss_of_one_pixel_by_hand():
    """p = 0.8. Off a border: -(0.25 x 0.04 x 0.8 + 0.75 x 0.64 x ln(1 + e^-0.8)); on one the first term is 0."""
    logit = torch.tensor(math.log(4.0), dtype=torch.float64).view(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, dtype=torch.int64)
    second = 0.48 * math.log(1 + math.exp(-0.8))
    assert torchseg_focal_loss(logit, one).item() == pytest.approx(-second, rel=1e-12)
    assert torchseg_focal_loss(logit, one - 1).item() == pytest.approx(-(0.008 + second), rel=1e-12)


def test_torchseg_focal_loss_averages_over_all_pixels():
    logits, targets = torch.randn(1, 1, 2, 4, dtype=torch.float64), torch.randint(2, (1, 2, 4))
    half = targets.clone()
    half[:, 1] = 255
    whole = torchseg_focal_loss(logits[:, :, :1], targets[:, :1])
    torch.testing.assert_close(torchseg_focal_loss(logits, half), whole / 2)


@pytest.mark.parametrize("target", [0, 1])
def test_torchseg_focal_loss_is_never_positive_and_wants_borders_everywhere(target):
    logits = torch.linspace(-20, 20, 81, dtype=torch.float64).view(81, 1, 1, 1)
    values = torch.stack([torchseg_focal_loss(x[None], torch.full((1, 1, 1), target)) for x in logits])
    assert (values < 0).all()
    assert values.argmin() == 80


def test_torchseg_focal_loss_is_finite_in_half_precision():
    logits = torch.tensor([-6e4, -100.0, 100.0, 6e4], dtype=torch.float16).view(1, 1, 2, 2).requires_grad_()
    loss = torchseg_focal_loss(logits, torch.tensor([[[0, 1], [0, 1]]]))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, logits)).all()


# Behaviour common to all


@pytest.mark.parametrize("loss", [cross_entropy, focal_loss, torchseg_focal_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_without_a_valid_pixel_gives_zero_with_zero_gradients(loss, dtype):
    scores = torch.randn(2, 1, 4, 4, dtype=dtype, requires_grad=True)
    labels = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    value = loss(scores, labels)
    assert value.item() == 0
    assert torch.equal(gradient(value, scores), torch.zeros_like(scores))


@pytest.mark.parametrize("loss", [cross_entropy, focal_loss])
def test_ignored_pixels_do_not_count(loss):
    channels = 6 if loss is cross_entropy else 1
    scores = torch.randn(1, channels, 4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (1, 4, 6))
    labels[:, 2:] = 255
    value = loss(scores, labels)
    torch.testing.assert_close(value, loss(scores[:, :, :2], labels[:, :2]))
    d_scores = gradient(value, scores)
    assert (d_scores[:, :, :2] != 0).all()
    assert (d_scores[:, :, 2:] == 0).all()


def test_the_focal_criterion_passes_its_settings_on():
    logits, targets = torch.randn(1, 1, 4, 4), torch.randint(3, (1, 4, 4))
    ours = focal_loss(logits, targets, alpha=0.6, gamma=1.0, ignore_index=2)
    theirs = torchseg_focal_loss(logits, targets, alpha=0.6, gamma=1.0, ignore_index=2)
    assert torch.equal(SigmoidFocalLoss(0.6, 1.0, ignore_index=2)(logits, targets), ours)
    assert torch.equal(SigmoidFocalLoss(0.6, 1.0, ignore_index=2, torchseg=True)(logits, targets), theirs)
    assert not torch.allclose(ours, theirs)
    assert not torch.allclose(ours, SigmoidFocalLoss()(logits, targets))


# Eq. 7


def scores_and_labels():
    smooth = [torch.randn(2, 4, 5, 6, requires_grad=True) for _ in range(4)]
    border = [torch.randn(2, 1, 5, 6, requires_grad=True) for _ in range(4)]
    return smooth, border, labels_with_ignored((2, 5, 6), 4), labels_with_ignored((2, 5, 6), 2)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_dfn_loss_is_the_weighted_sum_of_all_heads(weight):
    smooth, border, labels, targets = scores_and_labels()
    loss = dfn_loss(smooth, border, labels, targets, nn.CrossEntropyLoss(ignore_index=255), focal_loss, weight)
    expected = sum(F.cross_entropy(score, labels, ignore_index=255) for score in smooth)
    expected = expected + weight * sum(focal_loss(score, targets) for score in border)
    torch.testing.assert_close(loss, expected)


def test_a_border_weight_of_zero_leaves_the_border_scores_alone():
    smooth, border, labels, targets = scores_and_labels()

    def fail(*_):
        raise AssertionError("a loss of weight 0 was computed")

    loss = dfn_loss(smooth, border, labels, targets, cross_entropy, fail, 0.0)
    torch.testing.assert_close(loss, sum(cross_entropy(score, labels) for score in smooth))
    loss.backward()
    assert all(score.grad is None for score in border)


def test_without_a_border_network_only_the_smooth_losses_count():
    smooth, _, labels, targets = scores_and_labels()
    loss = dfn_loss(smooth[-1:], [], labels, targets, cross_entropy, focal_loss, 0.1)
    torch.testing.assert_close(loss, cross_entropy(smooth[-1], labels))
