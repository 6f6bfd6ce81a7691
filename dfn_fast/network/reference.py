"""DFN in plain PyTorch, to be read beside the paper (Yu et al., CVPR 2018): the oracle of every parity test.

Sections and equations are the paper's. Every resize is bilinear with ``align_corners=True``, to the size of the
feature map that it is combined with. Parameter names are those of the published checkpoints.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from dfn_fast.checkpoint.folder import load_folder, save_folder
from dfn_fast.checkpoint.imagenet import load_backbone
from dfn_fast.network.arguments import checked_arguments, infer_arguments
from dfn_fast.network.backbone import NormLayer, ResNet, check_images, initialise
from dfn_fast.network.blocks import ChannelAttentionBlock, ConvBnRelu, Head, RefinementResidualBlock, resize
from dfn_fast.network.losses import (
    Criterion,
    CrossEntropyLoss,
    SigmoidFocalLoss,
    dfn_loss,
    label_verdict,
    require_no_label,
    with_verdict,
)


class Scores(NamedTuple):
    """Scores at the image's size: ``smooth`` ``[B, K, H, W]`` from stride 32 to stride 4, the last is the
    segmentation; ``border`` ``[B, 1, H, W]`` from the lowest stage to the highest, the last has seen them all."""

    smooth: list[Tensor]
    border: list[Tensor]


def _class_count(num_classes: int | None, out_planes: int | None) -> int:
    """The number of classes, under our name or the authors'. Raises ``TypeError`` unless it is given once."""
    if (num_classes is None) == (out_planes is None):
        raise TypeError("expected num_classes, or out_planes as the authors' code calls it, and not both")
    return num_classes if num_classes is not None else out_planes  # type: ignore[return-value]


