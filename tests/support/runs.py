"""Training runs of a second or two, and their comparison: every bit must match, except for times."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

from dfn_fast.network.backbone import LAYERS, BasicBlock
from dfn_fast.train.folder import RunFolder

# Twelve iterations in four epochs, two validations, and a checkpoint after iterations 0, 2, 3, 4, 6, 8, 9, 10 and 12.
SMALL_RUN = "synthetic --backbone resnet18 --channels 8 --no-border --no-deep-supervision --crop 32 --batch-size 3"
SMALL_RUN += " --workers 0 --device cpu --amp off --log-every 1 --checkpoint-every 2 --epochs 4 --val-every 2"

# Six iterations in two epochs on the folder of tests/train/conftest.py.
TINY_RUN = "--data folder --backbone resnet18 --channels 8 --border-channels 4 --crop 48 --batch-size 3 --lr 0.001"
TINY_RUN += " --border-width 3 --workers 0 --log-every 1 --device cpu --scales 0.75 1 --epochs 2"


class ThinBlock(BasicBlock):
    """A residual block with few weights, so checkpoints are small and quick to write."""

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None, norm_layer):
        super().__init__(1, 1, stride, downsample, norm_layer)
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, stride, bias=False), norm_layer(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1, bias=False), norm_layer(width)


@contextlib.contextmanager
def small_runs() -> Iterator[None]:
    """Makes ``SMALL_RUN`` small: few weights, few scenes, and no pictures, which take as long as the rest."""
    with (
        patch.dict(LAYERS, resnet18=(ThinBlock, (1, 1, 1, 1))),
        patch("dfn_fast.data.datasets.synthetic.LENGTHS", {"train": 9, "val": 2}),
        patch("dfn_fast.train.__main__.draw"),
    ):
        yield


def write_blobs(folder: Path, train: int, val: int, step: int, ignored: int = 0) -> None:
    """Writes a data set of bright blobs on dark ground, each ``step`` rows below the one before. Each image has
    ``ignored`` more columns with label 255 than the one before."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            label = np.zeros((48, 40), np.uint8)
            label[step * i + 2 : step * i + 20, 10:30] = 1
            image = rng.integers(0, 60, (48, 40, 3)) + 150 * label[..., None]
            label[:, : ignored * i] = 255
            for kind, array in (("images", image.astype(np.uint8)), ("masks", label)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / split / kind / f"{i:02}.png")
    (folder / "classes.txt").write_text("ground\nblob\n")


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places where two checkpoints differ by even one bit, except for times."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [
            x
            for key in a
            if key not in ("seconds", "output_dir")
            for x in differences(a[key], b[key], f"{where}.{key}")
        ]
    if isinstance(a, list | tuple):
        return [x for i, pair in enumerate(zip(a, b, strict=True)) for x in differences(*pair, f"{where}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def timeless_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [{**record, "images_per_second": 0, "seconds": 0} for record in run.metrics()]
