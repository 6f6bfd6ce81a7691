"""Runs images and videos through a Predictor, one after another."""

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from dfn_fast.cli import IMAGES_BAR
from dfn_fast.data.datasets.cityscapes import TRAIN_ID_TO_LABEL_ID
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.errors import DataError, UserError, listed, printable
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.images import read_image, write_image, write_label
from dfn_fast.media.opening import decoded_bytes, open_image
from dfn_fast.media.overlays import overlay
from dfn_fast.predict.jobs import ImageJob, Job, VideoJob, described, require_names
from dfn_fast.predict.pipeline import Pipeline
from dfn_fast.predict.recording import Picture, Recording, in_time, picture_size

CUDA_BATCH = 8
READERS = 2
WRITERS = 4


def segment(predictor: Predictor, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images ``[H, W, 3]`` RGB uint8 -> class ids ``[H, W]`` uint8 of each."""
    return predictor(list(images))


class Prediction:
    """A run of the command: ``run_all(jobs)`` returns its exit code."""

    def __init__(self, predictor: Predictor, palette: np.ndarray, arguments: argparse.Namespace):
        self.predictor, self.palette, self.arguments = predictor, palette, arguments
        self.batch_size = arguments.batch_size or (CUDA_BATCH if predictor.device.type == "cuda" else 1)
        self.failures: dict[Job, str] = {}
        self.remarks: dict[str, list[str]] = defaultdict(list)  # on how images were read: those that it is true of
        self.frames = 0

    def run_all(self, jobs: list[Job]) -> int:
        """Runs the jobs, images first. Reports and skips a job that fails. Returns 1 if any failed, else 0."""
        start = time.perf_counter()
        try:
            self.run_images([job for job in jobs if isinstance(job, ImageJob)])
            for job in jobs:
                if isinstance(job, VideoJob):
                    self.run_video(job)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.arguments.output_dir}: {error}; the run ended there; --skip-existing continues it"
            ) from error
        self.summarize(jobs, time.perf_counter() - start)
        return 1 if self.failures else 0

    def run_images(self, jobs: list[ImageJob]) -> None:
        def report(job: ImageJob, error: UserError | None) -> None:
            bar.update()
            if error is not None:
                self.fail(job, error)

        with tqdm(total=len(jobs), disable=None if jobs else True, **IMAGES_BAR) as bar:
            pipeline: Pipeline[ImageJob, Picture, Picture] = Pipeline(
                self.read,
                self.run,
                self.write,
                report,
                batch_size=self.batch_size,
                readers=READERS,
                writers=WRITERS,
                size=picture_size,
                weigh=self.weigh,
            )
            pipeline(jobs)

    def weigh(self, job: ImageJob) -> int:
        """The bytes that reading an image takes; 0 if it cannot be read, which is said when it is."""

        def header() -> int:
            with contextlib.suppress(DataError), open_image(job.source) as image:
                return decoded_bytes(image)
            return 0

        return in_time(self.arguments, job.source, header)

    def read(self, job: ImageJob) -> Picture:
        require_names(job)
        remarks: list[str] = []
        image = in_time(self.arguments, job.source, lambda: read_image(job.source, remarks))
        for remark in remarks:
            self.remarks[remark].append(job.source)
        return Picture(image)

    def run_video(self, job: VideoJob) -> None:
        recording = Recording(job, self.run, self.write, self.draw, self.arguments, self.batch_size)
        try:
            require_names(job)
            recording()
        except UserError as error:
            self.fail(job, error)
        self.frames += recording.count

    def run(self, pictures: list[Picture]) -> list[Picture]:
        """Fills in the missing labels and borders of pictures of equal size."""
        images = [picture.image for picture in pictures if picture.labels is None]
        labels = segment(self.predictor, images) if images else []
        borders = [self.border(image) if self.arguments.border else None for image in images]
        new = map(Picture, images, labels, borders)
        return [next(new) if picture.labels is None else picture for picture in pictures]

    def border(self, image: np.ndarray) -> np.ndarray:
        return np.rint(self.predictor.border(image) * 255).astype(np.uint8)

    def draw(self, picture: Picture) -> np.ndarray:
        assert picture.labels is not None
        return overlay(picture.image, picture.labels, self.palette, self.arguments.alpha)

    def write(self, job: ImageJob, picture: Picture) -> None:
        assert picture.labels is not None
        for path in job.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        if job.overlay is not None:
            write_image(job.overlay, self.draw(picture))
        if job.border is not None and picture.border is not None:
            write_label(job.border, picture.border)
        if self.arguments.format == "cityscapes":
            write_label(job.label, TRAIN_ID_TO_LABEL_ID[picture.labels])
        else:
            write_label(
                job.label, picture.labels, VocDataset.palette if self.arguments.format == "voc" else self.palette
            )

    def fail(self, job: Job, error: UserError) -> None:
        text = str(error) if isinstance(error, DataError) else f"{printable(job.source)}: {error}"
        self.failures[job] = text
        tqdm.write(f"skipped: {text}", file=sys.stderr)

    def summarize(self, jobs: list[Job], seconds: float) -> None:
        done = [job for job in jobs if job not in self.failures]
        count = self.frames + sum(isinstance(job, ImageJob) for job in done)
        parts = [described(done)]
        if self.frames:
            parts.append(f"{self.frames} frames")
        if count:
            parts.append(f"{count / seconds:.2f} images/s")
        for remark, sources in self.remarks.items():
            print(printable(f"images that {remark}: {len(sources)} ({listed(sorted(sources))})"), file=sys.stderr)
        print(printable(f"{', '.join([*parts, self.predictor.describe()])}: {self.arguments.output_dir}"))
        if self.failures:
            texts = [self.failures[job] for job in jobs if job in self.failures]
            print("\n  ".join([f"{len(texts)} of {described(jobs)} failed:", *texts]), file=sys.stderr)
