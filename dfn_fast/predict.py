"""``python -m dfn_fast.predict``: images, folders, videos or cameras -> label maps, overlays and a legend."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dfn_fast import cli
from dfn_fast.data.cityscapes import TRAIN_ID_TO_LABEL_ID
from dfn_fast.data.files import read_image, write_image, write_label
from dfn_fast.data.voc import VocDataset
from dfn_fast.errors import ConfigError, DataError, UserError
from dfn_fast.execution import choose_device
from dfn_fast.inference import Predictor
from dfn_fast.inference_options import IMAGES_BAR, add_inference_options, predictor_from
from dfn_fast.loading import LoadedModel, load_model
from dfn_fast.pipeline import Pipeline
from dfn_fast.predict_jobs import ImageJob, Job, VideoJob, described, jobs_for, require_writable
from dfn_fast.predict_video import Picture, Recording, picture_size
from dfn_fast.visualize import legend, overlay

FORMATS = ("plain", "voc", "cityscapes")
SERVER_CLASSES = {"voc": 21, "cityscapes": 19}
CUDA_BATCH = 8
READERS = 2
WRITERS = 4

EPILOG = """\
--output-dir gets, for INPUT photos/ with photos/night/a.jpg:
  night/a.png            class ids, with the data set's palette, at the image's size
  night/a_overlay.png    the image with the classes' colours over it
  night/a_border.png     with --border: probability of a border, 0..255
  legend.png             colours and names of the classes
An INPUT that is an image file gives NAME.png. One that ends in .txt holds a path a line, relative to its own folder or
to the current one, and perhaps a tab or space and a label, which is not read.

