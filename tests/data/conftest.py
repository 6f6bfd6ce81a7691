"""Small data sets on disk, written with Pillow only."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("a/b.png", array)``, ``write("a/b.txt", "text")`` or ``write("a/b.png", b"...")`` below ``tmp_path``."""

    def write(name: str, content: np.ndarray | str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_bytes(content)
        return path

    return write


@pytest.fixture
def write_pair(write: Write) -> Write:
    """``write_pair("images/a.jpg", "masks/a.png", fill=3)``: random 6 x 4 pixels, and a label that is ``fill``."""
    rng = np.random.default_rng(0)

    def write_pair(image: str, label: str, *, fill: int = 0) -> Path:
        write(image, rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        return write(label, np.full((4, 6), fill, np.uint8))

    return write_pair
