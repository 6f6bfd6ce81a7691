"""A small network and its training checkpoint, for tests of the commands that read one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfn_fast.checkpoint.archive import save_atomic
from dfn_fast.network.reference import ReferenceDFN

CLASSES = ["ground", "thing", "other"]
PALETTE = np.array([[9, 9, 9], [200, 0, 0], [0, 0, 200]], np.uint8)
SETTINGS = {"backbone": "resnet18", "stem": "conv7", "channels": 8, "border_channels": 4}


def small_network(num_classes: int = len(CLASSES), border: bool = True) -> ReferenceDFN:
    """A small network with random weights, the same each time."""
    torch.manual_seed(0)
    return ReferenceDFN(num_classes, **SETTINGS, border=border).eval()


def save_checkpoint(model: ReferenceDFN, path: Path, **more: Any) -> Path:
    """Writes a training checkpoint of a three-class network for folder data, and ``more`` in it. Returns ``path``."""
    names = {"classes": CLASSES, "palette": PALETTE.tolist(), "dataset": "folder"}
    settings = {"num_classes": len(CLASSES), **SETTINGS}
    save_atomic({"format": 1, "model": model.state_dict(), "model_config": settings, **names, **more}, path)
    return path