for INPUT trip.mp4 (.avi .mov .mkv .webm .m4v too; a folder's videos are left out), camera:0 or rtsp://host/front:
  trip_overlay.mp4       the video with the classes' colours over it, without sound; camera_0_..., front_...
  trip_frames/000000.png with --frames: class ids of each frame, frames.json when all are there; with --border
                         000000_border.png too
A camera or stream is recorded until Ctrl-C, or for --limit frames. Of a video whose end is missing, the frames that
could be read give trip_overlay_truncated.mp4, and it counts as failed.

An image or video that cannot be read is named and left out; the exit code is then 1. After an interruption the same
command with --skip-existing does what is left; of a video with --frames it computes only the frames not there yet.

--format voc           results/VOC2012/Segmentation/comp6_test_cls/ID.png and nothing else: `tar czf results.tgz
                       results` there is what the server takes. comp6 is training with other data than VOC's, such as
                       SBD and ImageNet: rename the folder comp5_test_cls where there was none
--format cityscapes    CITY_SEQUENCE_FRAME_pred.png with label ids (not train ids), and nothing else

examples:
  python -m dfn_fast.predict runs/camvid/best.pth photos/ street.jpg --output-dir out
  python -m dfn_fast.predict runs/camvid/best.pth trip.mp4 --frames --output-dir out
  python -m dfn_fast.predict best.pth cityscapes/leftImg8bit/test --format cityscapes --flip --output-dir submission
"""


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.predict",
        usage="%(prog)s CHECKPOINT INPUT... --output-dir DIR [options]",
        description="Segment images and videos of any size.",
        epilog=EPILOG,
    )
    add = result.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of ours, of DFN's authors, or safetensors")
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, .txt list, video, camera:N or stream")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="where the results go; made if missing")
    add("--format", choices=FORMATS, default="plain", metavar="NAME", help="plain (default), voc, cityscapes")
    add("--no-overlay", action="store_true", help="leave out the overlays")
    add("--alpha", type=float, default=0.5, metavar="X", help="of the overlay's colours, 0..1 (default: 0.5)")
    add("--border", action="store_true", help="write the border probabilities too")
    add("--frames", action="store_true", help="write the label map of each frame of a video")
    add("--limit", type=int, metavar="N", help="stop a video, camera or stream after N frames")
    add("--skip-existing", action="store_true", help="leave out what has all its results; continues a run")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images of equal size that run at once (default: {CUDA_BATCH} on CUDA, 1 on a CPU)",
    )
    add_inference_options(result)
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    check_options(arguments)
    jobs = jobs_for(arguments)
    if arguments.skip_existing:
        left = [job for job in jobs if not all(path.exists() for path in job.outputs)]
        print(f"done already: {len(jobs) - len(left)} of {described(jobs)}")
        if not left:
            return 0
        jobs = left
    require_writable(arguments.output_dir)
    loaded = load_model(arguments.checkpoint, choose_device(arguments.device))
    check_model(loaded, arguments)
    if arguments.format == "plain":
        write_image(arguments.output_dir / "legend.png", legend(loaded.classes, loaded.palette))
    predictor = predictor_from(arguments, loaded.model)
    return Prediction(predictor, loaded.palette, arguments).all(jobs)


def segment(predictor: Predictor, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images ``[H, W, 3]`` RGB uint8 -> class ids ``[H, W]`` uint8 of each."""
    return predictor(list(images))


class Prediction:
    """A run of the command: ``all(jobs)`` gives its exit code."""

    def __init__(self, predictor: Predictor, palette: np.ndarray, arguments: argparse.Namespace):
        self.predictor, self.palette, self.arguments = predictor, palette, arguments
        self.batch_size = arguments.batch_size or (CUDA_BATCH if predictor.device.type == "cuda" else 1)
        self.failures: dict[Job, str] = {}
        self.frames = 0

    def all(self, jobs: list[Job]) -> int:
        """Runs the jobs, images first; one that fails is named and left out. 1 where one failed, else 0."""
        start = time.perf_counter()
        try:
            self.images([job for job in jobs if isinstance(job, ImageJob)])
            for job in jobs:
                if isinstance(job, VideoJob):
                    self.video(job)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.arguments.output_dir}: {error}; the run ended there, --skip-existing continues it"
            ) from error
        self.summarize(jobs, time.perf_counter() - start)
        return 1 if self.failures else 0

    def images(self, jobs: list[ImageJob]) -> None:
        def report(job: ImageJob, error: UserError | None) -> None:
            bar.update()
            if error is not None:
                self.fail(job, error)

        with tqdm(total=len(jobs), disable=None if jobs else True, **IMAGES_BAR) as bar:
            pipeline: Pipeline[ImageJob, Picture, Picture] = Pipeline(
                lambda job: Picture(read_image(job.source)),
                self.run,
                self.write,
                report,
                batch_size=self.batch_size,
                readers=READERS,
                writers=WRITERS,
                size=picture_size,
            )
            pipeline(jobs)

    def video(self, job: VideoJob) -> None:
        recording = Recording(job, self.run, self.write, self.draw, self.arguments, self.batch_size)
        try:
            recording()
        except UserError as error:
            self.fail(job, error)
        self.frames += recording.count

    def run(self, pictures: list[Picture]) -> list[Picture]:
        """Fills in what is not known yet of pictures of equal size."""
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
        text = str(error) if isinstance(error, DataError) else f"{job.source}: {error}"
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
        print(f"{', '.join([*parts, self.predictor.describe()])}: {self.arguments.output_dir}")
        if self.failures:
            texts = [self.failures[job] for job in jobs if job in self.failures]
            print("\n  ".join([f"{len(texts)} of {described(jobs)} failed:", *texts]), file=sys.stderr)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` for values that no run can have."""
    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"--alpha {arguments.alpha:g}: expected 0..1")
    if arguments.border and arguments.format != "plain":
        raise ConfigError(f"--border: the server takes no borders; leave out --format {arguments.format}")
    for name in ("batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


def check_model(loaded: LoadedModel, arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` where the network cannot give what the options ask for."""
    expected = SERVER_CLASSES.get(arguments.format, len(loaded.classes))
    if len(loaded.classes) != expected:
        raise ConfigError(
            f"--format {arguments.format} expects a network of {expected} classes, {arguments.checkpoint} has "
            f"{len(loaded.classes)}; use --format plain, or a checkpoint trained on that data set"
        )
    if arguments.border and not loaded.model.has_border:
        raise ConfigError(f"--border: {arguments.checkpoint} has no Border Network; leave the option out")


if __name__ == "__main__":
    cli.run(main)
