"""``python -m dfn_fast.predict``: images, folders or a list of images -> label maps, overlays and a legend."""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dfn_fast import cli
from dfn_fast.data.cityscapes import TRAIN_ID_TO_LABEL_ID
from dfn_fast.data.files import read_image, write_image, write_label
from dfn_fast.data.pairing import files_by_stem, read_lines
from dfn_fast.data.voc import VocDataset
from dfn_fast.errors import ConfigError, DataError, UserError
from dfn_fast.inference import IMAGES_BAR, Predictor, add_inference_options, predictor_from
from dfn_fast.loading import LoadedModel, load_model
from dfn_fast.training import choose_device
from dfn_fast.visualize import legend, overlay

FORMATS = ("plain", "voc", "cityscapes")
SERVER_CLASSES = {"voc": 21, "cityscapes": 19}
VOC_FOLDER = Path("results", "VOC2012", "Segmentation", "comp6_test_cls")

EPILOG = """\
--output-dir gets, for INPUT photos/ with photos/night/a.jpg:
  night/a.png            class ids, with the data set's palette, at the image's size
  night/a_overlay.png    the image with the classes' colours over it
  night/a_border.png     with --border: probability of a border, 0..255
  legend.png             colours and names of the classes
An INPUT that is an image file gives NAME.png. One that ends in .txt holds a path a line, relative to its own folder or
to the current one, and perhaps a tab or space and a label, which is not read.

--format voc           results/VOC2012/Segmentation/comp6_test_cls/ID.png and nothing else: `tar czf results.tgz
                       results` there is what the server takes. comp6 is training with other data than VOC's, such as
                       SBD and ImageNet: rename the folder comp5_test_cls where there was none
--format cityscapes    CITY_SEQUENCE_FRAME_pred.png with label ids (not train ids), and nothing else

examples:
  python -m dfn_fast.predict runs/camvid/best.pth photos/ street.jpg --output-dir out
  python -m dfn_fast.predict best.pth cityscapes/leftImg8bit/test --format cityscapes --flip --output-dir submission
"""


@dataclass(frozen=True)
class Job:
    """An image, and the files that come of it."""

    image: Path
    label: Path
    overlay: Path | None = None
    border: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.label, self.overlay, self.border) if path is not None]


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.predict",
        usage="%(prog)s CHECKPOINT INPUT... --output-dir DIR [options]",
        description="Segment images of any size.",
        epilog=EPILOG,
    )
    result.add_argument("checkpoint", metavar="CHECKPOINT", help="of ours, of DFN's authors, or safetensors")
    result.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image, folder of images, or .txt list")
    result.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="where the results go; made if missing"
    )
    result.add_argument(
        "--format", choices=FORMATS, default="plain", metavar="NAME", help="plain (default), voc, cityscapes"
    )
    result.add_argument("--no-overlay", action="store_true", help="leave out the overlays")
    result.add_argument(
        "--alpha", type=float, default=0.5, metavar="X", help="of the overlay's colours, 0..1 (default: 0.5)"
    )
    result.add_argument("--border", action="store_true", help="write the border probabilities too")
    result.add_argument("--skip-existing", action="store_true", help="leave out images whose results are all there")
    add_inference_options(result)
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"--alpha {arguments.alpha:g}: expected 0..1")
    if arguments.border and arguments.format != "plain":
        raise ConfigError(f"--border: the server takes no borders; leave out --format {arguments.format}")
    jobs = [job_for(image, name, arguments) for image, name in find_images(arguments.inputs, arguments.output_dir)]
    check_outputs(jobs, arguments.output_dir / "legend.png" if arguments.format == "plain" else None)
    total = len(jobs)
    if arguments.skip_existing:
        jobs = [job for job in jobs if not all(path.exists() for path in job.outputs)]
        print(f"{total - len(jobs)} of {total} images have their results already")
        if not jobs:
            return 0
    require_writable(arguments.output_dir)
    loaded = load_model(arguments.checkpoint, choose_device(arguments.device))
    check_model(loaded, arguments)
    if arguments.format == "plain":
        write_image(arguments.output_dir / "legend.png", legend(loaded.classes, loaded.palette))
    predictor = predictor_from(arguments, loaded.model)
    return predict_all(jobs, predictor, loaded.palette, arguments)


