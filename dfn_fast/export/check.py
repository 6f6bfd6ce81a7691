"""Compares an exported file with the network it came from."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from dfn_fast.data.normalize import normalize
from dfn_fast.export.formats import quiet, read
from dfn_fast.network.reference import ReferenceDFN

# The largest difference allowed, as a share of the range of the log-probabilities.
TOLERANCE = 1e-4
TOLERANCE_TF32 = 1e-2  # by default, convolutions on a GPU keep ten bits of their inputs


def random_images(shape: tuple[int, int, int], labels: bool, device: torch.device) -> Tensor:
    """Random input of the exported network. ``shape`` is batch, height and width."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    if labels:
        return torch.randint(256, (batch, height, width, 3), generator=generator, dtype=torch.uint8).to(device)
    return torch.randn(batch, 3, height, width, generator=generator).to(device)


def compare(path: Path, file_format: str, model: ReferenceDFN, shapes: list[tuple[int, int, int]], labels: bool) -> int:
    """Compares the file with the model and prints the largest differences.

    Returns the exit code: 1 if they differ, or if the file does not load or run. The file is kept.
    """
    device = next(model.parameters()).device
    images = [random_images(shape, labels, device) for shape in shapes]
    try:
        with torch.no_grad(), quiet():
            exported = read(path, file_format)
            results = [exported(image) for image in images]
    except Exception as error:  # whatever the error, the file cannot be used
        print(f"FAILED: {path} does not load or run: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    code = 0
    for (batch, height, width), image, result in zip(shapes, images, results, strict=True):
        largest, allowed = difference(result, model, image)
        passed = largest <= allowed  # False for nan
        verdict = f"largest difference {largest:.3g}, tolerance {allowed:.3g}: {'ok' if passed else 'FAILED'}"
        print(f"batch {batch}, {height}x{width}: {verdict}")
        code |= not passed
    if code:
        print(f"{path} does not give the same results as the model; it is kept, but do not deploy it", file=sys.stderr)
    return code


@torch.no_grad()
def difference(result: Tensor, model: ReferenceDFN, image: Tensor) -> tuple[float, float]:
    """The largest difference from the model's log-probabilities, and the largest allowed.

    For labels it is how far the label's log-probability lies below the pixel's largest. It is infinite if shape, dtype
    or a label is impossible.
    """
    labels = image.dtype == torch.uint8
    expected = model(normalize(image.permute(0, 3, 1, 2)) if labels else image)  # [B, K, H, W]
    tolerance = TOLERANCE_TF32 if image.is_cuda and torch.backends.cudnn.allow_tf32 else TOLERANCE
    allowed = tolerance * (expected.max() - expected.min()).item()
    like = expected.argmax(1).to(torch.uint8) if labels else expected
    if result.shape != like.shape or result.dtype != like.dtype or (labels and result.max() >= expected.shape[1]):
        return float("inf"), allowed
    if labels:
        chosen = expected.gather(1, result[:, None].long())[:, 0]
        return (expected.amax(1) - chosen).max().item(), allowed
    return (result - expected).abs().max().item(), allowed
