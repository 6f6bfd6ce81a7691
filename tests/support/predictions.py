"""Runs of ``dfn_fast.predict``: images to predict, the command itself, and its output files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dfn_fast.predict import prediction
from dfn_fast.predict.__main__ import main


def picture(seed: int, height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def files(folder: str | Path) -> list[str]:
    """All files below a folder, as paths relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def run(*arguments: object) -> int:
    """Runs the command on the CPU. Returns its exit code."""
    return main([*map(str, arguments), "--device", "cpu"])


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of each file except videos: tests compare their decoded frames."""
    return {name: Path(folder, name).read_bytes() for name in files(folder) if not name.endswith(".mp4")}


@contextlib.contextmanager
def segmenting(stop_after: int | None = None) -> Iterator[list[int]]:
    """Interrupts segmenting in this context at the image after ``stop_after``. Yields the sizes of the batches run."""
    plain, batches = prediction.segment, []

    def segment(predictor, images):
        if stop_after is not None and sum(batches) + len(images) > stop_after:
            raise KeyboardInterrupt
        assert len({image.shape for image in images}) == 1
        batches.append(len(images))
        return plain(predictor, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "segment", segment)
        yield batches
