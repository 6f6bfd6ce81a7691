"""The reports of a training run: validation, pictures, summary, TensorBoard."""

import sys
from typing import Any

import numpy as np
import torch

from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.survey import survey
from dfn_fast.errors import ConfigError, OutputError
from dfn_fast.evaluate.evaluation import evaluate
from dfn_fast.evaluate.report import Report
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.machine import device_name, peak_memory_bytes, versions
from dfn_fast.runtime.signals import StopRequest
from dfn_fast.train.folder import RunFolder, naming
from dfn_fast.train.pictures import plot_curves, prediction_sheet
from dfn_fast.train.position import Position
from dfn_fast.trainer.trainer import Trainer

SHEET_ROWS = 4


def tell_of_data(train_set: SegmentationDataset, val_set: SegmentationDataset) -> None:
    """Prints how the data was read."""
    for note in dict.fromkeys([*train_set.notes, *val_set.notes]):
        print(f"note: {note}")


def look_at_labels(train_set: SegmentationDataset, val_set: SegmentationDataset) -> None:
    """Prints which classes no label has. Raises :class:`DataError` if the training labels hold fewer than two."""
    found = survey(train_set)
    found.require_trainable()
    for warning in found.warnings:
        print(f"warning: split {train_set.split!r}: {warning}", file=sys.stderr)
    found = survey(val_set)
    if found.read and found.complete and not found.present:
        print(
            f"warning: split {val_set.split!r} of {val_set.where} has no labelled pixel: no mIoU can be measured, and "
            "the newest network will count as the best",
            file=sys.stderr,
        )


def _predictor_of(trainer: Trainer, network: ReferenceDFN) -> Predictor:
    """A predictor with ``network``: one scale, no flip, whole images, the precision of training."""
    amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[trainer.amp]
    return Predictor(network, device=trainer.device, amp=amp)


def validate(trainer: Trainer, dataset: SegmentationDataset, stop: StopRequest) -> Report:
    """Measures the current network. Raises ``Stopped`` between two images on request."""
    predictor = _predictor_of(trainer, trainer.network())
    return evaluate(
        predictor,
        dataset,
        boundary=False,
        on_image=stop.raise_if_requested,
        world=trainer.world,
        timeout=trainer.config.loader_timeout,
    )


def draw(trainer: Trainer, network: ReferenceDFN, dataset: SegmentationDataset, folder: RunFolder) -> None:
    """Writes curves.png, and predictions.png with a few images spread over the split."""
    try:
        metrics = folder.metrics()
    except OutputError as error:
        print(f"{folder.curves} has no values: {error}", file=sys.stderr)
        metrics = []
    with naming(folder.curves):
        plot_curves(metrics, folder.curves)
    predictor = _predictor_of(trainer, network)
    rows = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, SHEET_ROWS).astype(int)):
        sample = dataset[int(index)]
        border = predictor.border(sample.image) if network.has_border else None
        rows.append((sample.image, sample.label, predictor(sample.image), border))
    with naming(folder.predictions):
        prediction_sheet(rows, dataset.classes, dataset.palette, folder.predictions)


def summarise(
    trainer: Trainer, position: Position, dataset: SegmentationDataset, images_per_second: float, checkpoint: str
) -> dict[str, Any]:
    """The content of summary.json. mIoU is a fraction, None without a labelled pixel; seconds are of training alone."""
    return {
        "best_mean_iou": position.best_mean_iou if position.best_mean_iou >= 0 else None,
        "last_mean_iou": position.last_mean_iou,
        "per_class_iou": dict(zip(dataset.classes, position.per_class_iou, strict=True)),
        "images_per_second": images_per_second,
        "seconds": position.seconds,
        "iterations": position.iteration,
        "skipped_steps": position.skipped_steps,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "split": f"{dataset.name} {dataset.split}",
        "scales": [1.0],
        "flip": False,
        "window": None,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "versions": versions(),
        "device": device_name(trainer.device),
        "execution": trainer.execution(),
        "checkpoint": checkpoint,
    }


class TensorBoard:
    """Writes scalars to TensorBoard if ``enabled``. A context manager that closes the file."""

    def __init__(self, folder: Any, enabled: bool):
        self.writer = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("--tensorboard needs a package; run pip install tensorboard") from error
            self.writer = SummaryWriter(str(folder))

    def add(self, record: dict[str, Any]) -> None:
        """Adds every float of a record of metrics.jsonl."""
        if self.writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{record['kind']}/{name}", value, record["iteration"])

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()
