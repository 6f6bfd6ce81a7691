"""Exact savings inside DFN's blocks: fewer operations, the same results up to rounding, the same parameters.

Each function runs a block of :mod:`dfn_fast.network.blocks` with the block's own parameters, so that gradients,
optimiser and ``state_dict`` see the published shapes. Weights are composed in float32 or better, even under autocast.
They are for blocks as built; :mod:`dfn_fast.network.structure` tells which are.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dfn_fast.network.blocks import Head, RefinementResidualBlock, SqueezeGate
from dfn_fast.network.structure import is_batch_norm
from dfn_kernels import conv3x3
from dfn_kernels.common.backend import full_precision

TENSOR_CORE_CHANNELS = 8  # a GPU's tensor cores want channel counts that are multiples of this, in half precision


@dataclass(frozen=True)
class Savings:
    """The optimisations of :class:`dfn_fast.network.fast.FastDFN`. They change speed and memory, but not results."""

    channel_attention: bool = True  # a CAB as one operator; off: resize, concatenate, pool, gate, add
    upsample_add: bool = True  # a resize and an addition as one operator
    fused_losses: bool = True  # losses of the small scores; off: of scores at the image's size
    composed_rrb: bool = True  # conv3x3(conv1x1(x)) as one conv3x3, if x has few channels
    composed_head: bool = True  # a head's last 1x1 convolution as part of the 3x3 convolution before it
    winograd: bool = True  # 3x3 convolutions of many channels by Winograd's algorithm, on a CPU
    one_head: bool = True  # in inference, only the head whose scores are returned
    pad_channels_to: int | None = None  # inside heads and Border Network; None: 8 on a GPU, else 1

    @classmethod
    def none(cls) -> "Savings":
        """Savings with every switch off."""
        return cls(False, False, False, False, False, False, False, 1)

    def conv3x3(self, x: Tensor, weight: Tensor) -> Tensor:
        """A 3x3 convolution with padding 1."""
        return conv3x3(x, weight) if self.winograd else F.conv2d(x, weight, padding=1)

    def padded(self, channels: int, like: Tensor) -> int:
        """``channels``, rounded up to the multiple that the device of ``like`` wants."""
        multiple = self.pad_channels_to or (TENSOR_CORE_CHANNELS if like.is_cuda else 1)
        return round_up(channels, multiple)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pad(weight: Tensor, *size: int) -> Tensor:
    """``weight`` with its first dimensions padded with zeros up to ``size``; unchanged if it has that size."""
    missing = [n - weight.shape[i] for i, n in enumerate(size)]
    if not any(missing):
        return weight
    return F.pad(weight, [0] * (2 * (weight.ndim - len(size))) + [x for n in reversed(missing) for x in (0, n)])


def compose(after: Tensor, before: Tensor) -> Tensor:
    """The weight of ``conv(conv1x1(x, before), after)`` as one convolution.

    ``after`` is ``[O, M, k, k]``, ``before`` ``[M, I, 1, 1]``. This is exact with zero padding too, because the 1x1
    convolution has no bias. The result is channels_last.
    """
    with full_precision(after.device):
        return (after.permute(0, 2, 3, 1) @ before.flatten(1)).permute(0, 3, 1, 2)


def compose_last(last: Tensor, before: Tensor) -> Tensor:
    """The weight of ``conv1x1(conv(x, before), last)`` as one convolution.

    ``last`` is ``[O, M, 1, 1]``, ``before`` ``[M, I, k, k]``.
    """
    with full_precision(last.device):
        rows = before.permute(0, 2, 3, 1)  # [M, k, k, I]
        return (last.flatten(1) @ rows.flatten(1)).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)


def pays(pixels: int, saved: int, products: int) -> bool:
    """Whether ``saved`` multiplications per pixel are more than the ``products`` that composing costs, forward and
    backward alike."""
    return pixels * saved > products


def _pixels_of(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm layer to x ``[B, C, H, W]``. Channels beyond the layer's own are zeros and stay zeros."""
    weight = getattr(layer, "weight", None)
    channels = weight.shape[0] if isinstance(weight, Tensor) else x.shape[1]
    if channels == x.shape[1]:
        return layer(x)
    names = ("weight", "bias", "running_mean", "running_var")
    own = {name: getattr(layer, name) for name in names if getattr(layer, name) is not None}
    padded = {name: pad(tensor, x.shape[1]) for name, tensor in own.items()}
    x = functional_call(layer, padded, (x,))
    if layer.training:
        for name in ("running_mean", "running_var"):
            if name in own:
                own[name].copy_(padded[name][:channels])
    return x


def can_pad(layer: nn.Module) -> bool:
    """Whether channels of zeros change nothing for the others: true for a batch norm; a group norm mixes channels."""
    return is_batch_norm(layer)


def refine(block: RefinementResidualBlock, x: Tensor, width: int, savings: Savings) -> tuple[Tensor, Tensor]:
    """The first half of an RRB at ``width`` channels: ``conv1x1(x)`` and ``relu(bn(conv3x3(conv1x1(x))))``."""
    before, conv = pad(block.conv_1x1.weight, width, x.shape[1]), pad(block.cbr.conv.weight, width, width)
    inputs = x.shape[1]
    shortcut = F.conv2d(x, before)
    if savings.composed_rrb and pays(_pixels_of(x), 9 * width * (width - inputs), 9 * width * width * inputs):
        t = savings.conv3x3(x, compose(conv, before))
    else:
        t = savings.conv3x3(shortcut, conv)
    return shortcut, F.relu(norm(block.cbr.bn, t), inplace=True)


def rrb(block: RefinementResidualBlock, x: Tensor, savings: Savings, *, padded: bool = False) -> Tensor:
    """An RRB. If ``padded``, its channels may be padded with zeros, and those of x too."""
    channels = block.conv_refine.weight.shape[0]
    width = savings.padded(channels, x) if padded and can_pad(block.cbr.bn) and block.cbr.bn.affine else channels
    shortcut, t = refine(block, x, width, savings)
    x = savings.conv3x3(t, pad(block.conv_refine.weight, width, width)) + shortcut
    return F.relu(x, inplace=True) if block.last_relu else x


def head_scores(head: Head, x: Tensor, savings: Savings) -> Tensor:
    """A head's scores at the size of x. The shortcut's share is ``conv1x1`` of a tensor that the RRB has anyway."""
    block, last, bias = head.rrb, head.conv.weight, head.conv.bias
    scores, hidden = last.shape[:2]
    padding = can_pad(block.cbr.bn) and block.cbr.bn.affine
    width = savings.padded(hidden, x) if padding else hidden
    shortcut, t = refine(block, x, width, savings)
    last = pad(last, savings.padded(scores, x) if padding else scores, width)
    bias = None if bias is None else pad(bias, last.shape[0])
    conv = pad(block.conv_refine.weight, width, width)
    outputs = last.shape[0]
    if savings.composed_head and pays(_pixels_of(x), 9 * width * (width - outputs), 9 * outputs * width * width):
        x = savings.conv3x3(t, compose_last(last, conv)) + F.conv2d(shortcut, last, bias)
    else:
        x = F.conv2d(savings.conv3x3(t, conv) + shortcut, last, bias)
    return x[:, :scores]


def gate_parameters(gate: SqueezeGate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights and biases of both linear layers of a gate, as ``dfn_kernels.channel_attention`` takes them."""
    first, second = gate.fc[0], gate.fc[2]
    return first.weight, first.bias, second.weight, second.bias  # type: ignore[return-value]
