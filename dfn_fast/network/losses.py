"""The losses of DFN (Yu et al., CVPR 2018, section 3.3), on full-size scores and in plain PyTorch.

Each is a mean over the valid pixels of the batch, those whose label is not ``ignore_index``; a batch without a valid
pixel gives 0, with zero gradients. Arithmetic is float32 or better whatever the dtype of the scores.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast.errors import listed

Criterion = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_over(loss: Tensor, valid: Tensor) -> Tensor:
    """The mean of ``loss`` over the ``valid`` pixels; 0 if there are none."""
    return loss.sum() / valid.sum().clamp(min=1)


def cross_entropy(scores: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Softmax cross entropy. ``scores`` ``[B, K, H, W]``, ``labels`` ``[B, H, W]`` of any integer dtype -> scalar."""
    # One row per pixel: the two-dimensional form of nll_loss has no deterministic CUDA kernel.
    rows = at_least_float32(scores).permute(0, 2, 3, 1).reshape(-1, scores.shape[1])
    loss = F.cross_entropy(rows, labels.reshape(-1).long(), ignore_index=ignore_index, reduction="sum")
    return loss / (labels != ignore_index).sum().clamp(min=1)


def focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, ignore_index: int = 255
) -> Tensor:
    """Sigmoid focal loss, eq. 4 (RetinaNet's formula): ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    ``p_t`` is the probability of the true side, ``alpha_t`` is ``alpha`` on borders and ``1 - alpha`` elsewhere.
    Computed from logits (``log p_t = logsigmoid(+-logit)``), so it is finite for every finite logit, in half
    precision too. ``logits`` ``[B, 1, H, W]``, ``targets`` ``[B, H, W]`` in {0, 1, ignore_index} -> scalar.
    """
    valid = targets != ignore_index
    border = targets == 1
    signed = at_least_float32(logits.squeeze(1)) * torch.where(border, 1.0, -1.0)  # logit of the true side
    # Not torch.where of two numbers, which gives float32 whatever the scores are.
    alpha_t = (1 - alpha) + (2 * alpha - 1) * border.to(signed.dtype)
    # exp(gamma * log), not a power: with gamma below 1 its gradient is infinite where 1 - p_t is 0.
    loss = -alpha_t * torch.exp(gamma * F.logsigmoid(-signed)) * F.logsigmoid(signed)
    return _mean_over(loss * valid, valid)


def torchseg_focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, ignore_index: int = 255
) -> Tensor:
    """The loss that TorchSeg's published DFN was trained with: for comparison with it only.

    It uses the probability where the formula has the logit, so its value is never positive and its minimum lies at
    "border everywhere". With ``p = sigmoid(logit)`` and ``t`` the target it is the mean over *all* pixels, ignored
    ones counting 0, of ``-(alpha (1-p)^gamma (p - p t) + (1-alpha) p^gamma log(1 + exp(-p)))``.
    """
    valid = targets != ignore_index
    p = torch.sigmoid(at_least_float32(logits.squeeze(1)))
    target = (targets == 1).to(p.dtype)
    positive = (1 - p) ** gamma * (p - p * target)
    negative = p**gamma * torch.log1p(torch.exp(-p))
    return (-(alpha * positive + (1 - alpha) * negative) * valid).mean()


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy` as a criterion."""

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(scores, labels, self.ignore_index)


class SigmoidFocalLoss(nn.Module):
    """:func:`focal_loss` as a criterion; with ``torchseg=True``, :func:`torchseg_focal_loss`."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, ignore_index: int = 255, torchseg: bool = False):
        super().__init__()
        self.alpha, self.gamma, self.ignore_index = alpha, gamma, ignore_index
        self.formula = torchseg_focal_loss if torchseg else focal_loss

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.formula(logits, targets, alpha=self.alpha, gamma=self.gamma, ignore_index=self.ignore_index)


def dfn_loss(
    smooth_scores: Sequence[Tensor],
    border_scores: Sequence[Tensor],
    labels: Tensor,
    border_targets: Tensor,
    criterion: Criterion,
    aux_criterion: Criterion,
    border_weight: float,
    shares: Tensor | None = None,
) -> Tensor:
    """Eq. 7: ``sum of criterion(smooth score) + border_weight * sum of aux_criterion(border score)``.

    ``shares`` ``[2]``: a factor for each of the two sums, for a process that has only a part of the batch.
    """
    loss = torch.stack([criterion(score, labels) for score in smooth_scores]).sum()
    if shares is not None:
        loss = loss * shares[0]
    if border_scores and border_weight:
        borders = torch.stack([aux_criterion(score, border_targets) for score in border_scores]).sum()
        if shares is not None:
            borders = borders * shares[1]
        loss = loss + border_weight * borders
    return loss


def require_no_label(label: Tensor | None, aux_label: Tensor | None) -> None:
    """Raises ``ValueError`` if one of the two label maps was given: a loss needs both."""
    if label is not None or aux_label is not None:
        given, missing = ("label", "aux_label") if aux_label is None else ("aux_label", "label")
        raise ValueError(f"expected both label and aux_label for a loss, or none for scores; got {given}, no {missing}")


def label_verdict(data: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """Whether a label of ``[B, H, W]`` is neither a class nor ``ignore_index``: a bool scalar on the labels' device.

    In eager mode on a CPU a wrong label is a ``ValueError`` and the result None. Elsewhere nothing waits: see
    :func:`with_verdict`. Raises ``ValueError`` for another shape than that of the images ``[B, 3, H, W]``, and if
    ``ignore_index`` is one of the classes.
    """
    expected = (data.shape[0], *data.shape[2:])
    if labels.shape != expected or labels.is_floating_point():
        raise ValueError(
            f"expected integer labels {list(expected)}, one for each pixel of the images, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"{num_classes} classes have the ids 0..{num_classes - 1}, but {ignore_index} is ignored: expected at most "
            f"{ignore_index} classes, or a criterion of your own"
        )
    if not readable(labels):
        return (((labels >= num_classes) | (labels < 0)) & (labels != ignore_index)).any()
    values = labels.detach().numpy()
    wrong = ((values >= num_classes) | (values < 0)) & (values != ignore_index)
    if wrong.any():
        raise ValueError(
            f"expected labels 0..{num_classes - 1}, or {ignore_index} for pixels to ignore, got "
            f"{listed(map(str, np.unique(values[wrong]).tolist()))}"
        )
    return None


def readable(x: Tensor) -> bool:
    """Whether looking at values costs no waiting: on a CPU, outside of a graph."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def with_verdict(loss: Tensor, wrong: Tensor | None) -> Tensor:
    """The loss, or nan if the labels were ``wrong``: seen when the loss is read, without waiting before."""
    return loss if wrong is None else torch.where(wrong, torch.full_like(loss, torch.nan), loss)
