"""A video, camera or stream for `predict`: its frames, in order, become an overlay video and label maps."""

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from dfn_fast.cli import IMAGES_BAR
from dfn_fast.errors import DataError, UserError, printable
from dfn_fast.files import write_json
from dfn_fast.media.images import read_label
from dfn_fast.media.video import VideoReader, VideoWriter, is_live
from dfn_fast.predict.jobs import ImageJob, VideoJob
from dfn_fast.predict.pipeline import NoMoreImages, Pipeline
from dfn_fast.runtime.time_limit import within

Result = TypeVar("Result")


class Picture(NamedTuple):
    """An image ``[H, W, 3]`` RGB uint8 with its class ids and border (0..255), ``[H, W]`` uint8, if known."""

    image: np.ndarray
    labels: np.ndarray | None = None
    border: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return self.image.shape


class Recording:
    """``recording()`` runs a whole :class:`VideoJob`; ``count`` is the number of frames written so far.

    Args:
        run: fills in labels and border of pictures of equal size.
        write: writes labels and border of a picture to the files of an :class:`ImageJob`.
        draw: returns the frame of the overlay video, ``[H, W, 3]`` RGB uint8.
        arguments: the command line: ``limit``, ``border``, ``skip_existing``, ``file_timeout``.

    Raises :class:`UserError` if the job fails. If the video's end is missing, ``count`` frames are kept.
    """

    def __init__(
        self,
        job: VideoJob,
        run: Callable[[list[Picture]], list[Picture]],
        write: Callable[[ImageJob, Picture], None],
        draw: Callable[[Picture], np.ndarray],
        arguments: argparse.Namespace,
        batch_size: int,
    ):
        self.arguments = arguments
        self.job, self.run, self.write, self.draw = job, run, write, draw
        self.limit, self.border, self.resume = arguments.limit, arguments.border, arguments.skip_existing
        self.batch_size = batch_size
        self.count = 0

    def __call__(self) -> None:
        for path in self.job.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        if self.job.summary is not None:
            self.job.summary.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            video = stack.enter_context(in_time(self.arguments, self.job.source, lambda: VideoReader(self.job.source)))
            overlay = None
            if self.job.overlay is not None:
                overlay = stack.enter_context(VideoWriter(self.job.overlay.parent, video.frame_rate, video.size))
                if overlay.size != video.size:
                    (height, width), (kept_height, kept_width) = video.size, overlay.size
                    kept = f"{kept_width}x{kept_height} of {width}x{height}"
                    self.say(f"its overlay is {kept} pixels, as its format has even sides")
            self.record(video, overlay)
            self.finish(video, overlay)

    def say(self, text: str) -> None:
        tqdm.write(printable(f"{self.job.source}: {text}"), file=sys.stderr)

    def record(self, video: VideoReader, overlay: VideoWriter | None) -> None:
        """Records frame by frame. Ctrl-C ends a camera or stream normally; for a video it raises KeyboardInterrupt."""

        def read(number: int) -> Picture:
            image = in_time(self.arguments, self.job.source, video.read)
            if image is None:
                raise NoMoreImages
            return self.earlier(number, image) or Picture(image)

        def write(number: int, picture: Picture) -> None:
            if overlay is not None:
                overlay.write(self.draw(picture))
            if self.job.frames is not None:
                self.write(self.job.frame(number, self.border), picture)
            self.count += 1

        def report(number: int, error: UserError | None) -> None:
            if error is not None:
                raise error  # a video with a hole would be out of step with its source
            bar.update()

        frame_bytes = 6 * math.prod(video.size)  # OpenCV's frame and ours
        total = min(filter(None, (self.limit, video.announced)), default=None)
        with tqdm(total=total, desc=printable(Path(self.job.source).name), disable=None, **IMAGES_BAR) as bar:
            # One thread each: frames are decoded and encoded in order.
            pipeline: Pipeline[int, Picture, Picture] = Pipeline(
                read,
                self.run,
                write,
                report,
                batch_size=self.batch_size,
                readers=1,
                writers=1,
                size=picture_size,
                weigh=lambda number: frame_bytes,
            )
            try:
                pipeline(itertools.count() if self.limit is None else range(self.limit))
            except KeyboardInterrupt:
                if not video.live or not self.count:
                    raise

    def earlier(self, number: int, image: np.ndarray) -> Picture | None:
        """The frame's results from an interrupted run, if this run continues it and they are whole."""
        if not self.resume or self.job.frames is None:
            return None
        try:
            found = [read_label(path) for path in self.job.frame(number, self.border).outputs]
        except DataError:
            return None
        return Picture(image, *found) if all(x.shape == image.shape[:2] for x in found) else None

    def finish(self, video: VideoReader, overlay: VideoWriter | None) -> None:
        """Gives the results their names. Raises :class:`DataError` if the video's end is missing."""
        missing = 0 if self.count == self.limit else video.missing()
        times = video.times(self.count)
        places = [path for path in (self.job.frames,) if path is not None]
        if overlay is not None and self.job.overlay is not None:
            path = self.job.truncated if missing else self.job.overlay
            overlay.finish(path, times)
            places.append(path)
        if missing:
            raise DataError(
                f"{self.job.source}: this video is damaged or truncated: {missing} of its {video.announced} frames "
                f"cannot be decoded, the first {self.count} are in {' and '.join(map(str, places))}; copy or download "
                "it again"
            )
        if self.job.summary is not None:
            numbers = [int(path.stem) for path in self.job.summary.parent.glob("*.png") if path.stem.isdecimal()]
            more = sum(number >= self.count for number in numbers)
            if more:
                self.say(f"{self.job.frames} has {more} more frames, of an earlier run; this one has {self.count}")
            summary: dict[str, Any] = {"frames": self.count, "frame_rate": video.frame_rate}
            if times is not None:
                summary["times"] = times
            write_json(self.job.summary, summary)


def in_time(arguments: argparse.Namespace, source: str, call: Callable[[], Result]) -> Result:
    """What ``call()`` returns, if it reads a file within its time; a camera or stream may take any."""
    seconds = 0 if is_live(source) else arguments.file_timeout
    return within(
        seconds,
        call,
        DataError(
            f"{source}: it was not read within {seconds:g} s, and is left out; is it damaged, or made to take long? If "
            "not, raise --file-timeout"
        ),
    )


def picture_size(picture: Picture) -> tuple[int, ...]:
    return picture.size
