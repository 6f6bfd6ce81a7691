"""The blocks of DFN: figure 2 (b), (c) and the heads, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast.network.backbone import NormLayer


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ConvBnRelu(nn.Module):
    """Convolution without bias, norm layer, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm_layer: NormLayer):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, 1, kernel // 2, bias=False)
        self.bn = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class RefinementResidualBlock(nn.Module):
    """RRB, section 3.1 and figure 2(b): a 1x1 convolution sets the channels, a residual block refines."""

    def __init__(self, in_channels: int, out_channels: int, norm_layer: NormLayer, last_relu: bool = True):
        super().__init__()
        self.conv_1x1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.cbr = ConvBnRelu(out_channels, out_channels, 3, norm_layer)
        self.conv_refine = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_1x1(x)
        x = self.conv_refine(self.cbr(x)) + x
        return F.relu(x) if self.last_relu else x


class SqueezeGate(nn.Module):
    """The gate of a CAB: two linear layers and a sigmoid, ``[B, 2C] -> [B, C]``."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(2 * channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ChannelAttentionBlock(nn.Module):
    """CAB, section 3.1, eq. 3 and figure 2(c): the higher stage chooses channels of the lower one."""

    def __init__(self, channels: int):
        super().__init__()
        self.channel_attention = SqueezeGate(channels)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        gate = self.channel_attention(torch.cat([low, high], dim=1).mean((2, 3)))
        return low * gate[:, :, None, None] + high


class Head(nn.Module):
    """Scores at the image's size: an RRB to nine times the score's channels, a 1x1 convolution, a resize."""

    def __init__(self, in_channels: int, scores: int, norm_layer: NormLayer):
        super().__init__()
        self.rrb = RefinementResidualBlock(in_channels, scores * 9, norm_layer, last_relu=False)
        self.conv = nn.Conv2d(scores * 9, scores, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return resize(self.conv(self.rrb(x)), size)
