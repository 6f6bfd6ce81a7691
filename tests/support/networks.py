"""Small networks in float64 with weights as after training, and batches for them: what the tests of both share."""

import torch
from torch import Tensor

from dfn_fast.network.reference import ReferenceDFN

SMALL = {"backbone": "resnet18", "channels": 16, "border_channels": 6}
SWITCHES = ("global_context", "channel_attention", "deep_supervision", "border")
# The paper's tables 2 and 3, row by row; each adds one part.
ABLATIONS = {
    "RRB only": dict.fromkeys(SWITCHES, False),
    "+ global pooling": {**dict.fromkeys(SWITCHES, False), "global_context": True},
    "+ CAB": {"global_context": True, "channel_attention": True, "deep_supervision": False, "border": False},
    "+ deep supervision": {**dict.fromkeys(SWITCHES, True), "border": False},
    "+ border network": dict.fromkeys(SWITCHES, True),
}
VARIANTS = [
    ({}, (64, 64)),
    ({}, (33, 47)),  # no size divides the next
    ({"stem": "conv7"}, (65, 40)),
    ({"backbone": "resnet50"}, (32, 32)),  # the smallest, and bottlenecks
    *((switches, (40, 48)) for switches in ABLATIONS.values()),
]
VARIANT_NAMES = ["deep", "odd", "conv7", "resnet50", *ABLATIONS]


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
    """Random float64 images, labels and border targets; a fifth of the pixels is ignored."""
    torch.manual_seed(1)
    labels = torch.randint(num_classes, (count, *size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    borders = torch.randint(2, (count, *size))
    borders[labels == 255] = 255
    return torch.randn(count, 3, *size, dtype=torch.float64), labels, borders
