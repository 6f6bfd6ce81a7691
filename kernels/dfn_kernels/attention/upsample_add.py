"""Upsample and add: ``out = low + resize(high)``, bilinear with ``align_corners=True``; with a gate it is the last
step of a channel attention block, ``out = low * gate + resize(high)``.

``low`` and ``out`` are ``[B, C, H, W]``, ``high`` ``[B, C, h, w]``, channels_last; h and w may be anything, also larger
than H and W. One pass each way. Gradients are gathered: each small pixel adds its full-size pixels in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels.attention import upsample_add_triton as kernels
from dfn_kernels.common.backend import check_features, debugging, nhwc, operator, use_triton
from dfn_kernels.common.compile_cases import CompileCase


def upsample_add_ref(low: Tensor, high: Tensor) -> Tensor:
    """The definition, in plain PyTorch and any dtype."""
    return low + _resize(high, low.shape[2:])


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check_offsets(operator: str, full: Tensor, small_height: int, small_width: int) -> None:
    """Raises ValueError if coordinates, or offsets within eight rows, would not fit 32 bits. Images, and the tensor,
    may be larger. Call it with real sizes: symbolic ones would each add a guard to the graph."""
    C, H, W = full.shape[1:]
    if max(2 * H * small_height, 2 * W * small_width, 8 * W * C) >= 2**31:
        raise ValueError(
            f"{operator} expects H * h and W * w below 2^30 and W * C below 2^28, "
            f"got {H} x {W} from {small_height} x {small_width} with {C} channels"
        )


def check_pair(operator: str, low: Tensor, high: Tensor) -> None:
    """Raises ValueError unless low and high are features of one batch, channels, dtype and device."""
    check_features(operator, low=low, high=high)
    if low.shape[:2] != high.shape[:2]:
        raise ValueError(
            f"{operator} expects high [B, C, h, w] with the B and C of low, "
            f"got high {list(high.shape)} and low {list(low.shape)}"
        )


def resize_torch(high: Tensor, like: Tensor) -> Tensor:
    """high at the size of ``like``, in a new channels_last tensor, in plain PyTorch."""
    out = torch.empty_like(like, memory_format=torch.channels_last)
    return torch.ops.aten.upsample_bilinear2d.out(high, list(like.shape[2:]), True, out=out)


def resize_bwd_torch(d_out: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of high of ``size`` (h, w), in plain PyTorch, in a new channels_last tensor."""
    shape = [*d_out.shape[:2], *size]
    d_high = torch.empty(shape, dtype=d_out.dtype, device=d_out.device, memory_format=torch.channels_last)
    full = list(d_out.shape[2:])
    return torch.ops.aten.upsample_bilinear2d_backward.grad_input(d_out, full, shape, True, grad_input=d_high)


@operator("upsample_add")
def _upsample_add(low: Tensor, high: Tensor) -> Tensor:
    if use_triton(low):
        check_offsets("upsample_add", low, *high.shape[2:])
        return kernels.forward(nhwc(low), nhwc(high))
    return resize_torch(nhwc(high), low).add_(low)


@_upsample_add.register_fake
def _(low, high):
    return torch.empty_like(low, memory_format=torch.channels_last)


@operator("upsample_add_bwd")
def _upsample_add_bwd(d_out: Tensor, small_height: int, small_width: int) -> Tensor:
    d_out, size = nhwc(d_out), (small_height, small_width)
    return kernels.backward(d_out, size)[1] if use_triton(d_out) else resize_bwd_torch(d_out, size)


@_upsample_add_bwd.register_fake
def _(d_out, small_height, small_width):
    shape = (*d_out.shape[:2], small_height, small_width)
    return torch.empty(shape, dtype=d_out.dtype, device=d_out.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    ctx.size = inputs[1].shape[2:]


def _backward(ctx, d_out):
    d_out = nhwc(d_out)
    return d_out, _upsample_add_bwd(d_out, *ctx.size) if ctx.needs_input_grad[1] else None


_upsample_add.register_autograd(_backward, setup_context=_setup_context)


def upsample_add(low: Tensor, high: Tensor) -> Tensor:
    """``low + resize(high)`` in one pass, ``high`` resized bilinearly with ``align_corners=True`` to low's size.

    Args:
        low: ``[B, C, H, W]``, float32, bfloat16, float16 or float64; channels_last, or converted to it.
        high: ``[B, C, h, w]``, low's dtype and device; any h and w.

    Returns ``[B, C, H, W]`` in low's dtype, channels_last. Sums are float32 (float64 for float64). Autocast changes
    nothing: the features keep their dtype. Differentiable once; gradients in low's dtype, and channels_last (in plain
    PyTorch, in the layout of the output's gradient). Raises ValueError for other shapes, dtypes or devices.
    """
    check_pair("upsample_add", low, high)
    if torch.compiler.is_compiling() or use_triton(low) or debugging():
        return _upsample_add(low, high)
    # Outside a graph, use PyTorch's own operators: for small features, calling a custom operator would cost more.
    low, resized = nhwc(low), _resize(nhwc(high), low.shape[2:])
    # In place it is a fifth faster in float32, and a third slower in half precision.
    in_place = resized.element_size() > 2 and resized.is_contiguous(memory_format=torch.channels_last)
    return resized.add_(low) if in_place else low + resized


def compile_cases() -> list[CompileCase]:
    """Both kernels with every entry of their tables."""
    return kernels.compile_cases()
