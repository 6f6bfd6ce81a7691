"""FusedDFN: the inference network of a DFN, made of :mod:`dfn_fast.network.fused_blocks`.

It has only the stride-4 head, and the Border Network only on request. When it is built it is compared once with the
model that it comes from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dfn_fast.errors import UserError
from dfn_fast.network.backbone import check_images
from dfn_fast.network.blocks import resize
from dfn_fast.network.fused_blocks import (
    PADDED_TO,
    Convolution,
    FusedGate,
    Kept,
    fused_backbone,
    fused_cab,
    fused_context,
    fused_head,
    fused_rrb,
    norm_of,
)
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.network.savings import can_pad, round_up
from dfn_fast.network.structure import (
    unchanged,
)
from dfn_kernels import upsample_add

COMPARED_SIZE = (40, 48)  # of the random image: small, neither square nor a multiple of 32
# What rounding explains between the two, as a share of the range of the log-probabilities.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


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
        self.backbone = fused_backbone(model.backbone)
        self.global_context = None if model.global_context is None else fused_context(model.global_context)
        self.smooth_pre_rrbs = nn.ModuleList(
            fused_rrb(block, inputs, C) for block, inputs in zip(model.smooth_pre_rrbs, low_to_high[::-1], strict=True)
        )
        self.cabs = nn.ModuleList(fused_cab(cab) for cab in model.cabs)
        self.smooth_aft_rrbs = nn.ModuleList(fused_rrb(block, C, C) for block in model.smooth_aft_rrbs)
        self.smooth_head = fused_head(model.smooth_heads[3], C, padded_to)
        if return_border:
            used = [*model.border_pre_rrbs, *list(model.border_aft_rrbs)[1:], model.border_heads[3]]
            width = padded = model.border_channels
            if all(unchanged(block) and can_pad(norm_of(block)) for block in used):
                padded = round_up(width, padded_to)
            self.border_pre_rrbs = nn.ModuleList(
                fused_rrb(block, inputs, padded)
                for block, inputs in zip(model.border_pre_rrbs, low_to_high, strict=True)
            )
            self.border_aft_rrbs = nn.ModuleList(fused_rrb(block, padded, padded) for block in model.border_aft_rrbs)
            self.border_head = fused_head(model.border_heads[3], padded, padded_to)
        self.plain = plain
        for module in self.modules():
            if isinstance(module, (Convolution, FusedGate)):
                module.plain = plain
        first = next(model.parameters())
        self.like: Tensor
        self.register_buffer("like", torch.empty(0, dtype=first.dtype, device=first.device), persistent=False)
        self.eval()
        if first.device.type != "mps":  # which has no float64
            self.cast(torch.float64)  # as weights were folded: rounded once, after the comparison
        _require_same(self, model)
        self.cast(dtype or first.dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Makes weights and features ``dtype``, and the gates' linear layers float32 or better."""
        high = torch.float64 if dtype == torch.float64 else torch.float32
        for module in self.modules():
            if isinstance(module, FusedGate):
                module.to(high)
            elif isinstance(module, Convolution):
                module.cast(dtype)
            elif isinstance(module, Kept):
                module.to(dtype)
        self.like = self.like.to(dtype)

    def train(self, mode: bool = True) -> "FusedDFN":
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def forward(self, data: Tensor) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> log-probabilities ``[B, K, H, W]``, float32 or better."""
        scores = self.scores(data)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return F.log_softmax(resize(scores, data.shape[2:]), dim=1)

    def scores(self, data: Tensor) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> the stride-4 scores ``[B, K, h, w]``, before any softmax."""
        return self.smooth_scores(self.stages(data), data.shape[2:])

    def stages(self, data: Tensor) -> list[Tensor]:
        """The backbone's feature maps at strides 4, 8, 16 and 32."""
        check_images(data)
        return self.backbone(data.to(self.dtype, memory_format=torch.channels_last))

    def smooth_scores(self, stages: list[Tensor], size: torch.Size | None = None) -> Tensor:
        """Section 3.1: the stride-4 scores ``[B, K, h, w]``, from :meth:`stages`.

        A head that was changed gives scores of ``size``, the image's, as its own ``forward`` does.
        """
        high = stages[-1]
        if self.global_context is None:
            high = high.new_zeros(high.shape[0], self.channels, 1, 1)
        else:
            high = self.global_context(high)
        for i, stage in enumerate(reversed(stages)):
            low = self.smooth_pre_rrbs[i](stage)
            high = self.smooth_aft_rrbs[i](self.cabs[i](low, high) if len(self.cabs) else self.add(low, high))
        return self.smooth_head(high, size)

    def add(self, low: Tensor, high: Tensor) -> Tensor:
        return low + resize(high, low.shape[2:]) if self.plain else upsample_add(low, high)

    def border_scores(self, stages: list[Tensor], size: torch.Size | None = None) -> Tensor:
        """Section 3.2: the last border scores ``[B, 1, h, w]`` at stride 4, which have seen all stages.

        A head that was changed gives scores of ``size``, the image's.
        """
        if not self.return_border:
            raise ValueError("this network has no Border Network; build it with FusedDFN(model, return_border=True)")
        acc = self.border_pre_rrbs[0](stages[0])
        for i in (1, 2, 3):
            acc = self.border_aft_rrbs[i](self.add(acc, self.border_pre_rrbs[i](stages[i])))
        return self.border_head(acc, size)


def _require_same(fused: "FusedDFN", model: ReferenceDFN) -> None:
    """Raises :class:`UserError` unless ``fused`` computes what ``model`` does, seen on one random image.

    What is compared is the model's own ``forward`` in eval mode. Nothing is compared if a hook would see the image, if
    tensors hold no numbers, or if the model's own scores are not finite.
    """
    first = next(model.parameters())
    if first.is_meta or isinstance(first, FakeTensor) or torch.compiler.is_compiling() or _has_hooks(model):
        return
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *COMPARED_SIZE, generator=generator).to(first.device, first.dtype)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            expected, found = model(image).double(), fused(image).double()
    finally:
        for module, mode in modes:
            module.training = mode
    if not expected.isfinite().all():
        return
    allowed = ROUNDING[first.dtype] * max((expected.max() - expected.min()).item(), 1.0)
    difference = (found - expected).abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"the fused network does not compute what the model does: log-probabilities differ by {difference:.3g}, "
            f"expected at most {allowed:.3g}. A module was changed in a way that cannot be fused: use the model itself "
            "or undo the change"
        )


def _has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
