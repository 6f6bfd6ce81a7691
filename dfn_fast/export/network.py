"""The exported network with its input and output, and its metadata."""

import json

import torch
from torch import Tensor, nn

from dfn_fast.data.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize, scale_and_shift
from dfn_fast.inference.loading import LoadedModel
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN


class Labels(nn.Module):
    """RGB images, uint8 ``[B, H, W, 3]`` -> class ids, uint8 ``[B, H, W]``: normalisation, network and argmax."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network = network
        scale, shift = scale_and_shift(device, torch.float32)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, image: Tensor) -> Tensor:
        data = normalize(image.permute(0, 3, 1, 2), constants=(self.scale, self.shift))  # type: ignore[arg-type]
        return self.network(data).argmax(1).to(torch.uint8)


def inference_network(model: ReferenceDFN) -> nn.Module:
    """The network with its batch norms folded and only plain operators, in eval mode."""
    return FusedDFN(model, plain=True)


def metadata(loaded: LoadedModel, labels: bool) -> dict[str, str]:
    """The metadata for users of the file; values are JSON or text."""
    normalised = "RGB, (value / 255 - mean) / std, float32 [B, 3, H, W]"
    return {
        "classes": json.dumps(loaded.classes),
        "palette": json.dumps(loaded.palette.tolist()),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "input": "RGB, uint8 [B, H, W, 3]" if labels else normalised,
        "output": "class ids, uint8 [B, H, W]" if labels else "log-probabilities, float32 [B, K, H, W]",
    }
