"""FusedDFN: the inference network of a DFN, with its weights folded and composed once.

Batch norms are folded into the convolutions before them, in float64. Convolution, bias, ReLU and residual are one call
(:func:`dfn_kernels.fused_conv`). It has only the stride-4 head, and the Border Network only on request. The savings of
:mod:`dfn_fast.network.savings` are applied to the weights once, when the network is built.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast.network.backbone import BasicBlock, Bottleneck, check_images
from dfn_fast.network.blocks import ChannelAttentionBlock, Head, RefinementResidualBlock, SqueezeGate, resize
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.network.savings import can_pad, compose, compose_last, gate_parameters, pad, round_up
from dfn_kernels import channel_attention, upsample_add
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
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        return Convolution(weight.detach(), norm=copy.deepcopy(norm).eval(), **settings)
    assert norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double() * scale
    if norm.affine:
        scale, bias = scale * norm.weight.double(), bias * norm.weight.double() + norm.bias.double()
    folded = weight.detach().double() * scale[: weight.shape[0], None, None, None]
    channels = max(channels, weight.shape[0])
    return Convolution(pad(folded, channels, folded.shape[1]), pad(bias, channels), **settings)


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
            self.refine, self.last = Convolution(refine, relu=block.last_relu), None
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

    def forward(self, x: Tensor) -> Tensor:
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


class FusedDFN(nn.Module):
    """The inference network of ``model`` in eval mode; ``FastDFN.fuse()`` makes one too. ``model`` is not changed.

    Args:
        model: a ReferenceDFN or FastDFN.
        return_border: keeps the Border Network, for :meth:`border_scores`.
        dtype: of weights and features; defaults to the model's. Folding and composing use float64 and round once.
        plain: uses only PyTorch's own operators and no padded channels, for ``torch.export`` and ONNX.

    It has buffers and no parameters, is always in eval mode, and follows ``.to(device)`` but not later changes of the
    model's weights. Once it has run on a CPU, it keeps a second copy of each convolution's weight in the CPU's layout.
    """

    def __init__(
        self,
        model: ReferenceDFN,
        *,
        return_border: bool = False,
        dtype: torch.dtype | None = None,
        plain: bool = False,
    ):
        super().__init__()
        if return_border and not model.has_border:
            raise ValueError("return_border=True, but the model was built with border=False")
        self.num_classes, self.channels, self.return_border = model.num_classes, model.channels, return_border
        padded_to = 1 if plain else PADDED_TO
        low_to_high, C = model.backbone.channels, model.channels
        stem = model.backbone.conv1
        layers = list(stem) if isinstance(stem, nn.Sequential) else [stem]
        layers = [layer for layer in [*layers, model.backbone.bn1] if not isinstance(layer, nn.ReLU)]
        self.stem = nn.Sequential(*(_fold(c, n) for c, n in zip(layers[::2], layers[1::2], strict=True)))  # type: ignore[arg-type]
        stages = (model.backbone.layer1, model.backbone.layer2, model.backbone.layer3, model.backbone.layer4)
        self.layers = nn.ModuleList(nn.Sequential(*(FusedBlock(b) for b in stage)) for stage in stages)  # type: ignore[arg-type]
        self.global_context: Convolution | None = None
        if model.global_context is not None:
            context: Any = model.global_context[1]  # type: ignore[index]
            self.global_context = _fold(context.conv, context.bn)
        self.smooth_pre_rrbs = nn.ModuleList(
            FusedRRB(block, inputs, C)  # type: ignore[arg-type]
            for block, inputs in zip(model.smooth_pre_rrbs, low_to_high[::-1], strict=True)
        )
        self.cabs = nn.ModuleList(
            FusedGate(cab.channel_attention) for cab in model.cabs if isinstance(cab, ChannelAttentionBlock)
        )
        self.smooth_aft_rrbs = nn.ModuleList(FusedRRB(block, C, C) for block in model.smooth_aft_rrbs)  # type: ignore[arg-type]
        self.smooth_head = FusedHead(model.smooth_heads[3], C, padded_to)  # type: ignore[arg-type]
        if return_border:
            last: Any = model.border_aft_rrbs[3]
            width = last.conv_refine.weight.shape[0]
            padded = round_up(width, padded_to) if can_pad(last.cbr.bn) else width
            self.border_pre_rrbs = nn.ModuleList(
                FusedRRB(block, inputs, padded)  # type: ignore[arg-type]
                for block, inputs in zip(model.border_pre_rrbs, low_to_high, strict=True)
            )
            self.border_aft_rrbs = nn.ModuleList(FusedRRB(block, padded, padded) for block in model.border_aft_rrbs)  # type: ignore[arg-type]
            self.border_head = FusedHead(model.border_heads[3], padded, padded_to)  # type: ignore[arg-type]
        self.plain = plain
        for module in self.modules():
            if isinstance(module, (Convolution, FusedGate)):
                module.plain = plain
        self.cast(dtype or next(model.parameters()).dtype)
        self.eval()

    def cast(self, dtype: torch.dtype) -> None:
        """Makes weights and features ``dtype``, and the gates' linear layers float32 or better."""
        high = torch.float64 if dtype == torch.float64 else torch.float32
        for module in self.modules():
            if isinstance(module, FusedGate):
                module.to(high)
            elif isinstance(module, Convolution):
                module.cast(dtype)

    def train(self, mode: bool = True) -> "FusedDFN":
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.stem[0].weight.dtype  # type: ignore[index, union-attr, return-value]

    @property
    def device(self) -> torch.device:
        return self.stem[0].weight.device  # type: ignore[index, union-attr, return-value]

    def forward(self, data: Tensor) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> log-probabilities ``[B, K, H, W]``, float32 or better."""
        scores = self.scores(data)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return F.log_softmax(resize(scores, data.shape[2:]), dim=1)

    def scores(self, data: Tensor) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> the stride-4 scores ``[B, K, h, w]``, before any softmax."""
        return self.smooth_scores(self.stages(data))

    def stages(self, data: Tensor) -> list[Tensor]:
        """The backbone's feature maps at strides 4, 8, 16 and 32."""
        check_images(data)
        x = self.stem(data.to(self.dtype, memory_format=torch.channels_last))
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for layer in self.layers:
            x = layer(x)
            stages.append(x)
        return stages

    def smooth_scores(self, stages: list[Tensor]) -> Tensor:
        """Section 3.1: the stride-4 scores ``[B, K, h, w]``, from :meth:`stages`."""
        high = stages[-1]
        if self.global_context is None:
            high = high.new_zeros(high.shape[0], self.channels, 1, 1)
        else:
            high = self.global_context(F.adaptive_avg_pool2d(high, 1))
        for i, stage in enumerate(reversed(stages)):
            low = self.smooth_pre_rrbs[i](stage)
            high = self.smooth_aft_rrbs[i](self.cabs[i](low, high) if len(self.cabs) else self.add(low, high))
        return self.smooth_head(high)

    def add(self, low: Tensor, high: Tensor) -> Tensor:
        return low + resize(high, low.shape[2:]) if self.plain else upsample_add(low, high)

    def border_scores(self, stages: list[Tensor]) -> Tensor:
        """Section 3.2: the last border scores ``[B, 1, h, w]`` at stride 4, which have seen all stages."""
        if not self.return_border:
            raise ValueError("this network has no Border Network; build it with FusedDFN(model, return_border=True)")
        acc = self.border_pre_rrbs[0](stages[0])
        for i in (1, 2, 3):
            acc = self.border_aft_rrbs[i](self.add(acc, self.border_pre_rrbs[i](stages[i])))
        return self.border_head(acc)
