"""The smallest possible backbone, for tests of the code around a network, not of what it computes."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from torch import nn

from dfn_fast.network.backbone import LAYERS, BasicBlock, ResNet, make_stage


class TinyResNet(ResNet):
    """Eight channels everywhere and a chosen number of basic blocks: a step takes a tenth of ResNet-18's time."""

    def __init__(self, depth: str, stem: str, norm_layer=nn.BatchNorm2d):
        nn.Module.__init__(self)
        self.depth, self.stem, self.channels = depth, stem, (8,) * 4
        _, counts = LAYERS[depth]
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            make_stage(BasicBlock, 8, 8, count, stride, norm_layer)
            for count, stride in zip(counts, (1, 2, 2, 2), strict=True)
        )


@contextlib.contextmanager
def tiny_backbones() -> Iterator[None]:
    """Networks built in this context have a :class:`TinyResNet` with stem "conv7"; "resnet18" has one block a stage."""
    with (
        patch("dfn_fast.network.reference.ResNet", TinyResNet),
        patch.dict(LAYERS, resnet18=(BasicBlock, (1, 1, 1, 1))),  # used to recognise bare weights
    ):
        yield
