"""The blocks of FusedDFN, with their weights folded and composed once; a block that was changed is kept as it is.

Batch norms are folded into the convolutions before them, in float64. Convolution, bias, ReLU and residual are one call
(:func:`dfn_kernels.fused_conv`). The savings of :mod:`dfn_fast.network.savings` are applied to the weights.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast.network.backbone import BasicBlock, Bottleneck, ResNet
from dfn_fast.network.blocks import Head, RefinementResidualBlock, SqueezeGate, resize
from dfn_fast.network.savings import can_pad, compose, compose_last, gate_parameters, pad, round_up
from dfn_fast.network.structure import (
    is_batch_norm,
    unchanged,
    unchanged_backbone,
    unchanged_context,
    unchanged_stage,
    unchanged_stem,
)
from dfn_kernels import channel_attention
from dfn_kernels.convolution.fused_conv import Packed, fused_conv, fused_conv_ref

PADDED_TO = 8  # tensor cores and vector units want multiples of 8; 189, 21 and 9 are not


class Convolution(nn.Module):
    """A convolution with bias, ReLU and the addition of a residual in the same call. Buffers, not parameters.

    A ``norm`` that cannot be folded (a group norm) runs after the convolution. ``plain`` uses PyTorch's own operators,
    for export and for torch.compile.
    """

    weight: Tensor
    bias: Tensor | None
    exact_bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        relu: bool = True,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        # Copies, so that nothing changes if the model that they come from is trained further.
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        # In float32, for half precision on a CPU: rounded biases change more labels.
        self.register_buffer("exact_bias", None, persistent=False)
        self.stride, self.padding, self.relu = stride, weight.shape[2] // 2, relu
        self.norm = norm
        self.plain = False
        self.packed = Packed()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[B, I, H, W]``, and a residual of the output's shape -> ``[B, O, h, w]``."""
        if self.norm is not None:
            out = self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))
            return F.relu(out if residual is None else out + residual) if self.relu else out
        if self.plain:
            return fused_conv_ref(x, self.weight, self.bias, residual, self.stride, self.padding, self.relu)
        settings: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "relu": self.relu}
        bias = self.exact_bias if residual is None and x.device.type == "cpu" else None
        return fused_conv(x, self.weight, self.bias if bias is None else bias, residual, packed=self.packed, **settings)

    def cast(self, dtype: torch.dtype) -> None:
        """Makes weight and features ``dtype``."""
        bias = self.bias
        self.to(dtype)
        if bias is not None and dtype in (torch.bfloat16, torch.float16) and not self.plain:
            self.exact_bias = bias.float() if self.exact_bias is None else self.exact_bias.float()

    def _apply(self, fn, recurse=True):
        self.packed = Packed()  # the old one is for the weight's old device and dtype
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return self.__dict__ | {"packed": Packed()}  # packed again when needed; oneDNN's tensors cannot be copied


def _fold(conv: nn.Conv2d | Tensor, norm: nn.Module, channels: int = 0, **settings: Any) -> Convolution:
    """Folds a batch norm (running statistics) into a convolution, in float64; other norm layers stay.

    ``conv`` is a convolution without bias, or its weight; the outputs are padded with zeros up to ``channels``.
    """
    weight, stride = (conv, 1) if isinstance(conv, Tensor) else (conv.weight, conv.stride[0])
    settings = {"stride": stride, **settings}
    if not is_batch_norm(norm) or norm.running_var is None:
        return Convolution(weight.detach(), norm=copy.deepcopy(norm).eval(), **settings)
    assert norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double() * scale
    if norm.affine:
        scale, bias = scale * norm.weight.double(), bias * norm.weight.double() + norm.bias.double()
    folded = weight.detach().double() * scale[: weight.shape[0], None, None, None]
    channels = max(channels, weight.shape[0])
    return Convolution(pad(folded, channels, folded.shape[1]), pad(bias, channels), **settings)


