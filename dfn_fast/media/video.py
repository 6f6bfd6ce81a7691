"""Videos, cameras and streams as RGB frames, and RGB frames as a video, which is written whole or not at all.

OpenCV decodes and encodes. Frames are ``[H, W, 3]`` RGB uint8, rotated as the file says.
"""

import itertools
import math
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from dfn_fast.errors import DataError, UserError
from dfn_fast.files import temporary_prefix
from dfn_fast.media.mp4 import set_times, shown_frames

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
ENCODER, SUFFIX = "mp4v", ".mp4"
# Their headers hold the duration of the longest stream, sound included, but no number of frames.
TIMED_SUFFIXES = (".mkv", ".webm")
MP4_SUFFIXES = (".mp4", ".mov", ".m4v")
USUAL_RATE = 25.0
MAX_FRAME_PIXELS = 1 << 27  # 15360 x 8640 is the largest in use


def is_live(source: str) -> bool:
    """Whether this is a camera (``camera:0``) or a stream (``rtsp://``, ``http://``), which may end at any time."""
    return re.fullmatch(r"camera:[0-9]{1,4}|(rtsp|rtsps|rtmp|http|https)://.+", source) is not None


def is_video(source: str) -> bool:
    """Whether the name is that of a video, a camera or a stream."""
    return is_live(source) or Path(source).suffix.lower() in VIDEO_SUFFIXES