def predict_all(jobs: list[Job], predictor: Predictor, palette: np.ndarray, arguments: argparse.Namespace) -> int:
    """Runs the jobs; an image that fails is named and left out. Returns the exit code: 1 where one failed, else 0."""
    failures = []
    start = time.perf_counter()
    with tqdm(jobs, disable=None, **IMAGES_BAR) as bar:
        for job in bar:
            try:
                predict_one(job, predictor, palette, arguments)
            except UserError as error:
                text = str(error) if isinstance(error, DataError) else f"{job.image}: {error}"
                failures.append(text)
                bar.write(f"skipped: {text}", file=sys.stderr)
            except OSError as error:
                raise UserError(
                    f"--output-dir {arguments.output_dir}: {error}; nothing after it was written"
                ) from error
    done, seconds = len(jobs) - len(failures), time.perf_counter() - start
    speed = f"{done / seconds:.2f} images/s, " if done else ""
    print(f"{done} image{'' if done == 1 else 's'}, {speed}{predictor.describe()}: {arguments.output_dir}")
    if failures:
        print("\n  ".join([f"{len(failures)} of {len(jobs)} images failed:", *failures]), file=sys.stderr)
    return 1 if failures else 0


def predict_one(job: Job, predictor: Predictor, palette: np.ndarray, arguments: argparse.Namespace) -> None:
    image = read_image(job.image)
    labels = predictor(image)
    for path in job.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    if job.overlay is not None:
        write_image(job.overlay, overlay(image, labels, palette, arguments.alpha))
    if job.border is not None:
        write_label(job.border, np.rint(predictor.border(image) * 255).astype(np.uint8))
    if arguments.format == "cityscapes":
        write_label(job.label, TRAIN_ID_TO_LABEL_ID[labels])
    else:
        write_label(job.label, labels, VocDataset.palette if arguments.format == "voc" else palette)


def find_images(inputs: Iterable[Path], output_dir: Path) -> list[tuple[Path, str]]:
    """The images of files, folders and lists, each with the name, perhaps with folders, that its results take.

    Files below ``output_dir`` are results of an earlier run, and left out. Raises :class:`ConfigError` for an input
    that does not exist or holds no image.
    """
    images: list[tuple[Path, str]] = []
    output = output_dir.resolve()
    for path in inputs:
        if path.is_dir():
            if path.resolve() == output:
                raise ConfigError(
                    f"--output-dir {output_dir} is an input folder; choose another, results are images too"
                )
            found = [(image, name) for name, image in files_by_stem(path, nested=True).items()]
            found = [(image, name) for image, name in found if not image.resolve().is_relative_to(output)]
        elif not path.is_file():
            raise ConfigError(f"{path}: no such image, folder or list")
        elif path.suffix.lower() == ".txt":
            found = listed_images(path)
        else:
            found = [(path, path.stem)]
        if not found:
            raise ConfigError(f"{path}: no image in it")
        images += found
    return images


def listed_images(path: Path) -> list[tuple[Path, str]]:
    """The images of a text file; a relative path is the result's name, of any other the file's name is."""
    images = []
    for number, line in read_lines(path):
        candidates = [line.split("\t")[0].strip(), line.split()[0]]  # a space may belong to the path or end it
        found = ((c, folder / c) for c in candidates for folder in (path.parent, Path()) if (folder / c).is_file())
        text, image = next(found, (None, None))
        if text is None or image is None:
            raise ConfigError(
                f"{path}:{number}: {candidates[0]} exists neither in {path.parent} nor in the current folder"
            )
        name = Path(text).with_suffix("")
        keep = not name.is_absolute() and ".." not in name.parts
        images.append((image, name.as_posix() if keep else name.name))
    return images


def job_for(image: Path, name: str, arguments: argparse.Namespace) -> Job:
    folder = arguments.output_dir
    if arguments.format == "voc":
        return Job(image, folder / VOC_FOLDER / f"{Path(name).name}.png")
    if arguments.format == "cityscapes":
        match = re.fullmatch(r"(.+_\d{6}_\d{6})(_leftImg8bit)?", Path(name).name)
        if not match:
            raise ConfigError(
                f"{image}: --format cityscapes expects names like berlin_000000_000019_leftImg8bit.png, which tell the "
                "server the frame; rename the file or use --format plain"
            )
        return Job(image, folder / f"{match[1]}_pred.png")
    return Job(
        image,
        folder / f"{name}.png",
        None if arguments.no_overlay else folder / f"{name}_overlay.png",
        folder / f"{name}_border.png" if arguments.border else None,
    )


def check_outputs(jobs: list[Job], legend_file: Path | None) -> None:
    """Raises :class:`ConfigError` where two results would have one name, or a result would replace an image."""
    remedy = "rename one, or give the folder above them as INPUT: its subfolders are kept"
    owners = {} if legend_file is None else {legend_file.resolve(): "the legend"}
    images = {job.image.resolve() for job in jobs}
    for job in jobs:
        for path in job.outputs:
            place = path.resolve()
            if place in owners:
                raise ConfigError(f"{job.image} and {owners[place]} would both give {path}; {remedy}")
            if place in images:
                raise ConfigError(f"{job.image}: its result {path} would replace an image; choose another --output-dir")
            owners[place] = str(job.image)


def require_writable(folder: Path) -> None:
    """Makes ``folder``; raises :class:`ConfigError` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output-dir {folder} cannot be written ({error.strerror}); choose another") from error


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
