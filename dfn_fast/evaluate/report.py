"""The numbers of an evaluation."""

import math
from dataclasses import dataclass
from typing import Any

from dfn_fast.files import finite
from dfn_fast.runtime.machine import versions

BORDER_METRICS = {"F-score": "f_score", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Report:
    """The metrics of :func:`evaluate`, and its settings. Metrics are fractions; nan if there was nothing to measure."""

    dataset: str
    split: str
    images: int
    total_images: int  # in the split; more than ``images`` if a limit was given
    inference: str  # scales, flip and window in words
    settings: dict[str, Any]  # the same as values
    classes: tuple[str, ...]
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    per_class_iou: tuple[float, ...]
    pixel_share: tuple[float, ...]  # of each class among the labelled pixels
    boundary_f_score: float | None  # None: not asked for
    border: dict[str, float] | None  # threshold, precision, recall, f_score, width; None: not asked for
    seconds: float

    @property
    def conditions(self) -> str:
        """Data set, split, number of images, scales, flip and window: every number depends on them."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        if self.images < self.total_images:
            images = f"first {self.images} of {self.total_images} images"
        return f"{self.dataset} {self.split}, {images}, {self.inference}"

    def table(self) -> str:
        """Returns text: a line per class and per metric. Each states its conditions, so it can be copied by itself."""
        summary = self.summary()
        width = max(len(name) for name in (*self.classes, *summary))

        def line(name: str, value: float, share: str = "") -> str:
            return f"{name:<{width}}  {_fraction(value):>6}  {share:>7}  {self.conditions}"

        lines = [self.conditions, "", f"{'class':<{width}}  {'IoU':>6}  {'pixels':>7}"]
        for name, iou, share in zip(self.classes, self.per_class_iou, self.pixel_share, strict=True):
            lines.append(line(name, iou, f"{share:.2%}"))
        if math.isnan(self.pixel_accuracy):
            lines += ["", f"these images have no labelled pixel, so there is nothing to measure: {self.conditions}"]
        lines += ["", *(line(name, value) for name, value in summary.items()), ""]
        speed = f"{self.images / self.seconds:.2f} images/s with files and metrics, {self.seconds:.1f} s"
        lines.append(f"{speed}: {self.conditions}")
        return "\n".join(lines)

    def summary(self) -> dict[str, float]:
        """The metrics of the whole split, by name."""
        values = {
            "mIoU": self.mean_iou,
            "mean accuracy": self.mean_accuracy,
            "pixel accuracy": self.pixel_accuracy,
        }
        if self.boundary_f_score is not None:
            values["boundary F-score"] = self.boundary_f_score
        if self.border is not None:
            at = f"border network (width {self.border['width']:g}, threshold {self.border['threshold']:.2f})"
            values |= {f"{at} {name}": self.border[key] for name, key in BORDER_METRICS.items()}
        return values

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, with None for nan."""
        return finite(
            {
                "conditions": self.conditions,
                "dataset": self.dataset,
                "split": self.split,
                "images": self.images,
                "total_images": self.total_images,
                **self.settings,
                "mean_iou": self.mean_iou,
                "mean_accuracy": self.mean_accuracy,
                "pixel_accuracy": self.pixel_accuracy,
                "boundary_f_score": self.boundary_f_score,
                "border": self.border,
                "per_class_iou": dict(zip(self.classes, self.per_class_iou, strict=True)),
                "pixel_share": dict(zip(self.classes, self.pixel_share, strict=True)),
                "seconds": self.seconds,
                "images_per_second": self.images / self.seconds,
                "versions": versions(),
            }
        )


def _fraction(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.4f}"
