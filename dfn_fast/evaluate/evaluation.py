"""Measures how well a predictor does on a data set."""

import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from dfn_fast.cli import IMAGES_BAR
from dfn_fast.data.base import Sample, SegmentationDataset
from dfn_fast.data.border import border_targets, check_width
from dfn_fast.data.loader import sample_text
from dfn_fast.errors import ConfigError, DataError
from dfn_fast.evaluate.metrics import BorderScore, BoundaryFScore, ConfusionMatrix
from dfn_fast.evaluate.report import Report
from dfn_fast.inference.predictor import Predictor
from dfn_fast.runtime.processes import ALONE, World
from dfn_fast.runtime.signals import Stopped
from dfn_fast.runtime.time_limit import within

BORDER_WIDTH = 7  # pixels, of border targets
FILE_SECONDS = 300  # for one image with its label: a damaged file, or a lost disk, must not hold up everything


def evaluate(
    predictor: Predictor,
    dataset: SegmentationDataset,
    *,
    boundary: bool = True,
    border: bool = False,
    border_width: int = BORDER_WIDTH,
    limit: int | None = None,
    progress: bool = False,
    on_image: Callable[[], None] | None = None,
    world: World = ALONE,
    timeout: float = FILE_SECONDS,
) -> Report:
    """Predicts the images of a data set one by one and measures the result. Memory does not grow with their number.

    Args:
        boundary: measures the boundary F-score too, which takes longer than the other metrics.
        border: measures the Border Network too, against targets of ``border_width``.
        limit: stops after the first ``limit`` images.
        progress: shows a progress bar if standard error is a terminal.
        on_image: called after each image. Its exceptions end the evaluation, and ``Stopped`` does so in all processes.
        world: the processes that share the images; each gets the report on all images.
        timeout: seconds for one image with its label; 0: no limit.

    Raises :class:`ConfigError` if network and data set differ in their class count, or if ``limit`` or ``border_width``
    is not possible, and :class:`DataError` for a file that is not read in time.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1 image, got {limit}")
    check_width(border_width)
    K = dataset.num_classes
    if predictor.model.num_classes != K:
        raise ConfigError(
            f"the network has {predictor.model.num_classes} classes, but data set {dataset.name!r} has {K}"
        )
    confusion, contours, borders = ConfusionMatrix(K), BoundaryFScore(K), BorderScore()
    images = min(len(dataset), limit or len(dataset))
    start, stopped = time.perf_counter(), False
    try:
        for index in tqdm(images_of(world, images), disable=None if progress else True, **IMAGES_BAR):
            sample = _read(dataset, index, timeout)
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
    _add_up(world, confusion, contours, borders)
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


def _read(dataset: SegmentationDataset, index: int, seconds: float) -> Sample:
    def slow() -> DataError:
        what = sample_text(dataset, index)
        return DataError(f"{what} was not read within {seconds:g} s; is a file damaged, or its file system gone?")

    return within(seconds, lambda: dataset[index], slow)


def images_of(world: World, images: int) -> range:
    """The indices of this process's images; each image belongs to one process."""
    return range(world.rank, images, world.size)


def _add_up(world: World, confusion: ConfusionMatrix, contours: BoundaryFScore, borders: BorderScore) -> None:
    """Adds up the counts of all processes, in one reduction, into the metrics of each."""
    if world.size == 1:
        return
    # float64 holds counts below 2^53 exactly.
    means = torch.tensor([contours.total, contours.images], dtype=torch.float64)
    parts = [confusion.counts.cpu().double(), torch.from_numpy(borders.counts).double(), means]
    summed = world.sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    confusion.counts = summed[0].view_as(parts[0]).long()
    borders.counts = summed[1].view_as(parts[1]).long().numpy()
    contours.total, contours.images = float(summed[2][0]), int(summed[2][1])