class ReferenceDFN(nn.Module):
    """Discriminative Feature Network, figure 2(a). A drop-in for the authors' ``DFN``.

    Args:
        num_classes: K, the channels of a smooth score.
        criterion: loss of a smooth score ``[B, K, H, W]`` and ``label``; None: softmax cross entropy, 255 ignored.
        aux_criterion: loss of a border score ``[B, 1, H, W]`` and ``aux_label``; None: focal loss, 255 ignored.
        alpha: lambda of eq. 7, the weight of the border losses.
        out_planes: the authors' name of ``num_classes``.
        pretrained_model: ImageNet weights for the backbone: a file, or a name in ``BACKBONE_WEIGHTS`` of
            :mod:`dfn_fast.checkpoint.imagenet`.
        norm_layer: called with a channel count; ``nn.SyncBatchNorm`` works too.
        backbone: ``resnet18``, ``34``, ``50``, ``101`` or ``152``.
        stem: ``"deep"`` (three 3x3 convolutions, as published) or ``"conv7"`` (torchvision's).
        channels: C, the width of the Smooth Network.
        border_channels: the width of the Border Network.
        global_context, channel_attention, deep_supervision, border: the paper's ablations. Without global context
            the first ``high`` is zero; without channel attention a CAB is an addition; without deep supervision
            only the last smooth and the last border score exist; without border there is no Border Network.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        criterion: Criterion | None = None,
        aux_criterion: Criterion | None = None,
        alpha: float = 0.1,
        pretrained_model: str | Path | Mapping[str, Any] | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        backbone: str = "resnet101",
        stem: str = "deep",
        channels: int = 512,
        border_channels: int = 21,
        global_context: bool = True,
        channel_attention: bool = True,
        deep_supervision: bool = True,
        border: bool = True,
        out_planes: int | None = None,
    ):
        super().__init__()
        num_classes = _class_count(num_classes, out_planes)
        self.num_classes, self.channels, self.alpha = num_classes, channels, alpha
        self.border_channels = border_channels
        self.criterion = CrossEntropyLoss() if criterion is None else criterion
        self.aux_criterion = SigmoidFocalLoss() if aux_criterion is None else aux_criterion
        self.backbone = ResNet(backbone, stem, norm_layer)
        low_to_high = self.backbone.channels
        high_to_low = low_to_high[::-1]
        rrb = RefinementResidualBlock

        self.global_context: nn.Module | None = None
        if global_context:
            self.global_context = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), ConvBnRelu(high_to_low[0], channels, 1, norm_layer)
            )
        self.smooth_pre_rrbs = nn.ModuleList(rrb(c, channels, norm_layer) for c in high_to_low)
        self.cabs = nn.ModuleList(ChannelAttentionBlock(channels) for _ in high_to_low if channel_attention)
        self.smooth_aft_rrbs = nn.ModuleList(rrb(channels, channels, norm_layer) for _ in high_to_low)
        # Without deep supervision nn.Identity stands for the missing heads, so that the others keep their names.
        supervised = [deep_supervision, deep_supervision, deep_supervision, True]
        self.smooth_heads = nn.ModuleList(
            Head(channels, num_classes, norm_layer) if has_head else nn.Identity() for has_head in supervised
        )
        if border:
            width = border_channels
            self.border_pre_rrbs = nn.ModuleList(rrb(c, width, norm_layer) for c in low_to_high)
            self.border_aft_rrbs = nn.ModuleList(rrb(width, width, norm_layer) for _ in low_to_high)
            # The first is in every published checkpoint, but never used: DistributedDataParallel must not wait for it.
            self.border_aft_rrbs[0].requires_grad_(False)
            self.border_heads = nn.ModuleList(
                Head(width, 1, norm_layer) if has_head else nn.Identity() for has_head in supervised
            )
        self.has_border = border
        for layer in self.business_layer:
            initialise(layer)
        for head in self.modules():
            if isinstance(head, Head):  # scores near 0: no class is likelier than another at the start
                nn.init.normal_(head.conv.weight, std=0.01)
        if pretrained_model is not None:
            load_backbone(self.backbone, pretrained_model)

    @property
    def business_layer(self) -> list[nn.Module]:
        """Every module with parameters but the backbone: the published recipe gives it ten times the learning rate."""
        criteria = (self.criterion, self.aux_criterion)
        return [m for m in self.children() if m is not self.backbone and m not in criteria]

    def forward(
        self,
        data: Tensor,
        label: Tensor | None = None,
        aux_label: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Normalised RGB ``[B, 3, H, W]`` -> log-probabilities ``[B, K, H, W]``; with both labels, the loss (eq. 7).

        ``label`` ``[B, H, W]`` holds class ids, ``aux_label`` ``[B, H, W]`` is 1 on borders and 0 elsewhere; 255 is
        ignored in both. H and W are at least 32. ``shares``: see :func:`dfn_fast.network.losses.dfn_loss`.

        With the default criterion a label that is neither a class nor 255 is a ``ValueError`` on a CPU; on a GPU and in
        a compiled graph it makes the loss nan, so that nothing waits for the device. ``ValueError`` too for labels of
        another size than the images, for one label map without the other, and for more than 255 classes.
        """
        if label is None or aux_label is None:
            require_no_label(label, aux_label)
            return F.log_softmax(self.smooth_network(self.stages(data), data.shape[2:])[-1], dim=1)
        wrong = self.check_labels(data, label, aux_label)
        scores = self.scores(data)
        loss = dfn_loss(*scores, label, aux_label, self.criterion, self.aux_criterion, self.alpha, shares)
        return with_verdict(loss, wrong)

    def check_labels(self, data: Tensor, label: Tensor, aux_label: Tensor) -> Tensor | None:
        """Whether a label is not a class, as a flag on the device; None if the criterion is not ours.

        Raises ``ValueError`` for labels of another size than the images, and on a CPU for a label that is not a class.
        """
        if type(self.criterion) is CrossEntropyLoss:
            wrong = label_verdict(data, label, self.num_classes, self.criterion.ignore_index)
        else:
            wrong = None
        if type(self.aux_criterion) is SigmoidFocalLoss and aux_label.shape != (data.shape[0], *data.shape[2:]):
            raise ValueError(
                f"expected aux_label {[data.shape[0], *data.shape[2:]]}, the size of the images, got "
                f"{list(aux_label.shape)}"
            )
        return wrong

    def scores(self, data: Tensor) -> Scores:
        """The scores of all heads before softmax and sigmoid, as the losses see them."""
        stages = self.stages(data)
        border = self.border_network(stages, data.shape[2:]) if self.has_border else []
        return Scores(self.smooth_network(stages, data.shape[2:]), border)

    def stages(self, data: Tensor) -> list[Tensor]:
        """The backbone's feature maps at strides 4, 8, 16 and 32."""
        check_images(data)
        if self.training and self.global_context is not None and data.shape[0] == 1:
            norm = self.global_context[1].bn  # type: ignore[index]
            if isinstance(norm, nn.BatchNorm2d) and norm.training:
                raise ValueError(
                    "DFN cannot train on a batch of one: batch norm after global pooling sees one value per channel. "
                    "Use a batch of two or more, global_context=False, or put the norm layers in eval mode"
                )
        return self.backbone(data)

    def smooth_network(self, stages: list[Tensor], size: torch.Size) -> list[Tensor]:
        """Section 3.1, from the highest stage to the lowest."""
        scores = []
        high = self.first_high(stages[-1])
        for i, stage in enumerate(reversed(stages)):
            low = self.smooth_pre_rrbs[i](stage)
            high = resize(high, low.shape[2:])
            x = self.cabs[i](low, high) if len(self.cabs) else low + high
            x = self.smooth_aft_rrbs[i](x)
            if not isinstance(self.smooth_heads[i], nn.Identity):
                scores.append(self.smooth_heads[i](x, size))
            high = x
        return scores

    def first_high(self, stage: Tensor) -> Tensor:
        """Global average pooling, section 3.1: the strongest consistency there is, one value per channel."""
        if self.global_context is None:
            return stage.new_zeros(stage.shape[0], self.channels, 1, 1)
        return self.global_context(stage)

    def border_network(self, stages: list[Tensor], size: torch.Size) -> list[Tensor]:
        """Section 3.2, from the lowest stage to the highest."""
        scores = []
        acc = None
        for i, stage in enumerate(stages):
            x = self.border_pre_rrbs[i](stage)
            acc = x if acc is None else self.border_aft_rrbs[i](acc + resize(x, acc.shape[2:]))
            if not isinstance(self.border_heads[i], nn.Identity):
                scores.append(self.border_heads[i](acc, size))
        return scores

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this network, without criteria and norm layer."""
        return {**infer_arguments(self.state_dict()), "alpha": self.alpha}

    def save_pretrained(
        self, folder: str | Path, *, classes: Sequence[str] | None = None, palette: np.ndarray | None = None
    ) -> None:
        """Writes ``model.safetensors`` and ``config.json``; see :func:`dfn_fast.checkpoint.folder.save_folder`."""
        save_folder(self, folder, self.arguments(), classes=classes, palette=palette)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device = "cpu", channels_last: bool = True, **overrides: Any
    ) -> Self:
        """Loads the network from such a folder, in eval mode; see :func:`dfn_fast.checkpoint.folder.load_folder`."""
        return load_folder(cls, path, checked_arguments, device=device, channels_last=channels_last, **overrides)
