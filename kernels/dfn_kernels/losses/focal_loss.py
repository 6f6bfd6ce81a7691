"""Sigmoid focal loss of resized logits, ``-alpha_t (1 - p_t)^gamma log(p_t)`` with ``p = sigmoid(resize(logits))``:
DFN's border loss (Yu et al., CVPR 2018, eq. 4), which is RetinaNet's (Lin et al., ICCV 2017, eq. 5).

``logits`` are ``[B, C, h, w]`` in channels_last, ``targets`` ``[B, H, W]`` for one channel or ``[B, C, H, W]``; the
resize is bilinear with ``align_corners=True``. No floating-point tensor of full size exists, forward or backward.
With n the bytes of float32 logits, the one pass forward reads the logits and the targets once and writes about 1.9 n of
gradient sums; backward reads those and writes the logits' gradient.
With ``z`` the logit of the true side, ``log(p_t) = logsigmoid(z)`` and ``q = 1 - p_t = sigmoid(-z)`` stay finite for
every z, and ``d_z = -alpha_t q^gamma (gamma p_t nll + q)``, ``nll = -log(p_t)``.
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

OPERATOR = "upsample_focal_loss"


def upsample_focal_loss_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """The definition, in plain PyTorch and any dtype; arithmetic in float32 or better."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    z = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=True).reshape(targets.shape)
    valid = ((targets == 0) | (targets == 1)) & (targets.long() != ignore_index)
    z = torch.where(targets == 1, z, -z)  # logit of the true side
    alpha_t = torch.full_like(z, 1.0 - alpha).masked_fill(targets == 1, alpha)
    loss = -alpha_t * torch.sigmoid(-z) ** gamma * F.logsigmoid(z) * valid
    if reduction == "none":
        return loss
    return loss.sum() / valid.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def _sigmoid_chunk(
    z: Tensor, targets: Tensor, weight: Tensor, rule: Rule, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of the logits z ``[rows, C, columns]`` and their gradient; all are of one shape and dtype."""
    factor = (targets * (2 * rule.alpha - 1)).add_(1 - rule.alpha).mul_(weight)
    sign = (targets * -2).add_(1)
    z = z * sign  # logit of the wrong side
    q = torch.sigmoid(z)  # 1 - p_t
    nll = F.softplus(z, threshold=40)  # -log(p_t)
    if rule.gamma:
        factor *= q**rule.gamma
    if not need_grad:
        return nll.mul_(factor), None
    slope = torch.addcmul(q, torch.sigmoid(z.neg_()), nll, value=rule.gamma)
    return nll.mul_(factor), slope.mul_(factor).mul_(sign).contiguous()


@operator("upsample_focal_loss")
def _upsample_focal_loss(
    logits: Tensor,
    targets: Tensor,
    pixel_weight: Tensor | None,
    alpha: float,
    gamma: float,
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient's sums and scale; ``pixel_weight``, like targets, multiplies the loss of each pixel."""
    rule = Rule(sigmoid=True, alpha=alpha, gamma=gamma, ignore_index=ignore_index)
    return shared.forward(OPERATOR, _sigmoid_chunk, rule, logits, targets, None, pixel_weight, reduction, need_grad)


@_upsample_focal_loss.register_fake
def _(logits, targets, pixel_weight, alpha, gamma, ignore_index, reduction, need_grad):
    return shared.forward_fake(True, logits, targets, reduction, need_grad)


def _setup_context(ctx, inputs, output):
    logits, targets, _, ctx.alpha, ctx.gamma, ctx.ignore_index, reduction, _ = inputs
    shared.setup_context(ctx, True, output, reduction, logits, targets)


def _backward(ctx, d_loss, *_):
    def from_pixels(d_loss, logits, targets):
        return _upsample_focal_loss(logits, targets, d_loss, ctx.alpha, ctx.gamma, ctx.ignore_index, "sum", True)

    return shared.d_logits(ctx, d_loss, from_pixels), *[None] * 7


_upsample_focal_loss.register_autograd(_backward, setup_context=_setup_context)


def upsample_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid focal loss (eq. 4) of ``logits``, resized (bilinear, ``align_corners=True``) to the size of ``targets``:
    ``-alpha_t (1 - p_t)^gamma log(p_t)``, ``p_t`` the probability of the true side, ``alpha_t`` ``alpha`` where the
    target is 1 and ``1 - alpha`` where it is 0. Finite for every finite logit, in half precision too.

    ``logits``: ``[B, C, h, w]``, C up to 256, channels_last (another layout is converted). ``targets``: ``[B, H, W]``
    for one channel or ``[B, C, H, W]``, uint8, int32 or int64, in {0, 1}; ``ignore_index`` does not count. Any other
    value does not count either; under ``DFN_KERNELS_DEBUG=1`` it raises a ValueError that names it.
    ``reduction``: ``"mean"`` over the valid targets, 0 with zero gradients if there is none; ``"sum"``; ``"none"``,
    shaped like targets, 0 where ignored.

    Returns float32 (float64 for float64 logits) whatever autocast says; the gradient has the logits' dtype and is
    channels_last. It is computed in the forward pass: call under ``torch.no_grad()`` if you need only the loss. There
    are no second derivatives. Raises ValueError for wrong shapes, dtypes, devices and settings.
    """
    B, C = logits.shape[:2] if logits.ndim == 4 else (None, None)
    shape = (B, None, None) if C == 1 and targets.ndim == 3 else (B, C, None, None)
    shared.check(OPERATOR, logits, targets, shape, reduction)
    shared.check_gamma(OPERATOR, gamma)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{OPERATOR} expects alpha between 0 and 1, got {alpha}")
    need_grad = torch.is_grad_enabled() and logits.requires_grad and reduction != "none"
    loss, _, _ = _upsample_focal_loss(
        logits, targets, None, float(alpha), float(gamma), ignore_index, reduction, need_grad
    )
    return loss


def compile_cases() -> list[CompileCase]:
    """Every entry of the tables, every dtype, and each operand and setting that changes the kernel."""

    def case(channels: int = 1, gamma: float = 2.0, **settings: Any) -> CompileCase:
        return kernels.loss_case(channels, True, gamma, **settings)

    every = {"labels": "*i64", "absent": ("class_weight_ptr", "pixel_loss_ptr"), "note": ", weights of pixels"}
    return [
        *(case(logits=dtype, labels=labels) for dtype in ("*fp32", "*bf16", "*fp16") for labels in ("*u8", "*i64")),
        *(case(small=512 // factor, factor=factor) for factor in (1, 8, 16, 32, 512)),
        *(case(channels) for channels in (2, 4, 8, 16, 33, 128, 256)),
        case(absent=("class_weight_ptr", "pixel_weight_ptr", "gradient_ptr"), note=", per pixel"),
        case(absent=("class_weight_ptr", "pixel_weight_ptr", "pixel_loss_ptr", "gradient_ptr"), note=", no gradient"),
        *(case(channels, gamma, **every) for channels in (1, 8, 21, 256) for gamma in (0.0, 1.5)),
        *(kernels.collect_case(1, True, logits=dtype) for dtype in ("*fp32", "*bf16", "*fp16")),
    ]
