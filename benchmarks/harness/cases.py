"""The operators at the shapes that are measured: those of DFN-R101 on a GPU, small ones on a CPU.

Byte counts are the least that any implementation must move: the operators' docstrings. Operations are those of the
definition: :data:`LERP` for each resized number, and each other arithmetic operation or function of a number one.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import DEVICE, Case, tensors

FEATURES = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SCALES = (0.5, 0.75, 1, 1.5, 1.75)  # the paper's
LERP = 8  # a bilinear sample: four products, three additions, and one to add it to another value
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _operator(module: str, name: str) -> tuple[Callable, Callable]:
    """The definition and the public function."""
    loaded = importlib.import_module(f"dfn_kernels.{module}")
    return getattr(loaded, f"{name}_ref"), getattr(loaded, name)


def _features(*shape: int, dtype: torch.dtype = FEATURES) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _labels(classes: int, *shape: int) -> Tensor:
    """Random classes, one pixel in ten ignored."""
    labels = torch.randint(classes, shape, dtype=torch.uint8)
    return labels.masked_fill_(torch.rand(shape) < 0.1, 255)


def _bytes(*values: Any) -> int:
    return sum(x.nbytes for x in tensors(values))


def channel_attention(batch: int, channels: int, low: int, high: int, training: bool) -> Case:
    def inputs() -> list[Tensor]:
        linear = [torch.nn.Linear(2 * channels, channels), torch.nn.Linear(channels, channels)]
        weights = [p.detach() for layer in linear for p in (layer.weight, layer.bias)]
        return [_features(batch, channels, low, low), _features(batch, channels, high, high), *weights]

    return Case(
        "channel_attention",
        f"{batch}x{channels}x{low}x{low} high {high}",
        *_operator("attention.channel_attention", "channel_attention"),
        inputs,
        forward_bytes=lambda low, high, *weights: 3 * _bytes(low) + 2 * _bytes(high) + _bytes(*weights),
        # Means, gate and the resized high; both linear layers.
        forward_flops=lambda low, high, *weights: (3 + LERP) * low.numel() + batch * 6 * channels**2,
        # The gradient twice, low once, d_low and d_high.
        backward_bytes=lambda low, high, *weights: 4 * _bytes(low) + _bytes(high) + 2 * _bytes(*weights),
        training=training,
    )


def upsample_add(batch: int, channels: int, low: int, high: int, training: bool) -> Case:
    return Case(
        "upsample_add",
        f"{batch}x{channels}x{low}x{low} high {high}",
        *_operator("attention.upsample_add", "upsample_add"),
        lambda: [_features(batch, channels, low, low), _features(batch, channels, high, high)],
        forward_bytes=lambda low, high: 2 * _bytes(low) + _bytes(high),
        forward_flops=lambda low, high: LERP * low.numel(),
        backward_bytes=lambda low, high: _bytes(low) + _bytes(high),
        training=training,
    )


def cross_entropy(batch: int, classes: int, small: int, full: int) -> Case:
    return Case(
        "upsample_cross_entropy",
        f"{batch}x{classes}x{small}x{small} to {full}",
        *_operator("losses.cross_entropy", "upsample_cross_entropy"),
        lambda: [_features(batch, classes, small, small), _labels(classes, batch, full, full)],
        forward_bytes=_bytes,
        # Maximum, difference, exponential, sum.
        forward_flops=lambda logits, labels: (LERP + 4) * classes * labels.numel(),
        backward_bytes=lambda logits, labels: _bytes(logits),
        training=True,
        memory_limit=1 / 3,
    )


def focal_loss(batch: int, small: int, full: int) -> Case:
    return Case(
        "upsample_focal_loss",
        f"{batch}x1x{small}x{small} to {full}",
        *_operator("losses.focal_loss", "upsample_focal_loss"),
        lambda: [_features(batch, 1, small, small), _labels(2, batch, full, full)],
        forward_bytes=_bytes,
        # Sign, two sigmoids, logarithm, power, alpha, weight, sum.
        forward_flops=lambda logits, targets: (LERP + 8) * targets.numel(),
        backward_bytes=lambda logits, targets: _bytes(logits),
        training=True,
        memory_limit=1 / 3,
    )


def multiscale_argmax(batch: int, classes: int, height: int, width: int) -> Case:
    """Scores at stride 4 of the paper's five scales, each with its mirror image."""
    flipped = [False, True] * len(SCALES)
    sizes = [(int(height * s) // 4, int(width * s) // 4) for s in SCALES for _ in range(2)]
    reference, ours = _operator("images.multiscale_argmax", "multiscale_argmax")
    return Case(
        "multiscale_argmax",
        f"{batch}x{classes}x{height}x{width} 5 scales flip",
        lambda *logits: reference(list(logits), (height, width), flipped=flipped)[0],
        lambda *logits: ours(list(logits), (height, width), flipped=flipped),
        lambda: [_features(batch, classes, *size) for size in sizes],
        forward_bytes=lambda *logits: _bytes(*logits) + batch * height * width,
        # As in the softmax loss, then the sum over the maps.
        forward_flops=lambda *logits: len(logits) * (LERP + 5) * classes * batch * height * width,
    )


def resize_normalize(batch: int, source: tuple[int, int], size: tuple[int, int]) -> Case:
    reference, ours = _operator("images.resize_normalize", "resize_normalize")
    settings = {"flip": True, "dtype": FEATURES}
    written = 2 * batch * 3 * size[0] * size[1] * FEATURES.itemsize
    return Case(
        "resize_normalize",
        f"{batch}x{source[0]}x{source[1]}x3 to {size[0]}x{size[1]} flip",
        lambda images: reference(images, size, MEAN, STD, **settings),
        lambda images: ours(images, size, MEAN, STD, **settings),
        lambda: [torch.randint(256, (batch, *source, 3), dtype=torch.uint8)],
        forward_bytes=lambda images: _bytes(images) + written,
        forward_flops=lambda images: (LERP + 2) * written // FEATURES.itemsize,
    )


def gpu_cases() -> Iterator[Case]:
    """DFN-R101 at 512 x 512: batch 32 in training, 1 and 16 in inference."""
    stages = [(16, 1), (32, 16), (64, 32), (128, 64)]  # low, high; the first high is the global context
    for batch, training in ((32, True), (1, False), (16, False)):
        yield from (channel_attention(batch, 512, low, high, training) for low, high in stages)
    yield from (upsample_add(32, channels, 128, high, True) for channels in (24, 512) for high in (64, 32, 16))
    yield from (cross_entropy(32, 21, small, 512) for small in (128, 64, 32, 16))
    yield focal_loss(32, 128, 512)
    for batch, classes, height, width in ((1, 21, 512, 512), (16, 21, 512, 512), (1, 19, 1024, 2048)):
        yield multiscale_argmax(batch, classes, height, width)
    for batch, scale in ((1, 1), (1, 1.75), (16, 0.5), (16, 1.75)):
        yield resize_normalize(batch, (1024, 2048), (int(1024 * scale), int(2048 * scale)))


def cpu_cases() -> Iterator[Case]:
    """Small enough for a laptop, large enough that the calls' own cost does not dominate."""
    yield channel_attention(2, 128, 64, 32, True)
    yield upsample_add(2, 128, 64, 32, True)
    yield cross_entropy(4, 21, 128, 512)
    yield focal_loss(4, 128, 512)
    yield multiscale_argmax(1, 21, 256, 256)
    yield resize_normalize(2, (512, 1024), (384, 768))