class Kept(nn.Module):
    """A block that was changed after it was built: a copy of it, in eval mode, that runs its own ``forward``."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # Pruned and normalised weights are results of a computation, which deepcopy refuses.
        found = {id(x): x for m in block.modules() for x in vars(m).values() if isinstance(x, Tensor)}
        computed = {key: x.detach().clone() for key, x in found.items() if x.grad_fn is not None}
        self.block = copy.deepcopy(block, computed).eval().requires_grad_(False)
        for ours, theirs in zip(self.block.modules(), block.modules(), strict=True):
            for name in ("_forward_hooks", "_forward_pre_hooks"):  # the hooks themselves, not copies of their owners
                setattr(ours, name, copy.copy(getattr(theirs, name)))

    def forward(self, *inputs: Any) -> Any:
        return self.block(*inputs)


class FusedBlock(nn.Module):
    """A residual block of the backbone."""

    def __init__(self, block: BasicBlock | Bottleneck):
        super().__init__()
        names = ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2")
        self.convs = nn.ModuleList(_fold(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in names)
        self.downsample = None if block.downsample is None else _fold(*block.downsample, relu=False)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for conv in self.convs[:-1]:
            x = conv(x)
        return self.convs[-1](x, shortcut)


class FusedRRB(nn.Module):
    """An RRB whose 1x1 and first 3x3 convolution are composed into one if that is less work.

    ``last`` is the 1x1 convolution that a head puts after it, composed with ``conv_refine``. ``inputs`` and ``width``
    are channel counts, padded with zeros.
    """

    def __init__(self, block: RefinementResidualBlock, inputs: int, width: int, last: nn.Conv2d | None = None):
        super().__init__()
        width = width if can_pad(block.cbr.bn) else block.conv_refine.weight.shape[0]
        before = pad(block.conv_1x1.weight.detach().double(), width, inputs)
        conv = pad(block.cbr.conv.weight.detach().double(), block.cbr.conv.weight.shape[0], width)
        self.composed = inputs < width
        self.shortcut = Convolution(before, relu=False)
        self.conv = _fold(compose(conv, before) if self.composed else conv, block.cbr.bn, width)
        refine = pad(block.conv_refine.weight.detach().double(), width, width)
        if last is None:
            bias = refine.new_zeros(len(refine)) if block.last_relu else None  # cuDNN fuses a ReLU only after a bias
            self.refine = Convolution(refine, bias, relu=block.last_relu)
            self.last = None
            return
        assert last.bias is not None
        weight, bias = last.weight.detach().double(), last.bias.detach().double()
        scores = round_up(weight.shape[0], PADDED_TO) if width % PADDED_TO == 0 else weight.shape[0]
        weight, bias = pad(weight, scores, width), pad(bias, scores)
        self.last = Convolution(weight, bias, relu=False)
        self.refine = Convolution(compose_last(weight, refine), relu=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        t = self.conv(x if self.composed else shortcut)
        return self.refine(t, shortcut if self.last is None else self.last(shortcut))


class FusedHead(nn.Module):
    """A head: scores ``[B, scores, h, w]`` at the size of its input."""

    def __init__(self, head: Head, inputs: int, padded_to: int):
        super().__init__()
        self.scores = head.conv.weight.shape[0]
        width = head.conv.weight.shape[1]
        self.rrb = FusedRRB(head.rrb, inputs, round_up(width, padded_to), head.conv)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.rrb(x)[:, : self.scores]


class FusedGate(nn.Module):
    """A channel attention block; its two linear layers stay in float32 or better."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def __init__(self, gate: SqueezeGate):
        super().__init__()
        for name, tensor in zip(("weight1", "bias1", "weight2", "bias2"), gate_parameters(gate), strict=True):
            self.register_buffer(name, tensor.detach().clone())
        self.plain = False

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Eq. 3: ``low * gate + resize(high)``."""
        parameters = (self.weight1, self.bias1, self.weight2, self.bias2)
        if not self.plain:
            return channel_attention(low, high, *parameters)
        high = resize(high, low.shape[2:])
        weight1, bias1, weight2, bias2 = parameters
        mean = torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1).to(weight1.dtype)
        gate = torch.sigmoid(F.linear(F.relu(F.linear(mean, weight1, bias1)), weight2, bias2))
        return low * gate.to(low.dtype)[:, :, None, None] + high


class FusedContext(nn.Module):
    """The global context: average pooling, and a 1x1 convolution with its norm and ReLU."""

    def __init__(self, context: nn.Sequential):
        super().__init__()
        block: Any = context[1]
        self.conv = _fold(block.conv, block.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.adaptive_avg_pool2d(x, 1))


class FusedBackbone(nn.Module):
    """The backbone, each block fused or, if it was changed, kept."""

    def __init__(self, backbone: ResNet):
        super().__init__()
        ends = [backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool]
        self.stem = FusedStem(backbone) if unchanged_stem(backbone) else Kept(nn.Sequential(*ends))
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.layers = nn.ModuleList(
            nn.Sequential(*(FusedBlock(block) if unchanged(block) else Kept(block) for block in stage))  # type: ignore[arg-type]
            if unchanged_stage(stage)
            else Kept(stage)
            for stage in stages
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The feature maps at strides 4, 8, 16 and 32."""
        x = self.stem(x)
        stages = []
        for layer in self.layers:
            x = layer(x)
            stages.append(x)
        return stages


class FusedStem(nn.Module):
    """Everything before the backbone's stages."""

    def __init__(self, backbone: ResNet):
        super().__init__()
        conv1 = backbone.conv1
        layers = list(conv1) if isinstance(conv1, nn.Sequential) else [conv1]
        layers = [layer for layer in [*layers, backbone.bn1] if not isinstance(layer, nn.ReLU)]
        self.convs = nn.Sequential(*(_fold(c, n) for c, n in zip(layers[::2], layers[1::2], strict=True)))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.convs(x), 3, 2, 1)


class KeptCab(Kept):
    """A CAB that was changed."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.block(low, resize(high, low.shape[2:]))


class KeptHead(Kept):
    """A head that was changed: scores at ``size``, or at the size of its input."""

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.block(x, x.shape[2:] if size is None else size)


def fused_backbone(backbone: ResNet) -> nn.Module:
    return FusedBackbone(backbone) if unchanged_backbone(backbone) else Kept(backbone)


def fused_context(context: Any) -> nn.Module:
    return FusedContext(context) if unchanged_context(context) else Kept(context)


def fused_rrb(block: Any, inputs: int, width: int) -> nn.Module:
    return FusedRRB(block, inputs, width) if unchanged(block) else Kept(block)


def fused_cab(cab: Any) -> nn.Module:
    return FusedGate(cab.channel_attention) if unchanged(cab) else KeptCab(cab)


def fused_head(head: Any, inputs: int, padded_to: int) -> nn.Module:
    return FusedHead(head, inputs, padded_to) if unchanged(head) else KeptHead(head)


def norm_of(block: Any) -> nn.Module:
    """The norm layer of an RRB, or of a head's RRB."""
    return (block.rrb if isinstance(block, Head) else block).cbr.bn
