"""Channel attention block: ``out = low * gate + resize(high)`` with
``gate = sigmoid(fc2(relu(fc1(mean over pixels of [low, resize(high)]))))``, bilinear with ``align_corners=True``
(Yu et al., CVPR 2018, section 3.1, eq. 3).

``low`` and ``out`` are ``[B, C, H, W]``, ``high`` ``[B, C, h, w]``, channels_last; h and w may be anything. Two passes
forward, pooling and output; two backward, the gate's gradient and both inputs'.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels.attention import channel_attention_triton as kernels
from dfn_kernels.attention import upsample_add_triton as _upsample_add_triton
from dfn_kernels.attention.upsample_add import check_offsets, check_pair, resize_bwd_torch, resize_torch
from dfn_kernels.common.backend import DTYPES, accumulator, debugging, full_precision, nhwc, operator, use_triton
from dfn_kernels.common.compile_cases import CompileCase

Gradients = kernels.Gradients  # of low, high, fc1_weight, fc1_bias, fc2_weight and fc2_bias


def channel_attention_ref(
    low: Tensor, high: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """The definition, in plain PyTorch and any dtype; the linear layers run in their weights' dtype."""
    high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
    mean = torch.cat([low, high], dim=1).mean((2, 3)).to(fc1_weight.dtype)
    gate = F.linear(F.relu(F.linear(mean, fc1_weight, fc1_bias)), fc2_weight, fc2_bias).sigmoid()
    return low * gate.to(low.dtype)[:, :, None, None] + high


def _mean_weights(small: tuple[int, int], full: torch.Size, like: Tensor) -> Tensor:
    """``[1, 1, h, w]``: the weight of each pixel of ``small`` in the mean over the resized ``full`` pixels."""
    mean = torch.full((1, 1, *full), 1 / full.numel(), dtype=torch.float64, device=like.device)
    return resize_bwd_torch(mean, small).to(like.dtype)


