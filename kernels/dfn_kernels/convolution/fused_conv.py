"""Convolution of an inference network: ``out = relu(conv(x, weight) + bias + residual)``, in one pass over ``out``.

Channels_last. On CUDA this is one call of cuDNN. On a CPU it is one call of oneDNN with the weight in oneDNN's own
layout, or Winograd's algorithm for 3x3 convolutions of many channels (:mod:`dfn_kernels.convolution.conv3x3`).
PyTorch's own convolution writes ``out``, then reads and writes it again for each of bias (on CUDA), residual and ReLU.
"""

import functools
import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels.common.backend import check_features, named_errors, nhwc, operator
from dfn_kernels.common.cpu import onednn_takes_bf16
from dfn_kernels.convolution import winograd
from dfn_kernels.convolution.conv3x3 import winograd_tile


def fused_conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, padding: int, relu: bool
) -> Tensor:
    """The definition, in plain PyTorch and any dtype."""
    out = F.conv2d(x, weight, bias, stride, padding)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


MOST_BYTES = 4  # that the layouts of a weight may take together, in its own bytes
MOST_SHAPES = 4096  # whose layout is remembered
_PADDING = 27  # a word of oneDNN's description that lies between two fields and is never written
_clock = itertools.count()


@dataclass
class Packed:
    """A weight's forms for the CPU, each made when it is first needed and then kept: memory for speed.

    oneDNN's layout depends on the input's shape, and a convolution in another shape's layout can take several times as
    long. Few shapes differ in it, so a layout is kept once for all of its shapes.
    """

    onednn: dict[bytes, Tensor] = field(default_factory=dict)  # by oneDNN's description of the layout
    layouts: dict[tuple[int, ...], bytes] = field(default_factory=dict)  # the description, by x's shape
    used: dict[bytes, int] = field(default_factory=dict)  # when a layout was last needed, in calls
    winograd: dict[int, Tensor] = field(default_factory=dict)


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    relu: bool = True,
    packed: Packed | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``. Bias, residual and ReLU are optional.

    Args:
        x: ``[B, I, H, W]``, float32, bfloat16, float16 or float64, converted to channels_last if it is not.
        weight: ``[O, I, k, k]``, x's dtype. bias: ``[O]``, x's dtype or, on a CPU with ``packed`` and without
            residual, float32. residual: of the output's shape, x's dtype.
        packed: the weight's forms for the CPU, made once. The caller keeps it beside a weight that does not change.

    Returns ``[B, O, h, w]``, channels_last. Sums are float32 or better and rounded once, or after each of the three
    steps if a device has no fused form. Not differentiable. Raises ValueError for other shapes, dtypes or devices.
    """
    exact_bias = x.device.type == "cpu" and packed is not None and residual is None
    bias_dtypes = (x.dtype, torch.float32) if exact_bias else (x.dtype,)
    _check(x, weight, bias, residual, stride, padding, bias_dtypes)
    return _run(x, weight, None if bias is None else bias.contiguous(), residual, stride, padding, relu, packed)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    bias_dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises ValueError; oneDNN and cuDNN do not check and would read past the end of a residual that is too small."""
    check_features("fused_conv", x=x, weight=weight)
    O, I, *kernel = weight.shape  # noqa: E741
    size = [(side + 2 * padding - k) // stride + 1 for side, k in zip(x.shape[2:], kernel, strict=True)]
    if x.shape[1] != I or O == 0 or min(size) < 1:
        raise ValueError(
            f"fused_conv expects weight [O, I, k, k] with x's channels and no larger than the padded x, got weight "
            f"{list(weight.shape)} and x {list(x.shape)} with padding {padding}"
        )
    shapes = {"bias": (O,), "residual": (x.shape[0], O, *size)}
    dtypes = {"bias": bias_dtypes, "residual": (x.dtype,)}
    for name, operand in (("bias", bias), ("residual", residual)):
        if operand is not None and (
            operand.shape != shapes[name] or operand.dtype not in dtypes[name] or operand.device != x.device
        ):
            expected = " or ".join(dict.fromkeys(map(str, dtypes[name])))
            raise ValueError(
                f"fused_conv expects {name} {list(shapes[name])} in {expected} on x's device ({x.device}), "
                f"got {list(operand.shape)} in {operand.dtype} on {operand.device}"
            )


@named_errors("fused_conv")
def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
    packed: Packed | None,
) -> Tensor:
    if x.device.type == "cuda" and torch.version.hip is None and x.dtype != torch.float64:
        if bias is not None and relu:
            return _cudnn(x, weight, bias, residual, stride, padding)
    elif x.device.type == "cpu" and packed is not None and not torch.compiler.is_compiling():
        return _on_cpu(nhwc(x), weight, bias, residual, stride, padding, relu, packed)
    return fused_conv_ref(x, weight, bias, residual, stride, padding, relu)


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
    packed: Packed,
) -> Tensor:
    if x.dtype == torch.bfloat16 and not onednn_takes_bf16():
        wide, addend = x.float(), None if residual is None else residual.float()
        bias = None if bias is None else bias.float()
        return _on_cpu(wide, weight, bias, addend, stride, padding, relu, packed).bfloat16()
    m = 0
    if weight.shape[2:] == (3, 3) and stride == padding == 1:
        m = winograd_tile(x, weight.shape[0], ahead=True)
    if m:
        if m not in packed.winograd:
            packed.winograd[m] = winograd.transform_weight(weight.to(x.dtype), m)
        out = winograd.convolve(x, packed.winograd[m], m, bias)
        out = out if residual is None else out.add_(residual)
        return out.relu_() if relu else out
    one_pixel = residual is not None and residual.shape[2:] == (1, 1)  # which the oneDNN of PyTorch 2.7 refuses
    if x.dtype not in (torch.float32, torch.bfloat16) or one_pixel or not torch.backends.mkldnn.is_available():
        bias = None if bias is None else bias.to(x.dtype)
        return fused_conv_ref(x, weight.to(x.dtype), bias, residual, stride, padding, relu)
    steps, pads, ones = [stride, stride], [padding, padding], [1, 1]
    own = _onednn_weight(x, weight, stride, padding, packed)
    last = "relu" if relu else "none"
    run = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return run(x, own, bias, pads, steps, ones, 1, last, [], "")
    last_or_none = "relu" if relu else None
    return run.binary(x, nhwc(residual), own, bias, pads, steps, ones, 1, "add", 1.0, last_or_none, [], "")


