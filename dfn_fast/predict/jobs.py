"""The work list of `predict`: each input image or video, and the files it produces."""

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfn_fast.errors import ConfigError, DataError, printable, shortened
from dfn_fast.media.formats import FORMATS, picture_format
from dfn_fast.media.listing import find_images, read_lines
from dfn_fast.media.video import VIDEO_SUFFIXES, is_live, is_video

VOC_FOLDER = Path("results", "VOC2012", "Segmentation", "comp6_test_cls")


@dataclass(frozen=True)
class ImageJob:
    """An image, and the files it produces."""

    source: str
    label: Path
    overlay: Path | None = None
    border: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.label, self.overlay, self.border) if path is not None]


@dataclass(frozen=True)
class VideoJob:
    """A video, camera or stream, and its results: an overlay video, a folder of label maps, or both."""

    source: str
    overlay: Path | None
    frames: Path | None

    @property
    def summary(self) -> Path | None:
        """The file with the number of frames. It is written last: if it exists, the folder is complete."""
        return self.frames and self.frames / "frames.json"

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.overlay, self.summary) if path is not None]

    @property
    def truncated(self) -> Path:
        """The file that takes the place of ``overlay`` if the end of the video is missing."""
        assert self.overlay is not None
        return self.overlay.with_stem(f"{self.overlay.stem}_truncated")

    def frame(self, number: int, border: bool) -> ImageJob:
        """The files of a frame, in the folder ``frames``."""
        assert self.frames is not None
        name = self.frames / f"{number:06d}.png"
        return ImageJob(
            f"{self.source}, frame {number}", name, border=name.with_stem(f"{name.stem}_border") if border else None
        )


Job = ImageJob | VideoJob


def jobs_for(arguments: argparse.Namespace) -> list[Job]:
    """The jobs of the command line, in its order.

    Raises :class:`ConfigError` if an INPUT does not exist, if two results would have the same name, or if a result
    would overwrite an INPUT or the recording of a camera.
    """
    found = _find_sources(arguments.inputs, arguments.output_dir)
    jobs: list[Job] = [
        (_video_job if is_video(source) else _image_job)(source, name, arguments) for source, name in found
    ]
    _check_outputs(jobs, arguments.output_dir / "legend.png" if arguments.format == "plain" else None)
    if not arguments.skip_existing:
        for job in jobs:
            if is_live(job.source) and any(map(os.path.exists, job.outputs)):
                raise ConfigError(
                    f"{job.source}: {job.outputs[0].parent} holds a recording of it, which cannot be made again; "
                    "choose another --output-dir"
                )
    return jobs


def described(jobs: Sequence[Job]) -> str:
    """``"3 images"``, ``"1 video"``, or ``"4 images and videos"``."""
    kinds = {"image" if isinstance(job, ImageJob) else "video" for job in jobs}
    plural = "" if len(jobs) == 1 else "s"
    return f"{len(jobs)} {' and '.join(kind + plural for kind in sorted(kinds or {'image'}))}"


def _find_sources(inputs: Iterable[str], output_dir: Path) -> list[tuple[str, str]]:
    """The images and videos of the INPUTs, each with the name of its results, which may contain folders.

    A folder gives its images, also those of a format that cannot be read: they fail by name. Its other files, videos
    too, are passed over, and one line on stderr says so. Files below ``output_dir`` are results of an earlier run and
    are skipped. Raises :class:`ConfigError` if an input does not exist or holds no image.
    """
    sources: list[tuple[str, str]] = []
    output = real(output_dir)
    for text in inputs:
        path = Path(text)
        if is_live(text):
            found = [(text, live_name(text))]
        elif os.path.isdir(path):
            if real(path) == output:
                raise ConfigError(
                    f"--output-dir {output_dir} is an input folder; choose another, as results are images too"
                )
            found = _images_below(path, output)
        elif not os.path.isfile(path):
            raise ConfigError(f"{path}: no such image, video, folder or list")
        elif path.suffix.lower() == ".txt":
            found = listed_sources(path)
        else:
            found = [(str(path), path.stem)]
        if not found:
            raise ConfigError(f"{path}: no image in it (give each video as an INPUT)")
        sources += found
    return sources


def _images_below(folder: Path, output: Path) -> list[tuple[str, str]]:
    """The sources of a folder, without the files in the folder ``output``. Says what is passed over."""
    found = find_images(folder, nested=True)
    named = [(image, name) for name, image in found.files.items()]
    others = [path for path in found.passed_over if not real(path).is_relative_to(output)]
    unread = [path for path in others if picture_format(path) not in ("", *FORMATS)]
    # Under their whole names: the stem may be that of an image.
    named += [(path, path.relative_to(folder).as_posix()) for path in unread]
    note = found._replace(passed_over=[path for path in others if path not in unread]).note
    if note:
        print(printable(f"{note} (a video in a folder has to be an INPUT of its own)"), file=sys.stderr)
    return [(str(image), name) for image, name in named if not real(image).is_relative_to(output)]


