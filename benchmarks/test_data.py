"""The input path: how much a worker of the loader does in a second.

``pytest benchmarks/test_data.py --benchmark-only``. Uses real images if ``DFN_CAMVID`` names CamVid's folder, otherwise
synthetic ones of that size, as PNG like CamVid's. The promise is 300 images/s on 12 cores, 25 a worker, with the
recipe's crop, flip, scales and border targets.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import measure
from dfn_fast.config import TrainConfig, recipe
from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.border import border_targets
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.normalize import normalize
from dfn_fast.data.registry import build_dataset
from dfn_fast.data.transforms import TrainTransform

pytestmark = pytest.mark.timeout(600)
PROMISED = 25.0  # images/s of one worker
IMAGES, SIZE = 24, (360, 480)  # CamVid's size


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    root = os.environ.get("DFN_CAMVID")
    if root:
        return build_dataset("camvid", root, "train")
    return build_dataset("folder", write_scenes(tmp_path_factory.mktemp("scenes")), "train", num_classes=8)


def write_scenes(folder: Path) -> Path:
    """Synthetic scenes, tiled up to CamVid's size, with noise so that they compress like photographs."""
    scenes = build_dataset("synthetic", None, "train")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(IMAGES):
        tiles = [scenes[20 * i + j] for j in range(20)]
        image, label = (
            np.concatenate([np.concatenate([getattr(t, name) for t in tiles[r : r + 5]], 1) for r in (0, 5, 10, 15)])
            for name in ("image", "label")
        )
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image[: SIZE[0], : SIZE[1]]).save(folder / "images" / f"{i:03}.png")
        Image.fromarray(label[: SIZE[0], : SIZE[1]]).save(folder / "masks" / f"{i:03}.png")
    return folder


def transform_of(config: TrainConfig) -> TrainTransform:
    return TrainTransform(config.crop, config.scales, config.flip, config.border_width)


def test_loader(camvid, benchmark, notes):
    """Whole samples in one process, as each worker makes them: decode, scale, crop, flip, border target, batch."""
    config = recipe("camvid")
    loader = TrainLoader(camvid, transform_of(config), batch_size=8, seed=0, workers=0)
    epochs = iter(range(10**6))

    def run() -> int:
        return sum(len(batch.names) for _, batch in zip(range(3), loader.epoch(next(epochs)), strict=False))

    benchmark.group = "loader, one worker"
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
    speed = 24 / benchmark.stats.stats.median
    benchmark.extra_info.update({"images_per_s": speed, "crop": list(config.crop), "promised_images_per_s": PROMISED})
    verdict = "kept" if speed >= PROMISED else "BROKEN"
    notes.append(
        f"{verdict}: the loader gives {speed:.1f} images/s a worker, {12 * speed:.0f} on 12; promised 25 and 300"
    )


@pytest.mark.parametrize("part", ["decode", "transform", "border target"])
def test_part(camvid, part, benchmark):
    """Where a sample's time goes. The transform includes the border target."""
    config = recipe("camvid")
    transform = transform_of(config)
    sample = camvid[0]
    parts = {
        "decode": lambda: camvid[0],
        "transform": lambda: transform(sample.image, sample.label, np.random.default_rng(0)),
        "border target": lambda: border_targets(sample.label, config.border_width),
    }
    benchmark.group = f"sample: {part}"
    benchmark(parts[part])


def test_normalize(benchmark):
    """The device's part: a batch of images is normalized."""
    images = torch.randint(256, (8, 3, 352, 480), dtype=torch.uint8, device=measure.DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    benchmark.group = "normalize 8x352x480"
    benchmark(lambda: (normalize(images), measure.synchronize()))
