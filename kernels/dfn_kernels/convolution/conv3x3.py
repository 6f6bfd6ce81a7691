"""3x3 convolution with stride 1 and padding 1: three quarters of DFN's arithmetic.

``out[b, o, y, x] = sum over i, r, s of weight[o, i, r, s] * in[b, i, y + r - 1, x + s - 1]``, zeros outside,
channels_last. On a CPU convolutions of many channels use Winograd's minimal filtering: 4 times fewer multiplications in
float32, 2.25 times fewer in bfloat16, forward and both gradients. Elsewhere, and for few channels or pixels, PyTorch's
own convolution runs: cuDNN chooses among such algorithms itself. Winograd's workspace of 64 MB stays in the process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.common.backend import AUTOCAST_DEVICES, DTYPES, check_features, debugging, nhwc, operator
from dfn_kernels.common.cpu import has_amx
from dfn_kernels.convolution import winograd


def conv3x3_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, in plain PyTorch and any dtype."""
    return F.conv2d(x, weight, padding=1)


# Asked once, at import: torch.compile cannot trace the call.
MATRIX_UNITS = has_amx()
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def winograd_tile(x: Tensor, out_channels: int, *, ahead: bool = False) -> int:
    """The side of the fastest tiles for ``x`` ``[B, C, H, W]``, or 0 if PyTorch's own convolution is faster.

    ``ahead``: the weight is transformed once beforehand, not in each call.
    """
    if x.device.type != "cpu":
        return 0
    name = NAMES[x.dtype]
    return tuning.winograd_tile(tuple(x.shape), out_channels, name, ahead=ahead, matrix_units=MATRIX_UNITS)


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    m = winograd_tile(x, weight.shape[0])
    if not m:
        return nhwc(F.conv2d(nhwc(x), weight, padding=1))
    return winograd.convolve(x, winograd.transform_weight(weight, m, keep=False), m)


@operator("conv3x3")
def _conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    return _forward(x, weight)


@_conv3x3.register_fake
def _(x, weight):
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@operator("conv3x3_bwd_input")
def _bwd_input(d_out: Tensor, weight: Tensor) -> Tensor:
    # The spatially flipped weight takes every output pixel back to its input pixels.
    return _forward(d_out, weight.flip(2, 3).transpose(0, 1))


@_bwd_input.register_fake
def _(d_out, weight):
    shape = (d_out.shape[0], weight.shape[1], *d_out.shape[2:])
    return d_out.new_empty(shape).to(memory_format=torch.channels_last)


@operator("conv3x3_bwd_weight")
def _bwd_weight(x: Tensor, d_out: Tensor) -> Tensor:
    m = winograd_tile(x, d_out.shape[1])
    if m:
        return nhwc(winograd.weight_gradient(x, d_out, m))
    shape = (d_out.shape[1], x.shape[1], 3, 3)
    return nhwc(torch.nn.grad.conv2d_weight(nhwc(x), shape, nhwc(d_out), padding=1))


@_bwd_weight.register_fake
def _(x, d_out):
    return x.new_empty((d_out.shape[1], x.shape[1], 3, 3)).to(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out):
    x, weight = ctx.saved_tensors
    d_x = _bwd_input(d_out, weight) if ctx.needs_input_grad[0] else None
    return d_x, _bwd_weight(x, d_out) if ctx.needs_input_grad[1] else None


_conv3x3.register_autograd(_backward, setup_context=_setup_context)


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """``conv2d(x, weight, padding=1)``, by the algorithm that is fastest for these shapes on this device.

    Args:
        x: ``[B, I, H, W]``, float32, bfloat16, float16 or float64, of any layout.
        weight: ``[O, I, 3, 3]``.

    Returns ``[B, O, H, W]``, channels_last by Winograd's algorithm, otherwise as ``conv2d`` lays it out. Differentiable
    once, in both. Autocast casts both to the lower precision, as for ``conv2d``. In float32 Winograd's algorithm rounds
    by some 2e-6 of the largest value, PyTorch's own by 2e-7 to 2e-6. Raises ValueError for other shapes, dtypes or
    devices.
    """
    if weight.ndim != 4 or len(weight) == 0 or weight.shape[1:] != (x.shape[1] if x.ndim == 4 else -1, 3, 3):
        raise ValueError(
            "conv3x3 expects x [B, I, H, W] and weight [O, I, 3, 3], all but B at least 1, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    kind = x.device.type
    if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    check_features("conv3x3", x=x, weight=weight)
    if not winograd_tile(x, weight.shape[0]) and not debugging():
        return F.conv2d(x, weight, padding=1)
    return _conv3x3(x, weight)