class VideoReader:
    """The frames of a video file, a camera or a stream, one by one. A context manager that releases the source.

    ``frame_rate`` is in frames/s, 25 if the source does not say; ``announced`` is the number of frames, None if it is
    not known; ``size`` is ``(height, width)``.

    Raises :class:`DataError` if the source does not exist or has no frame.
    """

    def __init__(self, source: str):
        self.source, self.live = source, is_live(source)
        if not self.live and not Path(source).is_file():
            raise DataError(f"{source}: this video does not exist")
        _require_text(source, f"{source}: the name of this video")
        self._capture = open_capture(source)
        width, height = (self._capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > MAX_FRAME_PIXELS:
            self._capture.release()
            raise DataError(
                f"{source}: this video has frames of {width:.0f}x{height:.0f} pixels by its header, expected at most "
                f"{MAX_FRAME_PIXELS}; is it damaged? If not, make it smaller"
            )
        self.decoded, self._milliseconds = 0, 0.0
        self._reading = threading.Lock()  # OpenCV ends the process if a frame is read while another is
        self._times: list[float] = []
        self._first = self._decode()
        if self._first is None:
            self._capture.release()
            raise DataError(self._no_frame())
        self.size = self._first.shape[:2]
        self._rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.frame_rate = self._rate if 0.1 <= self._rate <= 240 else USUAL_RATE
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(count) if not self.live and 0 < count < 1e9 else None
        if self.announced is not None and Path(source).suffix.lower() in MP4_SUFFIXES:
            shown = shown_frames(source)
            self.announced = self.announced if shown is None else max(1, min(shown, self.announced))

    def read(self) -> np.ndarray | None:
        """The next frame; None after the last, or if decoding fails."""
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        return self._decode()

    def times(self, count: int) -> list[float] | None:
        """When the first ``count`` frames begin, in seconds after the first; None if :attr:`frame_rate` says it."""
        times = [time - self._times[0] for time in self._times[:count]]
        even = all(abs(time - i / self.frame_rate) < 0.5 / self.frame_rate for i, time in enumerate(times))
        rising = all(before < after for before, after in itertools.pairwise(times))
        return None if even or not rising or self.live else times

    def missing(self) -> int:
        """How many of the announced frames are missing. Call it once :meth:`read` has returned None."""
        if self.announced is None:
            return 0
        missing = max(self.announced - self.decoded, 0)
        if Path(self.source).suffix.lower() in TIMED_SUFFIXES:
            rate = self._rate if 0 < self._rate < math.inf else self.frame_rate  # a header may hold 0 or nan
            late = (self.announced - 1) / rate - self._milliseconds / 1000  # of the last frame, in seconds
            return missing if late > 1 else 0
        return missing

    def _decode(self) -> np.ndarray | None:
        if not self._reading.acquire(blocking=False):
            raise DataError(f"{self.source}: a frame of it is still being read")
        try:
            ok, frame = self._capture.read()
        except cv2.error as error:
            raise DataError(f"{self.source}: OpenCV cannot decode this video ({str(error).strip()})") from error
        finally:
            self._reading.release()
        if not ok:
            return None
        if self.decoded and frame.shape[:2] != self.size:
            (height, width), (new_height, new_width) = self.size, frame.shape[:2]
            raise DataError(
                f"{self.source}: its frames change from {width}x{height} to {new_width}x{new_height} at number "
                f"{self.decoded}, expected one size; convert the video to one"
            )
        self.decoded += 1
        self._milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        if not self.live:  # a recording may last for days
            self._times.append(self._milliseconds / 1000)
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def _no_frame(self) -> str:
        if self.live:
            return f"{self.source}: it sent no frame; is it connected, and is no other program using it?"
        return (
            f"{self.source}: no frame can be decoded ({Path(self.source).stat().st_size} bytes). It is not a video, is "
            "damaged, or has a codec that OpenCV does not know; copy it again, or convert it to H.264 in .mp4"
        )

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reading.acquire(blocking=False):  # under a read that hangs, this would end the process
            self._capture.release()


def _require_text(name: str, what: str, error: type[UserError] = DataError) -> None:
    """Raises ``error`` for bytes that are no UTF-8: OpenCV would end the process."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise error(f"{what} is no valid text in UTF-8, which OpenCV expects; rename it") from None


def open_capture(source: str) -> cv2.VideoCapture:
    if source.startswith("camera:"):
        return cv2.VideoCapture(int(source.removeprefix("camera:")))
    # Other backends would take the name of a file that FFmpeg refuses for a pattern of image names, and complain.
    ffmpeg = cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG)
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG if ffmpeg else cv2.CAP_ANY)


class VideoWriter:
    """Writes an MPEG-4 video to a hidden file, which :meth:`finish` renames; without that, it is deleted.

    Args:
        folder: an existing folder, for the hidden file.
        frame_rate: in frames/s.
        size: ``(height, width)`` of the frames. The format needs even sides: an odd one loses its last row or column,
            which :attr:`size` says.

    Raises :class:`UserError` if OpenCV has no encoder for it, and :class:`OSError` if the folder cannot be written.
    """

    def __init__(self, folder: Path, frame_rate: float, size: tuple[int, ...]):
        _require_text(str(folder), f"{folder}: the name of this folder for a video", UserError)
        self.count = 0
        self.size = self._height, self._width = size[0] // 2 * 2, size[1] // 2 * 2
        handle, name = tempfile.mkstemp(dir=folder, prefix=temporary_prefix("video"), suffix=f".tmp{SUFFIX}")
        os.close(handle)
        os.unlink(name)  # OpenCV creates it again, with the usual permissions
        self._path = Path(name)
        code = cv2.VideoWriter.fourcc(*ENCODER)
        self._video = cv2.VideoWriter(name, code, frame_rate, (self._width, self._height))
        if not self._video.isOpened():
            self.close()
            raise UserError(
                f"OpenCV cannot encode a video of {size[1]}x{size[0]} ({ENCODER} in {SUFFIX}) here; install "
                "the opencv-python wheel, which can, or use --no-overlay --frames"
            )

    def write(self, frame: np.ndarray) -> None:
        """Writes a frame, ``[H, W, 3]`` RGB uint8, of the video's size."""
        self._video.write(cv2.cvtColor(frame[: self._height, : self._width], cv2.COLOR_RGB2BGR))
        self.count += 1

    def finish(self, path: Path, times: Sequence[float] | None = None) -> None:
        """Closes the video and renames it to ``path``. Raises :class:`OSError` if frames are missing.

        ``times`` are when its frames begin, if that is not even: in seconds, of which the first is 0. If they cannot be
        written, :class:`UserError` is raised.
        """
        self._video.release()
        # OpenCV does not report a full disk, so the frames in the file are counted.
        written = cv2.VideoCapture(str(self._path))
        frames = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) if written.isOpened() else 0
        written.release()
        if frames != self.count:
            raise OSError(f"{path}: {frames} of {self.count} frames were written; is the disk full?")
        if times is not None and not set_times(self._path, times):
            raise UserError(f"{path}: its frames cannot be given their times; use --no-overlay --frames")
        with self._path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._path, path)

    def close(self) -> None:
        self._video.release()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
