"""ResNet-18, 34, 50, 101 and 152 (He et al., CVPR 2016): the four feature maps that DFN works on.

Two stems: ``"deep"``, three 3x3 convolutions of 64, 64 and 128 channels, as in the published DFN checkpoints, and
``"conv7"``, one 7x7 convolution, as in torchvision. Parameter names are those of both: ``conv1``, ``bn1``,
``layer1`` ... ``layer4``. A block's stride is on its 3x3 convolution.
"""

from collections.abc import Callable

from torch import Tensor, nn

from dfn_fast.network.recompute import chain, recomputed, run_blocks
from dfn_fast.runtime.regions import region

MIN_SIZE = 32  # the shortest side of an image: the largest stride

NormLayer = Callable[[int], nn.Module]


def check_images(data: Tensor) -> None:
    """Raises ``ValueError`` for anything but images ``[B, 3, H, W]`` whose sides are at least ``MIN_SIZE``."""
    if data.ndim != 4 or data.shape[1] != 3 or min(data.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"DFN expects images [B, 3, H, W] with H and W of at least {MIN_SIZE}, got {list(data.shape)}; "
            "resize or pad smaller images"
        )


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None, norm_layer: NormLayer):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = norm_layer(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut; ResNet-50, 101 and 152."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None, norm_layer: NormLayer):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


LAYERS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
STEMS = ("deep", "conv7")


class ResNet(nn.Module):
    """The feature maps of a ResNet at strides 4, 8, 16 and 32.

    ``channels`` holds their channel counts: 256, 512, 1024, 2048 with bottlenecks, else 64, 128, 256, 512.
    ``memory`` selects what the backward pass recomputes, see :mod:`dfn_fast.network.recompute`.
    """

    memory = "off"

    def __init__(self, depth: str = "resnet101", stem: str = "deep", norm_layer: NormLayer = nn.BatchNorm2d):
        super().__init__()
        if depth not in LAYERS:
            raise ValueError(f"backbone {depth!r} is not known; choose one of {', '.join(LAYERS)}")
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is not known; choose one of {', '.join(STEMS)}")
        block, counts = LAYERS[depth]
        self.depth, self.stem = depth, stem
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))
        if stem == "deep":
            in_channels = 128
            self.conv1: nn.Module = nn.Sequential(
                conv3x3(3, 64, stride=2),
                norm_layer(64),
                nn.ReLU(inplace=True),
                conv3x3(64, 64),
                norm_layer(64),
                nn.ReLU(inplace=True),
                conv3x3(64, 128),
            )
        else:
            in_channels = 64
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Sequential] = []
        for width, count, stride in zip((64, 128, 256, 512), counts, (1, 2, 2, 2), strict=True):
            stages.append(make_stage(block, in_channels, width, count, stride, norm_layer))
            in_channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` -> the four maps, strides 4, 8, 16 and 32; sizes are rounded up if not divisible."""
        with region("backbone stem"):
            x = recomputed(self.memory, chain, [self.conv1, self.bn1, self.relu, self.maxpool], x)
        stages = []
        for i, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)):
            with region(f"backbone stage 1/{4 << i}"):
                x = run_blocks(layer, x, self.memory)
            stages.append(x)
        return stages


def make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    count: int,
    stride: int,
    norm_layer: NormLayer,
) -> nn.Sequential:
    """``count`` blocks; the first has the stride, and a projection if the shapes change."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels)
        )
    blocks = [block(in_channels, width, stride, downsample, norm_layer)]
    blocks += [block(out_channels, width, 1, None, norm_layer) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def initialise(module: nn.Module) -> None:
    """Initialises every convolution in ``module`` by He's method (fan in); norm layers keep their ones and zeros."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
