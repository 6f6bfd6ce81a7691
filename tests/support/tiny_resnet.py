"""The smallest backbone there can be: for tests that ask what surrounds a network, not what it computes."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from torch import nn

from dfn_fast.network.backbone import LAYERS, BasicBlock, ResNet, make_stage


class TinyResNet(ResNet):
    """Eight channels and a block in each stage: a step takes a tenth of that with the least of ResNets."""

    def __init__(self, depth: str, stem: str, norm_layer=nn.BatchNorm2d):
        nn.Module.__init__(self)
        self.depth, self.stem, self.channels = depth, stem, (8,) * 4
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            make_stage(BasicBlock, 8, 8, 1, stride, norm_layer) for stride in (1, 2, 2, 2)
        )


@contextlib.contextmanager
def tiny_backbones() -> Iterator[None]:
    """Within it every network is built with a :class:`TinyResNet`; its stem is to be "conv7"."""
    with (
        patch("dfn_fast.network.reference.ResNet", TinyResNet),
        patch.dict(LAYERS, resnet18=(BasicBlock, (1, 1, 1, 1))),  # what bare weights are recognised by
    ):
        yield
