"""``python -m dfn_fast.predict``: images, folders, videos or cameras -> label maps, overlays and a legend."""

import argparse
import os
from pathlib import Path

from dfn_fast import cli
from dfn_fast.errors import ConfigError, brief
from dfn_fast.files import clear_leftovers
from dfn_fast.inference.loading import LoadedModel, load_model
from dfn_fast.inference.options import add_inference_options, predictor_from
from dfn_fast.inference.settings import MAX_BATCH
from dfn_fast.media.images import write_image
from dfn_fast.media.overlays import legend
from dfn_fast.predict.jobs import described, jobs_for, require_writable
from dfn_fast.predict.prediction import CUDA_BATCH, Prediction
from dfn_fast.runtime.device import choose_device

FORMATS = ("plain", "voc", "cityscapes")
FILE_SECONDS, MOST_FILE_SECONDS = 60, 24 * 3600
MAX_FRAMES = 10**9
SERVER_CLASSES = {"voc": 21, "cityscapes": 19}

EPILOG = """\
For INPUT photos/ with photos/night/a.jpg, --output-dir gets:
  night/a.png            class ids, with the data set's palette, at the image's size
  night/a_overlay.png    the image with the classes' colours over it
  night/a_border.png     with --border: probability of a border, 0..255
  legend.png             colours and names of the classes
An INPUT that is an image file gives NAME.png. A folder gives every image below it, also through links and whatever
its suffix; one line says which other files are passed over. A .txt file lists one path per line, relative to its own
folder or the current one; a label after a tab or space is ignored.

For INPUT trip.mp4 (also .avi .mov .mkv .webm .m4v; name a video in a folder itself), camera:0 or rtsp://host/front:
  trip_overlay.mp4       the video with the classes' colours over it, without sound; camera_0_..., front_...
  trip_frames/000000.png with --frames: class ids of each frame, and frames.json once all are written; with --border
                         also 000000_border.png
A camera or stream is recorded until Ctrl-C, or for --limit frames. A video whose end is missing counts as failed; its
readable frames are written to trip_overlay_truncated.mp4.

An image or video that cannot be read, or not within --file-timeout, is reported and skipped, and the exit code is 1.
After an interruption the same command with --skip-existing does the rest; for a video with --frames it computes only
the missing frames.

--format voc           results/VOC2012/Segmentation/comp6_test_cls/ID.png and nothing else. Upload the archive that
                       `tar czf results.tgz results` makes there. comp6 is for training with data beyond VOC's, such as
                       SBD and ImageNet; without any, rename the folder to comp5_test_cls
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
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint of ours or of DFN's authors, or safetensors")
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, .txt list, video, camera:N or stream")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the results; created if missing")
    add("--format", choices=FORMATS, default="plain", metavar="NAME", help="plain (default), voc, cityscapes")
    add("--no-overlay", action="store_true", help="leave out the overlays")
    add("--alpha", type=float, default=0.5, metavar="X", help="opacity of the overlay's colours, 0..1 (default: 0.5)")
    add("--border", action="store_true", help="write the border probabilities too")
    add("--frames", action="store_true", help="write the label map of each frame of a video")
    add("--limit", type=int, metavar="N", help="stop a video, camera or stream after N frames")
    add("--skip-existing", action="store_true", help="skip inputs that have all their results; continues a run")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images of equal size that run at once (default: {CUDA_BATCH} on CUDA, 1 on a CPU)",
    )
    add(
        "--file-timeout",
        type=float,
        default=FILE_SECONDS,
        metavar="S",
        help="seconds in which an image or a frame of a video file has to be read, or it fails; 0: no limit "
        f"(default: {FILE_SECONDS})",
    )
    add_inference_options(result)
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    _check_options(arguments)
    jobs = jobs_for(arguments)
    for folder in {path.parent for job in jobs for path in job.outputs} | {arguments.output_dir}:
        clear_leftovers(folder)
    if arguments.skip_existing:
        left = [job for job in jobs if not all(map(os.path.exists, job.outputs))]
        print(f"already done: {len(jobs) - len(left)} of {described(jobs)}")
        if not left:
            return 0
        jobs = left
    require_writable(arguments.output_dir)
    loaded = load_model(arguments.checkpoint, choose_device(arguments.device))
    check_model(loaded, arguments)
    if arguments.format == "plain":
        write_image(arguments.output_dir / "legend.png", legend(loaded.classes, loaded.palette))
    predictor = predictor_from(arguments, loaded.model)
    return Prediction(predictor, loaded.palette, arguments).run_all(jobs)


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` if a value is out of range or two options exclude each other."""
    if not 0 <= arguments.alpha <= 1:
        raise ConfigError(f"--alpha {arguments.alpha:g}: expected 0..1")
    if arguments.border and arguments.format != "plain":
        raise ConfigError(f"--border: the server takes no borders; leave it out, or --format {arguments.format}")
    cli.require_range("--file-timeout", arguments.file_timeout, 0, MOST_FILE_SECONDS)
    for name, most in (("batch_size", MAX_BATCH), ("limit", MAX_FRAMES)):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"--{cli.dashed(name)} {brief(value)}: expected 1 or more, and at most {most}")


def check_model(loaded: LoadedModel, arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` if the network does not fit the options."""
    expected = SERVER_CLASSES.get(arguments.format, len(loaded.classes))
    if len(loaded.classes) != expected:
        raise ConfigError(
            f"--format {arguments.format} expects a network of {expected} classes, but {arguments.checkpoint} has "
            f"{len(loaded.classes)}; use --format plain, or a checkpoint trained on that data set"
        )
    if arguments.border and not loaded.model.has_border:
        raise ConfigError(f"--border: {arguments.checkpoint} has no Border Network; leave the option out")


if __name__ == "__main__":
    cli.run(main)
