"""``python -m dfn_fast.export``: the inference network as a ``torch.export`` program, AOTInductor package or ONNX file.

The file is loaded again and compared with the model on random images.
"""

import argparse
from pathlib import Path

from dfn_fast import cli
from dfn_fast.errors import ConfigError, brief
from dfn_fast.export.check import compare, random_images
from dfn_fast.export.formats import (
    EXTRA_FILE,
    LAST_OPSET,
    MIN_DYNAMIC,
    OPSET,
    SUFFIXES,
    export_program,
    require_tools,
    write,
)
from dfn_fast.export.network import Labels, inference_network, metadata
from dfn_fast.inference.loading import LoadedModel, load_model
from dfn_fast.network.backbone import MIN_SIZE
from dfn_fast.runtime.device import choose_device

MAX_PIXELS, MAX_BATCH = 1 << 25, 1 << 10  # of an image, and images: the network runs once to be traced
ONNX_BYTES = 2**31 - 2**20  # limit of a protobuf message, less a reserve for all but weights

EPILOG = f"""\
The exported network takes normalised RGB, float32 [B, 3, H, W], and returns log-probabilities [B, K, H, W]; with
--labels it takes RGB uint8 [B, H, W, 3] and returns class ids, uint8 [B, H, W]. Class names, colours and a
description of input and output are in the file. Batch norm is folded, and every operator is a plain one. --dynamic
accepts any batch and any H and W from {MIN_DYNAMIC}. The exit code is 1 if the file's results are not the model's.

formats:
  pt2    torch.export program         torch.export.load(FILE, extra_files={{"{EXTRA_FILE}": ""}}).module()
  aoti   AOTInductor package          torch._inductor.aoti_load_package(FILE); for this kind of device and CPU only
  onnx   ONNX, opset {OPSET} to {LAST_OPSET}, one file of at most 2 GB; needs pip install -e ".[export]"

examples:
  python -m dfn_fast.export runs/camvid/best.pth dfn.onnx --dynamic --labels
  python -m dfn_fast.export best.pth dfn.pt2 --format aoti --size 1024x2048 --device cuda
"""


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.export",
        usage="%(prog)s CHECKPOINT OUTPUT [options]",
        description="Write a network for deployment, and check the file.",
        epilog=EPILOG,
    )
    result.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint of ours or of DFN's authors, or a saved folder"
    )
    result.add_argument("output", type=Path, metavar="OUTPUT", help="the file, .onnx or .pt2; replaced if it exists")
    result.add_argument(
        "--format", choices=tuple(SUFFIXES), metavar="NAME", help="pt2, aoti or onnx (default: by suffix, pt2 for .pt2)"
    )
    result.add_argument("--labels", action="store_true", help="take uint8 images and return uint8 class ids")
    result.add_argument(
        "--size", type=cli.size, default=(512, 512), metavar="SIZE", help="size of the images, HxW (default: 512x512)"
    )
    batch = result.add_mutually_exclusive_group()
    batch.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    batch.add_argument("--dynamic", action="store_true", help="accept any batch and size; --size is for the check only")
    result.add_argument(
        "--device", default="auto", help="cuda, cpu or auto: the device of a pt2 or aoti file (default: auto)"
    )
    result.add_argument(
        "--opset", type=int, metavar="N", help=f"ONNX opset, {OPSET} to {LAST_OPSET} (default: {OPSET})"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    file_format = _format_of(arguments)
    _check_arguments(arguments, file_format)
    require_tools(file_format)
    device = choose_device("cpu" if file_format == "onnx" else arguments.device)
    loaded = load_model(arguments.checkpoint, device)
    _check_network(loaded, arguments, file_format)
    network = inference_network(loaded.model)
    if arguments.labels:
        network = Labels(network, device).eval()
    batch = 2 if arguments.dynamic else arguments.batch  # torch.export would keep a batch of 1 as a constant
    shapes = [(batch, *arguments.size)]
    if arguments.dynamic:
        shapes += [(1, arguments.size[0] // 2 + MIN_DYNAMIC, arguments.size[1] + 13)]
    program = export_program(network, random_images(shapes[0], arguments.labels, device), arguments.dynamic)
    opset = arguments.opset or OPSET
    notes = metadata(loaded, arguments.labels)
    write(program, arguments.output, file_format, notes, dynamic=arguments.dynamic, opset=opset)
    what = f"ONNX, opset {opset}" if file_format == "onnx" else f"{file_format}, for {device}"
    print(f"{arguments.output}: {what}, {arguments.output.stat().st_size / 1e6:.1f} MB")
    return compare(arguments.output, file_format, loaded.model, shapes, arguments.labels)


def _format_of(arguments: argparse.Namespace) -> str:
    """The format that ``--format`` or OUTPUT's suffix names."""
    suffix = arguments.output.suffix.lower()
    name = arguments.format or next((name for name in SUFFIXES if SUFFIXES[name] == suffix), None)
    if name is None:
        raise ConfigError(f"{arguments.output}: expected a name that ends in .onnx or .pt2, or give --format")
    if SUFFIXES[name] != suffix:
        raise ConfigError(f"{arguments.output}: --format {name} needs a name that ends in {SUFFIXES[name]}")
    return name


def _check_arguments(arguments: argparse.Namespace, file_format: str) -> None:
    smallest = MIN_DYNAMIC if arguments.dynamic else MIN_SIZE
    if min(arguments.size) < smallest:
        height, width = arguments.size
        dynamic = " with --dynamic" if arguments.dynamic else ""
        raise ConfigError(f"--size {height}x{width}: expected at least {smallest} in each direction{dynamic}")
    if arguments.size[0] * arguments.size[1] > MAX_PIXELS:
        raise ConfigError(f"--size {arguments.size[0]}x{arguments.size[1]}: expected at most {MAX_PIXELS} pixels")
    if not 1 <= arguments.batch <= MAX_BATCH:
        raise ConfigError(f"--batch {brief(arguments.batch)}: expected at least 1 image and at most {MAX_BATCH}")
    if arguments.opset is not None:
        if file_format != "onnx":
            raise ConfigError(f"--opset belongs to --format onnx; leave it out with {file_format}")
        if not OPSET <= arguments.opset <= LAST_OPSET:
            raise ConfigError(f"--opset {arguments.opset}: expected {OPSET} to {LAST_OPSET}")


def _check_network(loaded: LoadedModel, arguments: argparse.Namespace, file_format: str) -> None:
    if arguments.labels and len(loaded.classes) > 256:
        raise ConfigError(f"--labels: {len(loaded.classes)} classes do not fit into uint8; leave the option out")
    size = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    if file_format == "onnx" and size > ONNX_BYTES:
        raise ConfigError(
            f"--format onnx: one file holds less than {ONNX_BYTES / 1e9:.1f} GB, but this network has "
            f"{size / 1e9:.1f} GB; use --format pt2 or aoti"
        )


if __name__ == "__main__":
    cli.run(main)