def _onednn_weight(x: Tensor, weight: Tensor, stride: int, padding: int, packed: Packed) -> Tensor:
    """The weight in oneDNN's layout for ``x``: kept, or made and kept in the place of those that were not needed."""
    shape = tuple(x.shape)
    layout = packed.layouts.get(shape, b"")
    own = packed.onednn.get(layout)
    if own is None:
        pads, steps, ones = [padding, padding], [stride, stride], [1, 1]
        dense = weight.to(x.dtype)
        own = torch.ops.mkldnn._reorder_convolution_weight(dense, pads, steps, ones, 1, list(shape))
        layout = _description(own, shape)
        own = packed.onednn.setdefault(layout, own)
        packed.layouts[shape] = layout
        _drop_oldest(packed, layout, MOST_BYTES * dense.nbytes)
    packed.used[layout] = next(_clock)
    return own


def _description(own: Tensor, shape: tuple[int, ...]) -> bytes:
    """Equal for two packed weights of one layout. Where oneDNN's words cannot be read, the shape stands for them."""
    read = getattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", None)
    if read is None:
        return repr(shape).encode()
    words = read(own).view(torch.int32).tolist()
    words[_PADDING] = 0
    return repr(words).encode()


def _drop_oldest(packed: Packed, newest: bytes, most_bytes: int) -> None:
    """Each step is one operation on a dictionary, as other threads may be at it too."""
    size = getattr(torch.ops.mkldnn, "_nbytes", lambda tensor: most_bytes // MOST_BYTES)
    while sum(int(size(tensor)) for tensor in list(packed.onednn.values())) > most_bytes:
        others = [layout for layout in list(packed.onednn) if layout != newest]
        if not others:
            break
        packed.onednn.pop(min(others, key=lambda layout: packed.used.get(layout, 0)), None)
    while len(packed.layouts) > MOST_SHAPES:
        packed.layouts.pop(list(packed.layouts)[0], None)  # noqa: RUF015  `next(iter())` fails if another thread adds one


# cuDNN's fused calls have no fake rule of their own, so torch.compile and torch.export could not trace them.
@operator("cudnn_conv_relu")
def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, padding: int) -> Tensor:
    x, weight = nhwc(x), nhwc(weight)
    steps, pads, ones = [stride, stride], [padding, padding], [1, 1]
    if residual is not None:
        add = torch.ops.aten.cudnn_convolution_add_relu
        return add(x, weight, nhwc(residual), 1.0, bias, steps, pads, ones, 1)
    if _relu_ignores_memory(x.device, x.dtype):
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, steps, pads, ones, 1)
    return nhwc(F.conv2d(x, weight, bias, stride, padding)).relu_()


@_cudnn.register_fake
def _(x, weight, bias, residual, stride, padding):
    height, width = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:])
    return x.new_empty((x.shape[0], weight.shape[0], height, width)).to(memory_format=torch.channels_last)


@functools.cache
def _relu_ignores_memory(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN's convolution with bias and ReLU is right whatever its output's memory held before.

    PyTorch passes that memory as an addend with factor 0, and 0 times nan is nan. Tested once for each device and
    dtype, by a call on memory full of nan. The test waits for the device, so it must precede any graph capture.
    """
    x = torch.ones((1, 64, 16, 16), device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.full((64, 64, 3, 3), 1 / 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    bias = torch.zeros(64, device=device, dtype=dtype)
    for _ in range(4):
        poison = [torch.full_like(x, float("nan")) for _ in range(4)]
        del poison  # the allocator gives the same memory to the next tensor of that size
        out = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
        if not torch.isfinite(out).all():
            return False
    return True