def real(path: str | Path) -> Path:
    """The path without links, also of a file that is not there or of links in a circle."""
    return Path(os.path.realpath(path))


def live_name(source: str) -> str:
    """``camera:0`` -> ``camera_0``, ``rtsp://user@host:554/front?x=1`` -> ``front``, or the host if it is all."""
    if source.startswith("camera:"):
        return source.replace(":", "_")
    *_, name = source.split("?")[0].rstrip("/").split("/")
    name = name.split("@")[-1]
    name = name.removesuffix(next((suffix for suffix in VIDEO_SUFFIXES if name.endswith(suffix)), ""))
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "stream"


def listed_sources(path: Path) -> list[tuple[str, str]]:
    """The images that a text file lists. A relative path names the result; otherwise only the file name does."""
    sources = []
    for number, line in read_lines(path, comments=True):
        candidates = [line.split("\t")[0].strip(), line.split()[0]]  # a space may belong to the path or end it
        found = ((c, folder / c) for c in candidates for folder in (path.parent, Path()) if os.path.isfile(folder / c))
        text, image = next(found, (None, None))
        if text is None or image is None:
            if line.startswith("#"):  # a comment, as no file has this name
                continue
            raise ConfigError(
                f"{path}:{number}: {shortened(candidates[0])} exists neither in {path.parent} nor in the current folder"
            )
        name = Path(text).with_suffix("")
        keep = not name.is_absolute() and ".." not in name.parts
        sources.append((str(image), name.as_posix() if keep else name.name))
    return sources


def _image_job(image: str, name: str, arguments: argparse.Namespace) -> ImageJob:
    folder = arguments.output_dir
    if arguments.format == "voc":
        return ImageJob(image, folder / VOC_FOLDER / f"{Path(name).name}.png")
    if arguments.format == "cityscapes":
        match = re.fullmatch(r"(.+_\d{6}_\d{6})(_leftImg8bit)?", Path(name).name)
        if not match:
            raise ConfigError(
                f"{image}: --format cityscapes expects names like berlin_000000_000019_leftImg8bit.png, which tell the "
                "server the frame; rename the file or use --format plain"
            )
        return ImageJob(image, folder / f"{match[1]}_pred.png")
    return ImageJob(
        image,
        folder / f"{name}.png",
        None if arguments.no_overlay else folder / f"{name}_overlay.png",
        folder / f"{name}_border.png" if arguments.border else None,
    )


def _video_job(source: str, name: str, arguments: argparse.Namespace) -> VideoJob:
    if arguments.format != "plain":
        raise ConfigError(f"{source}: the server takes no videos; leave out --format {arguments.format}")
    if arguments.no_overlay and not arguments.frames:
        raise ConfigError(f"{source}: --no-overlay leaves nothing to write; add --frames for the label maps")
    return VideoJob(
        source,
        None if arguments.no_overlay else arguments.output_dir / f"{name}_overlay.mp4",
        arguments.output_dir / f"{name}_frames" if arguments.frames else None,
    )


def _check_outputs(jobs: Sequence[Job], legend_file: Path | None) -> None:
    """Raises :class:`ConfigError` if two results would have the same name, or if one would overwrite an INPUT."""
    remedy = "rename one, or give the folder above them as INPUT: its subfolders are kept"
    owners = {} if legend_file is None else {real(legend_file): "the legend"}
    sources = {real(job.source): described([job]).split()[-1] for job in jobs if not is_live(job.source)}
    for job in jobs:
        for path in job.outputs:
            place = real(path)
            if place in owners:
                raise ConfigError(f"{job.source} and {owners[place]} would both give {path}; {remedy}")
            if place in sources:
                raise ConfigError(
                    f"{job.source}: its result {path} would replace a{'n' if sources[place] == 'image' else ''} "
                    f"{sources[place]}; choose another --output-dir"
                )
            owners[place] = job.source


def require_names(job: Job) -> None:
    """Raises :class:`DataError` if the file system takes no file of the name of one of the results."""
    for path in job.outputs:
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
                raise DataError(
                    f"{job.source}: its result {shortened(path)} cannot be written ({error.strerror}); rename the input"
                ) from None


def require_writable(folder: Path) -> None:
    """Makes ``folder``. Raises :class:`ConfigError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output-dir {folder} cannot be written ({error.strerror}); choose another") from error