def _pixel_sums(x: Tensor, acc: torch.dtype, y: Tensor | None = None) -> Tensor:
    """Sums over pixels of x, or of x * y, ``[B, C]``: a few images at a time, to keep temporary tensors small."""
    if y is None and x.dtype == acc:
        return x.sum((2, 3))
    images = max(1, 2**20 // x.shape[1:].numel())
    pairs = zip(x.split(images), (x if y is None else y).split(images), strict=True)
    return torch.cat([(a.to(acc) if y is None else a.to(acc) * b.to(acc)).sum((2, 3)) for a, b in pairs])


def _forward_torch(
    low: Tensor, high: Tensor, parameters: tuple[Tensor, ...], acc: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.forward in plain PyTorch, without another tensor of out's size."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (x.to(acc) for x in parameters)
    out = resize_torch(high, low)
    mean = torch.cat([_pixel_sums(low, acc), _pixel_sums(out, acc)], dim=1).div_(low.shape[2:].numel())
    with full_precision(low.device):
        hidden = torch.addmm(fc1_bias, mean, fc1_weight.t()).relu_()
        gate = torch.addmm(fc2_bias, hidden, fc2_weight.t()).sigmoid_()
    out.addcmul_(low, gate.to(low.dtype)[:, :, None, None])
    return out, mean, hidden, gate


def _backward_torch(
    d_out: Tensor,
    low: Tensor,
    size: tuple[int, int],
    vectors: Sequence[Tensor],
    weights: tuple[Tensor, Tensor],
) -> Gradients:
    """kernels.backward in plain PyTorch."""
    mean, hidden, gate = vectors
    dtype, acc = weights[0].dtype, gate.dtype
    fc1_weight, fc2_weight = (x.to(acc) for x in weights)
    d_gate = _pixel_sums(d_out, acc, low) * gate * (1 - gate)  # of the sigmoid's argument
    with full_precision(low.device):
        d_hidden = (d_gate @ fc2_weight).mul_(hidden > 0)  # of the ReLU's argument
        d_mean_low, d_mean_high = (d_hidden @ fc1_weight).chunk(2, dim=1)
        d_parameters = d_hidden.t() @ mean, d_hidden.sum(0), d_gate.t() @ hidden, d_gate.sum(0)
    d_low = torch.empty_like(low, memory_format=torch.channels_last)
    share, gate = (x.to(low.dtype)[:, :, None, None] for x in (d_mean_low / low.shape[2:].numel(), gate))
    torch.addcmul(share, d_out, gate, out=d_low)
    d_high = resize_bwd_torch(d_out, size)
    d_high += (_mean_weights(size, low.shape[2:], d_mean_high) * d_mean_high[:, :, None, None]).to(low.dtype)
    d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias = (x.to(dtype) for x in d_parameters)
    return d_low, d_high, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias


def _check(low: Tensor, high: Tensor, parameters: dict[str, Tensor]) -> None:
    check_pair("channel_attention", low, high)
    C = low.shape[1]
    shapes = {"fc1_weight": (C, 2 * C), "fc1_bias": (C,), "fc2_weight": (C, C), "fc2_bias": (C,)}
    first = parameters["fc1_weight"]
    for name, x in parameters.items():
        if x.shape != shapes[name]:
            raise ValueError(
                f"channel_attention expects {name} {list(shapes[name])} for {C} channels, got {list(x.shape)}"
            )
        if x.dtype not in DTYPES or x.dtype != first.dtype or x.device != low.device:
            raise ValueError(
                f"channel_attention expects {name} floating-point, like fc1_weight ({first.dtype}), on low's device "
                f"({low.device}), got {x.dtype} on {x.device}"
            )


@operator("channel_attention")
def _channel_attention(
    low: Tensor, high: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and for the backward pass mean, hidden and gate."""
    return _forward(low, high, (fc1_weight, fc1_bias, fc2_weight, fc2_bias))


def _forward(low: Tensor, high: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = _forward_torch
    if use_triton(low):
        check_offsets("channel_attention", low, *high.shape[2:])
        forward = kernels.forward
    acc = accumulator(torch.promote_types(low.dtype, parameters[0].dtype))
    return forward(nhwc(low), nhwc(high), tuple(x.contiguous() for x in parameters), acc)


@_channel_attention.register_fake
def _(low, high, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    acc = accumulator(torch.promote_types(low.dtype, fc1_weight.dtype))
    B, C = low.shape[:2]
    vectors = (low.new_empty((B, width), dtype=acc) for width in (2 * C, C, C))
    return torch.empty_like(low, memory_format=torch.channels_last), *vectors


@operator("channel_attention_bwd")
def _channel_attention_bwd(
    d_out: Tensor,
    low: Tensor,
    mean: Tensor,
    hidden: Tensor,
    gate: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    small_height: int,
    small_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of low, high and the four parameters."""
    backward = kernels.backward if use_triton(low) else _backward_torch
    weights = (fc1_weight.contiguous(), fc2_weight.contiguous())
    return backward(nhwc(d_out), nhwc(low), (small_height, small_width), (mean, hidden, gate), weights)


@_channel_attention_bwd.register_fake
def _(d_out, low, mean, hidden, gate, fc1_weight, fc2_weight, small_height, small_width):
    d_low = torch.empty_like(low, memory_format=torch.channels_last)
    shape = (*low.shape[:2], small_height, small_width)
    d_high = torch.empty(shape, dtype=low.dtype, device=low.device, memory_format=torch.channels_last)
    d_fc1, d_fc2 = fc1_weight.new_empty(fc1_weight.shape), fc2_weight.new_empty(fc2_weight.shape)
    d_bias = fc1_weight.new_empty(fc1_weight.shape[:1])
    return d_low, d_high, d_fc1, d_bias, d_fc2, torch.empty_like(d_bias)


def _setup_context(ctx, inputs, output):
    low, high, fc1_weight, _, fc2_weight, _ = inputs
    ctx.size = high.shape[2:]
    ctx.save_for_backward(low, *output[1:], fc1_weight, fc2_weight)


def _backward(ctx, d_out, *d_vectors):
    return _channel_attention_bwd(d_out, *ctx.saved_tensors, *ctx.size)


_channel_attention.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The plain PyTorch path outside a graph. For small features, calling a custom operator would cost more than the
    whole computation."""

    @staticmethod
    def forward(ctx, low: Tensor, high: Tensor, *parameters: Tensor) -> Tensor:
        output = _forward(low, high, parameters)
        _setup_context(ctx, (low, high, *parameters), output)
        return output[0]

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Gradients:
        low, *vectors, fc1_weight, fc2_weight = ctx.saved_tensors
        weights = (fc1_weight.contiguous(), fc2_weight.contiguous())
        return _backward_torch(nhwc(d_out), nhwc(low), ctx.size, vectors, weights)


def channel_attention(
    low: Tensor, high: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """The channel attention block: ``low * gate + resize(high)``, the gate from the means of both.

    Args:
        low: ``[B, C, H, W]``, float32, bfloat16, float16 or float64; channels_last, or converted to it.
        high: ``[B, C, h, w]``, low's dtype and device, resized bilinearly with ``align_corners=True``; any h and w.
        fc1_weight, fc1_bias: ``[C, 2C]`` and ``[C]``, of any floating-point dtype: under autocast features may be
            bfloat16 and parameters float32.
        fc2_weight, fc2_bias: ``[C, C]`` and ``[C]``, fc1's dtype.

    Returns ``[B, C, H, W]`` in low's dtype, channels_last. Means, linear layers and gate are float32, under autocast
    too (float64 if features or parameters are float64). Differentiable once, gradients in each input's dtype.
    Raises ValueError for other shapes, dtypes or devices.
    """
    parameters = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    _check(low, high, parameters)
    if torch.compiler.is_compiling() or use_triton(low) or debugging():
        return _channel_attention(low, high, fc1_weight, fc1_bias, fc2_weight, fc2_bias)[0]
    return _Eager.apply(low, high, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def compile_cases() -> list[CompileCase]:
    """Every kernel with every entry of its tables."""
    return kernels.compile_cases() + _upsample_add_triton.compile_cases(gated=True)
