"""Shared by the fused losses: checks, the CPU path, and the operator of the backward pass.

A loss of resized logits is computed together with its gradient, by its formula and not by autograd. Forward gives the
loss, the gradient's unscaled sums (in float32 or better, so that a mean over many pixels cannot underflow a half) and
``scale``, one over the weight of the valid pixels (in float64, so that the sums are rounded once); backward is
``sums * scale * d_loss`` in the logits' dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfn_kernels.common.backend import accumulator, check_features, debugging, full_precision, operator, use_triton
from dfn_kernels.losses import upsample_loss_triton as kernels
from dfn_kernels.losses.resize_rows import RowResize

REDUCTIONS = ("mean", "sum", "none")
LABELS = (torch.uint8, torch.int32, torch.int64)
MAX_CLASSES = 256
CHUNK = 1 << 19  # numbers that the CPU path holds at a time: 2 MB in float32
PER_PIXEL = 12  # of them, besides the resized logits


class Rule(NamedTuple):
    """The loss of a pixel: softmax, or sigmoid focal with its alpha; gamma as in eq. 4."""

    sigmoid: bool
    alpha: float
    gamma: float
    ignore_index: int

    @property
    def classes(self) -> int | None:
        """The number of values that a label may have; None if it depends on the logits."""
        return 2 if self.sigmoid else None


# Loss of a chunk of pixels and, if needed, the gradient for its logits, which may be overwritten. Logits are
# [rows, K, columns]; labels and weight [rows, 1, columns], or [rows, K, columns] if each class has its own. All are
# contiguous. Labels are classes, int64 for the softmax, otherwise in the logits' dtype. If a label does not count, it
# and its weight are 0.
ChunkLoss = Callable[[Tensor, Tensor, Tensor, Rule, bool], tuple[Tensor, Tensor | None]]


def check(operator: str, logits: Tensor, labels: Tensor, labels_shape: tuple[int | None, ...], reduction: str) -> None:
    """Raises ValueError unless logits are features with at most 256 classes and labels integers of that shape (None:
    any), on one device."""
    check_features(operator, logits=logits)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"{operator} expects at most {MAX_CLASSES} classes, got logits {list(logits.shape)}")
    fits = labels.ndim == len(labels_shape) and 0 not in labels.shape[1:]
    if not fits or any(n is not None and n != m for n, m in zip(labels_shape, labels.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in labels_shape)
        raise ValueError(
            f"{operator} expects labels of shape [{expected}], rows and columns at least 1, for logits "
            f"{list(logits.shape)}, got {list(labels.shape)}"
        )
    if labels.dtype not in LABELS:
        raise ValueError(f"{operator} expects labels in uint8, int32 or int64, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(f"{operator} expects labels on {logits.device}, like the logits, got {labels.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator} expects reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_gamma(operator: str, gamma: float) -> None:
    """Raises ValueError unless gamma is finite and not negative."""
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{operator} expects gamma to be finite and not negative, got {gamma}")


def check_values(operator: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for a label that is neither a class nor ``ignore_index``. Waits for the device."""
    wide = labels.long()
    wrong = wide[((wide < 0) | (wide >= classes)) & (wide != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{operator} expects labels in 0 ... {classes - 1} or {ignore_index} (ignore_index), got {wrong[0].item()}"
        )


def forward(
    operator: str,
    chunk_loss: ChunkLoss,
    rule: Rule,
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient's sums (empty unless needed) and scale, by the back end that serves the logits."""
    if debugging():
        check_values(operator, labels, rule.classes or logits.shape[1], rule.ignore_index)
    acc = accumulator(logits.dtype)
    class_weight = None if class_weight is None else class_weight.to(acc).contiguous()
    pixel_weight = None if pixel_weight is None else pixel_weight.to(acc).contiguous()
    if use_triton(logits):
        return kernels.launch_fwd(
            logits, labels, class_weight, pixel_weight, **rule._asdict(), reduction=reduction, need_grad=need_grad
        )
    with full_precision(logits.device):
        return _forward_by_chunks(chunk_loss, rule, logits, labels, class_weight, pixel_weight, reduction, need_grad)


def forward_fake(
    sigmoid: bool, logits: Tensor, labels: Tensor, reduction: str, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of :func:`forward`."""
    acc = accumulator(logits.dtype)
    B, K, h, w = logits.shape
    shape = kernels.gradient_shape(logits, labels.shape[-2], sigmoid) if use_triton(logits) else (B, h, K, w)
    gradient = logits.new_empty(shape if need_grad else (0,), dtype=acc)
    per_pixel = reduction == "none"
    loss = logits.new_empty(labels.shape if per_pixel else (), dtype=acc)
    return loss, gradient, logits.new_empty((0,) if per_pixel else (), dtype=torch.float64)


def _forward_by_chunks(
    chunk_loss: ChunkLoss,
    rule: Rule,
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU path: some rows of one image at a time, or several small images."""
    B, K, h, w = logits.shape
    H, W = labels.shape[-2:]
    acc = accumulator(logits.dtype)
    gradient = logits.new_zeros((B, h, K, w) if need_grad else (0,), dtype=acc)
    pixel_loss = logits.new_zeros(labels.shape if reduction == "none" else (0,), dtype=acc)
    sums = logits.new_zeros(2, dtype=torch.float64)  # of loss and weight
    chunk = 2 * CHUNK if rule.sigmoid else CHUNK  # few classes pay more for each call
    resize = RowResize((h, w), (H, W), chunk // ((K + PER_PIXEL) * W), gradient)
    images = max(1, chunk // ((K + PER_PIXEL) * H * W))
    for part in (slice(first, first + images) for first in range(0, B, images)):
        image = logits[part].permute(2, 0, 1, 3).to(acc).contiguous()  # [h, images, K, w]
        if not rule.sigmoid:  # an offset that all classes share changes nothing, and costs digits in the resize
            image = image - image.amax(2, keepdim=True)
        image = image.flatten(1, 2)
        d_image = torch.zeros_like(image) if need_grad else image
        for chunk in resize.chunks:
            place = (part, ..., resize.rows(chunk), slice(None))
            target = _by_row(labels[place])
            signed, target = target.dtype != torch.uint8, target.to(acc)
            weight = _counts(target, rule.classes or K, rule.ignore_index, signed)
            target = target * weight
            if not rule.sigmoid:
                target = target.long()
            if class_weight is not None:
                weight *= class_weight[target]
            sums[1] += weight.sum(-1).sum(dtype=torch.float64)
            if pixel_weight is not None:
                weight = weight * _by_row(pixel_weight[place])
            resized = resize.forward(image, chunk)
            loss, d_z = chunk_loss(resized.view(-1, K, W), target, weight, rule, need_grad)
            sums[0] += loss.sum(-1).sum(dtype=torch.float64)
            if reduction == "none":
                out = pixel_loss[place].movedim(-2, 0)  # [rows, images, 1 or K, columns], 1 left out
                out.copy_(loss.view(out.shape))
            if d_z is not None:
                resize.add_backward(d_image, d_z.view(resized.shape), chunk)
        if need_grad:
            gradient[part].copy_(d_image.view(h, -1, K, w).transpose(0, 1))
    if reduction == "none":
        return pixel_loss, gradient, sums.new_empty(0)
    scale = torch.where(sums[1] > 0, 1 / sums[1], 0) if reduction == "mean" else torch.ones_like(sums[1])
    return (sums[0] * scale).to(acc), gradient, scale


def _counts(labels: Tensor, classes: int, ignore_index: int, signed: bool) -> Tensor:
    """1 where a label, an integer in a float's dtype, is a class that counts, else 0.

    Computed by arithmetic: comparing bytes, and selecting by the result, takes three times as long.
    """
    counts = (classes - labels).clamp_(0, 1)
    if signed:
        counts *= (labels + 1).clamp_(0, 1)
    if 0 <= ignore_index < classes:
        counts *= (labels - ignore_index).abs_().clamp_(max=1)
    return counts


def _by_row(x: Tensor) -> Tensor:
    """``[images, rows, columns]`` or ``[images, K, rows, columns]`` as ``[rows x images, 1 or K, columns]``."""
    return x.movedim(-2, 0).reshape(-1, 1 if x.ndim == 3 else x.shape[1], x.shape[-1])


@operator("upsample_loss_bwd")
def backward(
    d_loss: Tensor, gradient: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, sigmoid: bool
) -> Tensor:
    """d_logits of ``shape`` in ``dtype``, channels_last, from the sums of :func:`forward`."""
    if gradient.ndim == 1:
        raise RuntimeError("the loss was computed with need_grad=False: it has no gradient")
    if gradient.ndim != 4:  # rows of sums of the kernels' programs
        return kernels.launch_bwd(d_loss, gradient, scale, shape, dtype, sigmoid)
    d_logits = torch.empty(shape, dtype=dtype, device=gradient.device, memory_format=torch.channels_last)
    images = max(1, CHUNK // gradient.shape[1:].numel())
    for image, sums in zip(d_logits.split(images), gradient.split(images), strict=True):
        image.copy_((sums.double() * (scale * d_loss)).transpose(1, 2))
    return d_logits


@backward.register_fake
def _(d_loss, gradient, scale, shape, dtype, sigmoid):
    return torch.empty(shape, dtype=dtype, device=gradient.device, memory_format=torch.channels_last)


def setup_context(ctx: Any, sigmoid: bool, output: tuple[Tensor, ...], reduction: str, *inputs: Tensor | None) -> None:
    """Saves the tensors of :func:`d_logits`: ``inputs``, logits first, only if each pixel has a gradient."""
    ctx.reduction, ctx.like = reduction, (list(inputs[0].shape), inputs[0].dtype, sigmoid)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(inputs if reduction == "none" else output[1:]))


def d_logits(ctx: Any, d_loss: Tensor | None, from_pixels: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Any:
    """The logits' gradient; ``from_pixels(d_loss, *inputs)`` is the forward pass with a weight for each pixel."""
    if d_loss is None:
        return None
    if ctx.reduction != "none":
        return backward(d_loss, *ctx.saved_tensors, *ctx.like)
    _, gradient, scale = from_pixels(d_loss, *ctx.saved_tensors)
    return backward(d_loss.new_ones(()), gradient, scale, *ctx.like)
