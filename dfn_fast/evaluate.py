"""``python -m dfn_fast.evaluate``: the metrics of a checkpoint on a split of a data set."""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from dfn_fast import cli
from dfn_fast.atomic import write_text
from dfn_fast.border import border_targets
from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.registry import DATASETS, build_dataset
from dfn_fast.distributed import ALONE, World, processes
from dfn_fast.errors import ConfigError
from dfn_fast.execution import choose_algorithms, choose_device
from dfn_fast.inference import Predictor
from dfn_fast.inference_options import IMAGES_BAR, add_inference_options, predictor_from
from dfn_fast.interrupt import Stopped
from dfn_fast.loading import LoadedModel, load_model
from dfn_fast.metrics import BorderScore, BoundaryFScore, ConfusionMatrix
from dfn_fast.run_folder import finite

EXAMPLES = """\
examples:
  python -m dfn_fast.evaluate runs/camvid/best.pth --root CamVid
  python -m dfn_fast.evaluate best.pth --data voc --root VOCdevkit --scales 0.5 0.75 1 1.5 1.75 --flip
  python -m dfn_fast.evaluate best.pth --data cityscapes --root cityscapes --window 800 --json val.json
  python -m dfn_fast.evaluate dfn.pth --data voc --root VOCdevkit --preset torchseg
"""


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` measured, and how. Metrics are fractions; nan where there was nothing to measure."""

    dataset: str
    split: str
    images: int
    total_images: int  # of the split; more than ``images`` where a limit was given
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
        """Split, number of images, scales, flip and window: what every number below must be read with."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        if self.images < self.total_images:
            images = f"first {self.images} of {self.total_images} images"
        return f"{self.dataset} {self.split}, {images}, {self.inference}"

    def table(self) -> str:
        """Text: a line a class, then a line a metric; each names its conditions, so it can be copied alone."""
        summary = self.summary()
        width = max(len(name) for name in (*self.classes, *summary))

        def line(name: str, value: float, share: str = "") -> str:
            return f"{name:<{width}}  {fraction(value):>6}  {share:>7}  {self.conditions}"

        lines = [self.conditions, "", f"{'class':<{width}}  {'IoU':>6}  {'pixels':>7}"]
        for name, iou, share in zip(self.classes, self.per_class_iou, self.pixel_share, strict=True):
            lines.append(line(name, iou, f"{share:.2%}"))
        lines += ["", *(line(name, value) for name, value in summary.items()), ""]
        speed = f"{self.images / self.seconds:.2f} images/s with files and metrics, {self.seconds:.1f} s"
        lines.append(f"{speed}: {self.conditions}")
        return "\n".join(lines)

    def summary(self) -> dict[str, float]:
        """The metrics of the whole split by name."""
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
        """Plain values for JSON; None where a value is nan."""
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


BORDER_METRICS = {"F-score": "f_score", "precision": "precision", "recall": "recall"}


def fraction(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.4f}"


def evaluate(
    predictor: Predictor,
    dataset: SegmentationDataset,
    *,
    boundary: bool = True,
    border: bool = False,
    border_width: int = 7,
    limit: int | None = None,
    progress: bool = False,
    on_image: Callable[[], None] | None = None,
    world: World = ALONE,
) -> Report:
    """Predicts the images of a data set one by one and measures; memory does not grow with their number.

    Args:
        boundary: measures the boundary F-score too, which takes longer than the other metrics.
        border: measures the Border Network too, against targets of ``border_width``.
        limit: stops after the first ``limit`` images.
        progress: shows a bar, where standard error is a terminal.
        on_image: called after each image; what it raises ends the evaluation, ``Stopped`` in all processes.
        world: the processes that share the images; each gets the report of all of them.

    Raises :class:`ConfigError` where network and data set differ in their class count.
    """
    K = dataset.num_classes
    if predictor.model.num_classes != K:
        raise ConfigError(f"the network has {predictor.model.num_classes} classes, data set {dataset.name!r} has {K}")
    confusion, contours, borders = ConfusionMatrix(K), BoundaryFScore(K), BorderScore()
    images = min(len(dataset), limit or len(dataset))
    start, stopped = time.perf_counter(), False
    try:
        for index in tqdm(images_of(world, images), disable=None if progress else True, **IMAGES_BAR):
            sample = dataset[index]
            prediction = predictor(sample.image)
            confusion.update(sample.label, prediction)
            if boundary:
                contours.update(sample.label, prediction)
            if border:
                borders.update(border_targets(sample.label, border_width), predictor.border(sample.image))
            if on_image is not None:
                on_image()
    except Stopped:
        stopped = True
    if world.any(stopped):  # the others wait for this process's counts
        raise Stopped
    add_up(world, confusion, contours, borders)
    return Report(
        dataset=dataset.name,
        split=dataset.split,
        images=images,
        total_images=len(dataset),
        inference=predictor.describe(),
        settings=predictor.settings(),
        classes=dataset.classes,
        mean_iou=confusion.mean_iou,
        mean_accuracy=confusion.mean_accuracy,
        pixel_accuracy=confusion.pixel_accuracy,
        per_class_iou=tuple(confusion.per_class_iou.tolist()),
        pixel_share=tuple(confusion.pixel_share.tolist()),
        boundary_f_score=contours.value if boundary else None,
        border={**borders.best(), "width": border_width} if border else None,
        seconds=time.perf_counter() - start,
    )


def images_of(world: World, images: int) -> range:
    """The images of this process: each belongs to one."""
    return range(world.rank, images, world.size)


def add_up(world: World, confusion: ConfusionMatrix, contours: BoundaryFScore, borders: BorderScore) -> None:
    """Puts what all processes have counted into each one's metrics, by one sum over them."""
    if world.size == 1:
        return
    # float64 holds counts below 2^53 exactly.
    means = torch.tensor([contours.total, contours.images], dtype=torch.float64)
    parts = [confusion.counts.cpu().double(), torch.from_numpy(borders.counts).double(), means]
    summed = world.sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    confusion.counts = summed[0].view_as(parts[0]).long()
    borders.counts = summed[1].view_as(parts[1]).long().numpy()
    contours.total, contours.images = float(summed[2][0]), int(summed[2][1])


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from dfn_fast import __version__

    return {
        "dfn_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.evaluate",
        usage="%(prog)s CHECKPOINT [--data NAME] [--root DATA] [--split SPLIT] [options]",
        description="Measure a checkpoint on a split of a data set: IoU of each class, mIoU, mean and pixel accuracy,\n"
        "boundary F-score.",
        epilog=EXAMPLES,
    )
    result.add_argument("checkpoint", metavar="CHECKPOINT", help="of ours, of DFN's authors, or safetensors")
    data = result.add_argument_group("data")
    data.add_argument(
        "--data", choices=tuple(DATASETS), metavar="NAME", help=f"{', '.join(DATASETS)} (default: trained on)"
    )
    data.add_argument("--root", metavar="DATA", help="the data set's folder; `python -m dfn_fast.data list` shows it")
    data.add_argument("--split", metavar="SPLIT", help="default: the data set's validation split")
    data.add_argument("--num-classes", type=int, metavar="N", help="of folder or list data (default: the checkpoint's)")
    data.add_argument("--classes", metavar="FILE", help="class names of folder or list data, one a line")
    data.add_argument("--allow-outside-root", action="store_true", help="let lists name files not below --root")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of synthetic scenes (default: 0)")
    data.add_argument("--limit", type=int, metavar="N", help="the first N images alone")
    add_inference_options(result)
    result.add_argument("--deterministic", action="store_true", help="the same bits each time, slower on a GPU")
    metrics = result.add_argument_group("metrics")
    metrics.add_argument(
        "--no-boundary", action="store_true", help="leave out the boundary F-score, the slowest metric"
    )
    metrics.add_argument("--border", action="store_true", help="measure the Border Network too")
    metrics.add_argument(
        "--border-width", type=int, metavar="N", help="of the border targets (default: as in training, or 7)"
    )
    metrics.add_argument("--json", type=Path, metavar="FILE", help="write the metrics, settings and versions there too")
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: expected at least 1 image")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: its folder does not exist; make it first")
    if arguments.deterministic:
        choose_algorithms(True)
    with processes() as world:
        measure(arguments, world)
    return 0


def measure(arguments: argparse.Namespace, world: World) -> None:
    """The report that the options ask for, shown and written."""
    loaded = load_model(arguments.checkpoint, choose_device(arguments.device, world))
    predictor = predictor_from(arguments, loaded.model)
    if arguments.border and not loaded.model.has_border:
        raise ConfigError(f"--border: {arguments.checkpoint} has no Border Network; leave the option out")
    dataset = dataset_from(arguments, loaded)
    report = evaluate(
        predictor,
        dataset,
        boundary=not arguments.no_boundary,
        border=arguments.border,
        border_width=arguments.border_width or loaded.border_width or 7,
        limit=arguments.limit,
        progress=world.first,
        world=world,
    )
    print(report.table())
    if arguments.json is not None and world.first:
        content = {"checkpoint": arguments.checkpoint, "device": str(predictor.device), **report.to_dict()}
        try:
            write_text(arguments.json, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written ({error.strerror})") from error


def dataset_from(arguments: argparse.Namespace, loaded: LoadedModel) -> SegmentationDataset:
    """The data set that the options name, of the checkpoint's classes."""
    name = arguments.data or loaded.dataset
    if name not in DATASETS:
        raise ConfigError(f"--data is missing, and {arguments.checkpoint} does not say what it was trained on")
    entry, num_classes = DATASETS[name], arguments.num_classes
    borrowed = (
        entry.free_classes
        and num_classes is None
        and arguments.classes is None
        and not (Path(arguments.root or "") / "classes.txt").is_file()
    )
    dataset = build_dataset(
        name,
        arguments.root,
        arguments.split or entry.val,
        num_classes=loaded.model.num_classes if borrowed else num_classes,
        classes=arguments.classes,
        allow_outside_root=arguments.allow_outside_root,
        seed=arguments.seed,
    )
    if borrowed:
        dataset.classes, dataset.palette = loaded.classes, loaded.palette
    if dataset.num_classes != loaded.model.num_classes:
        trained = f", trained on {loaded.dataset}" if loaded.dataset else ""
        raise ConfigError(
            f"{arguments.checkpoint} has {loaded.model.num_classes} classes{trained}, data set {name!r} has "
            f"{dataset.num_classes}; choose the data set that it was trained on with --data, or another checkpoint"
        )
    if dataset.classes != loaded.classes:
        first = next(i for i, (a, b) in enumerate(zip(dataset.classes, loaded.classes, strict=True)) if a != b)
        print(
            f"note: class {first} is {dataset.classes[first]!r} in the data set and {loaded.classes[first]!r} in the "
            "checkpoint; the numbers below mean little unless both are the same thing",
            file=sys.stderr,
        )
    return dataset


if __name__ == "__main__":
    cli.run(main)
