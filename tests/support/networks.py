"""Small float64 networks with weights as after training, and batches for them, for the tests of both networks."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dfn_fast.network.backbone import LAYERS, BasicBlock, NormLayer, ResNet, conv3x3, initialise, make_stage
from dfn_fast.network.reference import ReferenceDFN

SMALL = {"backbone": "resnet18", "channels": 16, "border_channels": 6}
SWITCHES = ("global_context", "channel_attention", "deep_supervision", "border")
# The paper's tables 2 and 3, row by row. Each row adds one part.
ABLATIONS = {
    "RRB only": dict.fromkeys(SWITCHES, False),
    "+ global pooling": {**dict.fromkeys(SWITCHES, False), "global_context": True},
    "+ CAB": {"global_context": True, "channel_attention": True, "deep_supervision": False, "border": False},
    "+ deep supervision": {**dict.fromkeys(SWITCHES, True), "border": False},
    "+ border network": dict.fromkeys(SWITCHES, True),
}
VARIANTS = [
    ({}, (64, 64)),
    ({}, (33, 47)),  # no size is a multiple of the next
    ({"stem": "conv7"}, (65, 40)),
    ({"backbone": "resnet50"}, (32, 32)),  # the smallest size, with bottlenecks
    *((switches, (40, 48)) for switches in ABLATIONS.values()),
]
VARIANT_NAMES = ["deep", "odd", "conv7", "resnet50", *ABLATIONS]

WIDTHS = (8, 16, 32, 64)


class NarrowResNet(ResNet):
    """A ResNet with the published blocks, names and strides, but an eighth as wide."""

    def __init__(self, depth: str, stem: str, norm_layer: NormLayer):
        nn.Module.__init__(self)
        block, counts = LAYERS[depth]
        self.depth, self.stem = depth, stem
        self.channels = tuple(width * block.expansion for width in WIDTHS)
        if stem == "deep":
            first = [conv3x3(3, 8, stride=2), norm_layer(8), nn.ReLU(inplace=True)]
            first += [conv3x3(8, 8), norm_layer(8), nn.ReLU(inplace=True), conv3x3(8, 16)]
            self.conv1, inputs = nn.Sequential(*first), 16
        else:
            self.conv1, inputs = nn.Conv2d(3, 8, 7, 2, 3, bias=False), 8
        self.bn1, self.relu, self.maxpool = norm_layer(inputs), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        stages = []
        for width, outputs, count, stride in zip(WIDTHS, self.channels, counts, (1, 2, 2, 2), strict=True):
            stages.append(make_stage(block, inputs, width, count, stride, norm_layer))
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        initialise(self)


def narrow_resnet(depth: str, stem: str, norm_layer: NormLayer) -> ResNet:
    wide = depth in ("resnet101", "resnet152") or depth not in LAYERS
    return (ResNet if wide else NarrowResNet)(depth, stem, norm_layer)


@contextlib.contextmanager
def narrow_backbones(resnet18: int = 2) -> Iterator[None]:
    """Networks built in this context have narrow backbones, except for ResNet-101 and 152. ``resnet18`` is the number
    of blocks in each stage of ResNet-18: fewer operators compile faster."""
    blocks = {"resnet18": (BasicBlock, (resnet18,) * 4)}
    with patch("dfn_fast.network.reference.ResNet", narrow_resnet), patch.dict(LAYERS, blocks):
        yield


@contextlib.contextmanager
def published_backbones() -> Iterator[None]:
    """Networks built in this context have the published widths, even inside :func:`narrow_backbones`."""
    with patch("dfn_fast.network.reference.ResNet", ResNet):
        yield


def random_dfn(num_classes: int = 5, network: type[ReferenceDFN] = ReferenceDFN, **settings) -> ReferenceDFN:
    """A small float64 network with random norm layers and biases, as after training."""
    torch.manual_seed(0)
    model = network(num_classes, **{**SMALL, **settings}).double()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "bn.weight")) or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(torch.randn(tensor.shape) / 4)
    return model


def batch(size: tuple[int, int], count: int = 2, num_classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 images, labels and border targets; a fifth of the pixels are ignored."""
    torch.manual_seed(1)
    labels = torch.randint(num_classes, (count, *size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    borders = torch.randint(2, (count, *size))
    borders[labels == 255] = 255
    return torch.randn(count, 3, *size, dtype=torch.float64), labels, borders
