"""Softmax cross entropy of resized logits, ``-w_y (1 - p_y)^gamma log(p_y)`` with ``p = softmax(resize(logits))``:
DFN's segmentation loss (Yu et al., CVPR 2018, eq. 5), and with ``gamma > 0`` its eq. 4 over K classes.

``logits`` are ``[B, K, h, w]`` in channels_last, ``labels`` ``[B, H, W]``; the resize is bilinear with
``align_corners=True``. No tensor of full size and K classes exists, forward or backward. With n the bytes of float32
logits, the one pass forward reads the logits and the labels once and writes about 1.4 n of gradient sums (2 n at
factor 8, 9 n at 32, where n is tiny); backward reads those and writes the logits' gradient.
With ``z = resize(logits)`` and ``nll = -log(p_y)``:
``d_z = w_y (1 - p_y)^gamma (1 + gamma p_y nll / (1 - p_y)) (p - 1_y)``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels.common.backend import operator
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.losses import upsample_loss as shared
from dfn_kernels.losses import upsample_loss_triton as kernels
from dfn_kernels.losses.upsample_loss import Rule

OPERATOR = "upsample_cross_entropy"


def upsample_cross_entropy_ref(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    gamma: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The definition, in plain PyTorch and any dtype; arithmetic in float32 or better."""
    K = logits.shape[1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    z = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    labels = labels.long()
    valid = (labels != ignore_index) & (labels >= 0) & (labels < K)
    # One row a pixel: the two-dimensional form of nll_loss has no deterministic CUDA kernel.
    y = torch.where(valid, labels, 0).reshape(-1)
    nll = F.cross_entropy(z.permute(0, 2, 3, 1).reshape(-1, K), y, reduction="none").reshape(labels.shape)
    weight = valid.to(z.dtype) if class_weight is None else class_weight.to(z.dtype)[y].reshape(labels.shape) * valid
    if gamma:
        nll = (-torch.expm1(-nll)) ** gamma * nll
    if reduction == "none":
        return weight * nll
    total = (weight * nll).sum()
    return total / weight.sum().where(valid.any(), 1) if reduction == "mean" else total


def _softmax_chunk(
    z: Tensor, labels: Tensor, weight: Tensor, rule: Rule, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss ``[rows, 1, columns]`` of the logits z ``[rows, K, columns]``, which are overwritten, and their gradient."""
    z -= z.amax(1, keepdim=True)
    z_y = z.gather(1, labels)
    e = z.exp_()
    e_y = e.gather(1, labels)
    others = e.scatter_(1, labels, 0.0).sum(1, keepdim=True)
    total = others + e_y
    nll = total.log() - z_y
    q = others / total  # 1 - p_y, without cancellation
    if rule.gamma:
        power = q**rule.gamma
        slope = torch.where(q > 0, nll / q, 1.0)  # -log(1 - q) / q
        loss, factor = power * nll, weight * power * (1 + rule.gamma * (e_y / total) * slope)
    else:
        loss, factor = nll, weight
    loss = weight * loss
    if not need_grad:
        return loss, None
    e *= factor / total
    return loss, e.scatter_(1, labels, -q * factor)


@operator("upsample_cross_entropy")
def _upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    gamma: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient's sums and scale; ``pixel_weight`` ``[B, H, W]`` multiplies the loss of each pixel."""
    rule = Rule(sigmoid=False, alpha=0.0, gamma=gamma, ignore_index=ignore_index)
    return shared.forward(
        OPERATOR, _softmax_chunk, rule, logits, labels, class_weight, pixel_weight, reduction, need_grad
    )


@_upsample_cross_entropy.register_fake
def _(logits, labels, class_weight, pixel_weight, ignore_index, gamma, reduction, need_grad):
    return shared.forward_fake(False, logits, labels, reduction, need_grad)


def _setup_context(ctx, inputs, output):
    logits, labels, class_weight, _, ctx.ignore_index, ctx.gamma, reduction, _ = inputs
    shared.setup_context(ctx, False, output, reduction, logits, labels, class_weight)


def _backward(ctx, d_loss, *_):
    def from_pixels(d_loss, logits, labels, class_weight):
        return _upsample_cross_entropy(logits, labels, class_weight, d_loss, ctx.ignore_index, ctx.gamma, "sum", True)

    return shared.d_logits(ctx, d_loss, from_pixels), *[None] * 7


_upsample_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    gamma: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax loss of ``logits``, resized (bilinear, ``align_corners=True``) to the size of ``labels``; eq. 5, and
    with ``gamma > 0`` eq. 4 over K classes: ``-w_y (1 - p_y)^gamma log(p_y)``.

    ``logits``: ``[B, K, h, w]``, K from 2 to 256, channels_last (another layout is converted). ``labels``:
    ``[B, H, W]``, uint8, int32 or int64, in 0 ... K - 1; pixels of ``ignore_index`` do not count. Any other
    value does not count either; under ``DFN_KERNELS_DEBUG=1`` it raises a ValueError that names it.
    ``class_weight``: ``[K]``, a constant.
    ``reduction``: ``"mean"`` over the valid pixels, with ``class_weight`` divided by the sum of their weights as
    ``torch.nn.functional.cross_entropy`` does; ``"sum"``; ``"none"``, per pixel ``[B, H, W]``, 0 where ignored.
    A batch without a valid pixel gives 0 and zero gradients.

    Returns float32 (float64 for float64 logits) whatever autocast says; the gradient has the logits' dtype and is
    channels_last. It is computed in the forward pass: call under ``torch.no_grad()`` if you need only the loss. There
    are no second derivatives. Raises ValueError for wrong shapes, dtypes, devices and settings.
    """
    shared.check(OPERATOR, logits, labels, (logits.shape[0], None, None), reduction)
    K = logits.shape[1]
    if K < 2:
        raise ValueError(f"{OPERATOR} expects logits of at least 2 classes, got {list(logits.shape)}")
    shared.check_gamma(OPERATOR, gamma)
    if class_weight is not None and (
        class_weight.shape != (K,) or class_weight.device != logits.device or class_weight.requires_grad
    ):
        raise ValueError(
            f"{OPERATOR} expects class_weight [{K}] on {logits.device} and without a gradient, got "
            f"{list(class_weight.shape)} on {class_weight.device}, requires_grad={class_weight.requires_grad}"
        )
    need_grad = torch.is_grad_enabled() and logits.requires_grad and reduction != "none"
    loss, _, _ = _upsample_cross_entropy(
        logits, labels, class_weight, None, ignore_index, float(gamma), reduction, need_grad
    )
    return loss


def compile_cases() -> list[CompileCase]:
    """Every entry of the tables, every dtype, and each operand and setting that changes the kernel."""

    def case(classes: int = 21, gamma: float = 0.0, **settings: Any) -> CompileCase:
        return kernels.loss_case(classes, False, gamma, **settings)

    every = {"absent": ("pixel_loss_ptr",), "note": ", weights of classes and pixels"}
    return [
        *(case(classes, logits=dtype) for classes in (2, 4, 8) for dtype in ("*fp32", "*bf16")),
        *(case(classes) for classes in (16, 33, 128, 256)),
        *(case(logits=dtype, labels=labels) for dtype in ("*fp32", "*bf16", "*fp16") for labels in ("*u8", "*i64")),
        *(case(small=512 // factor, factor=factor, logits="*bf16") for factor in (1, 8, 16, 32, 512)),
        case(absent=(*kernels.POINTERS[2:4], "gradient_ptr"), note=", per pixel"),
        case(absent=(*kernels.POINTERS[2:5], "gradient_ptr"), note=", no gradient"),
        *(case(classes, gamma, labels="*i64", **every) for classes in (8, 21, 256) for gamma in (0.0, 2.0, 1.5)),
        *(kernels.collect_case(21, False, logits=dtype) for dtype in ("*fp32", "*bf16", "*fp16")),
        *(kernels.collect_case(classes, False) for classes in (2, 8, 16, 33, 128, 256)),
        *(kernels.collect_case(21, False, small=512 // factor, factor=factor) for factor in (8, 16, 32)),
        kernels.total_case(),
    ]
