"""Runs of many steps that take little time, in a separate process. ``python long_runs.py train FOLDER`` and
``python long_runs.py predict IMAGES`` print a list of :func:`usage` over the run as JSON."""

import gc
import json
import os
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import torch

from dfn_fast.config import TrainConfig
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.fast import FastDFN
from dfn_fast.predict.pipeline import Pipeline
from dfn_fast.runtime.signals import StopRequest
from dfn_fast.train.folder import RunFolder
from dfn_fast.train.run import Run
from support.tiny_resnet import tiny_backbones

ITERATIONS, BLOCK = 2000, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def usage() -> dict[str, int]:
    """The resources that the process holds after a garbage collection."""
    gc.collect()
    held = {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
    }
    if DEVICE == "cuda":
        held |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return held


class WatchedRun(Run):
    """A run that records its usage whenever it writes a line of metrics."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.usage: list[dict[str, int]] = []

    def log_step(self, loss, board):
        super().log_step(loss, board)
        self.usage.append(usage())


def write_images(folder: Path, count: int) -> None:
    """A data set of two classes, in the layout of ``--data folder``."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(count if split == "train" else 2):
            label = rng.integers(0, 2, (4, 4), np.uint8).repeat(10, 0).repeat(10, 1)
            cv2.imwrite(str(folder / split / "masks" / f"{i}.png"), label)
            cv2.imwrite(str(folder / split / "images" / f"{i}.png"), np.stack([label * 99] * 3, -1))
    (folder / "classes.txt").write_text("ground\nblob\n")


def train(folder: Path) -> list[dict[str, int]]:
    """Trains a whole run, with a loader process, metrics, validation and checkpoints. oneDNN is off, because looking up
    its primitives would take half of the time."""
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    write_images(folder / "data", 400)
    # fmt: off
    config = TrainConfig(
        data="folder", root=str(folder / "data"), crop=(32, 32), scales=(0.75, 1.0), border_width=3, workers=1,
        backbone="resnet18", stem="conv7", channels=8, border_channels=4, batch_size=2, lr=1e-4, compile=False,
        device=DEVICE, iterations=ITERATIONS, log_every=25, checkpoint_every=100, val_every=2,
        deep_supervision=False,
    )
    # fmt: on
    with tiny_backbones():
        run = WatchedRun(config, RunFolder(folder / "run"), StopRequest())
    run.folder.path.mkdir()
    run.train()
    assert run.position.iteration == ITERATIONS
    return run.usage


def predict(count: int) -> list[dict[str, int]]:
    """Predicts ``count`` images of different sizes through the pipeline of ``dfn_fast.predict``."""
    with tiny_backbones():
        model = FastDFN(3, backbone="resnet18", stem="conv7", channels=8, border_channels=4)
    model.eval()
    settings = ({}, {"scales": (0.75, 1.25), "flip": True}, {"window": 48})
    predictors = [Predictor(model, device=DEVICE, amp="off", graph_cache_bytes=1 << 24, **s) for s in settings]
    rng = np.random.default_rng(0)
    sizes = rng.choice(64 * 64, count, replace=False)  # all different
    images = [rng.integers(0, 256, (33 + n // 64, 33 + n % 64, 3), np.uint8) for n in sizes.tolist()]
    found, shapes = [], []

    def write(number: int, labels: np.ndarray) -> None:
        shapes.append((number, labels.shape))

    for begin in range(0, count, BLOCK):
        predictor = predictors[begin // BLOCK % len(predictors)]
        Pipeline(images.__getitem__, predictor, write, lambda number, error: None)(range(begin, begin + BLOCK))
        assert sorted(shapes) == [(i, images[i].shape[:2]) for i in range(begin, begin + BLOCK)]
        shapes.clear()
        found.append(usage())
    return found


if __name__ == "__main__":
    cv2.setNumThreads(1)
    gc.freeze()  # objects made by the imports are neither searched nor counted
    result = train(Path(sys.argv[2])) if sys.argv[1] == "train" else predict(int(sys.argv[2]))
    print(json.dumps(result))
