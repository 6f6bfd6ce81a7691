"""``python -m dfn_fast.export``: the inference network as a ``torch.export`` program, AOTInductor package or ONNX file.

The file is loaded again and compared with the model that it was made of, on random images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dfn_fast import cli
from dfn_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, scale_and_shift
from dfn_fast.errors import ConfigError
from dfn_fast.execution import choose_device
from dfn_fast.export_formats import (
    EXTRA_FILE,
    LAST_OPSET,
    MIN_DYNAMIC,
    OPSET,
    SUFFIXES,
    export_program,
    quiet,
    read,
    require_tools,
    write,
)
from dfn_fast.loading import LoadedModel, load_model
from dfn_fast.reference import MIN_SIZE, ReferenceDFN

# The largest difference allowed, as a share of the range of the log-probabilities.
TOLERANCE = 1e-4
TOLERANCE_TF32 = 1e-2  # convolutions of a GPU, unless told otherwise, keep ten bits of their inputs
ONNX_BYTES = 2**31 - 2**20  # what one protobuf message holds, less what is not weights

EPILOG = f"""\
The exported network takes normalised RGB, float32 [B, 3, H, W], and returns log-probabilities [B, K, H, W]; with
--labels it takes RGB uint8 [B, H, W, 3] and returns class ids, uint8 [B, H, W]. Class names, colours and a
description of input and output are in the file. Batch norm is folded and every operator a plain one. --dynamic takes
any batch and any H and W from {MIN_DYNAMIC}. The exit code is 1 where the file does not give what the model gives.

formats:
  pt2    torch.export program         torch.export.load(FILE, extra_files={{"{EXTRA_FILE}": ""}}).module()
  aoti   AOTInductor package          torch._inductor.aoti_load_package(FILE); for this kind of device and CPU only
  onnx   ONNX, opset {OPSET} to {LAST_OPSET}, one file of at most 2 GB; needs pip install -e ".[export]"

examples:
  python -m dfn_fast.export runs/camvid/best.pth dfn.onnx --dynamic --labels
  python -m dfn_fast.export best.pth dfn.pt2 --format aoti --size 1024x2048 --device cuda
"""


class Labels(nn.Module):
    """RGB images, uint8 ``[B, H, W, 3]`` -> class ids, uint8 ``[B, H, W]``: normalisation, network and argmax."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network = network
        scale, shift = scale_and_shift(device, torch.float32)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, image: Tensor) -> Tensor:
        data = normalize(image.permute(0, 3, 1, 2), constants=(self.scale, self.shift))  # type: ignore[arg-type]
        return self.network(data).argmax(1).to(torch.uint8)


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.export",
        usage="%(prog)s CHECKPOINT OUTPUT [options]",
        description="Write a network for deployment, and check what was written.",
        epilog=EPILOG,
    )
    result.add_argument("checkpoint", metavar="CHECKPOINT", help="of ours, of DFN's authors, or a saved folder")
    result.add_argument("output", type=Path, metavar="OUTPUT", help="the file, .onnx or .pt2; replaced if it exists")
    result.add_argument(
        "--format", choices=tuple(SUFFIXES), metavar="NAME", help="pt2, aoti or onnx (default: by suffix, pt2 for .pt2)"
    )
    result.add_argument("--labels", action="store_true", help="from uint8 images to uint8 class ids")
    result.add_argument(
        "--size", type=cli.size, default=(512, 512), metavar="SIZE", help="of the images, HxW (default: 512x512)"
    )
    batch = result.add_mutually_exclusive_group()
    batch.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    batch.add_argument("--dynamic", action="store_true", help="any batch and size; --size is then what is checked")
    result.add_argument(
        "--device", default="auto", help="cuda, cpu or auto: of pt2 and aoti files, which have one (default: auto)"
    )
    result.add_argument("--opset", type=int, metavar="N", help=f"of ONNX, {OPSET} to {LAST_OPSET} (default: {OPSET})")
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    file_format = format_of(arguments)
    check_arguments(arguments, file_format)
    require_tools(file_format)
    device = choose_device("cpu" if file_format == "onnx" else arguments.device)
    loaded = load_model(arguments.checkpoint, device)
    check_network(loaded, arguments, file_format)
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
    return check(arguments.output, file_format, loaded.model, shapes, arguments.labels)


def format_of(arguments: argparse.Namespace) -> str:
    """The format that ``--format`` or OUTPUT's suffix names."""
    suffix = arguments.output.suffix.lower()
    name = arguments.format or next((name for name in SUFFIXES if SUFFIXES[name] == suffix), None)
    if name is None:
        raise ConfigError(f"{arguments.output}: expected a name that ends in .onnx or .pt2, or give --format")
    if SUFFIXES[name] != suffix:
        raise ConfigError(f"{arguments.output}: --format {name} wants a name that ends in {SUFFIXES[name]}")
    return name


def check_arguments(arguments: argparse.Namespace, file_format: str) -> None:
    smallest = MIN_DYNAMIC if arguments.dynamic else MIN_SIZE
    if min(arguments.size) < smallest:
        height, width = arguments.size
        dynamic = " with --dynamic" if arguments.dynamic else ""
        raise ConfigError(f"--size {height}x{width}: expected at least {smallest} each way{dynamic}")
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: expected at least 1 image")
    if arguments.opset is not None:
        if file_format != "onnx":
            raise ConfigError(f"--opset belongs to --format onnx; leave it out with {file_format}")
        if not OPSET <= arguments.opset <= LAST_OPSET:
            raise ConfigError(f"--opset {arguments.opset}: expected {OPSET} to {LAST_OPSET}")


def check_network(loaded: LoadedModel, arguments: argparse.Namespace, file_format: str) -> None:
    if arguments.labels and len(loaded.classes) > 256:
        raise ConfigError(f"--labels: {len(loaded.classes)} classes do not fit into uint8; leave the option out")
    size = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    if file_format == "onnx" and size > ONNX_BYTES:
        raise ConfigError(
            f"--format onnx: one file holds less than {ONNX_BYTES / 1e9:.1f} GB, this network has {size / 1e9:.1f} GB; "
            "use --format pt2 or aoti"
        )


def inference_network(model: ReferenceDFN) -> nn.Module:
    """The network with its batch norms folded and of plain operators alone, in eval mode."""
    return model.fuse(plain=True)


def random_images(shape: tuple[int, int, int], labels: bool, device: torch.device) -> Tensor:
    """Batch, height and width -> what the exported network takes."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    if labels:
        return torch.randint(256, (batch, height, width, 3), generator=generator, dtype=torch.uint8).to(device)
    return torch.randn(batch, 3, height, width, generator=generator).to(device)


def metadata(loaded: LoadedModel, labels: bool) -> dict[str, str]:
    """What a user of the file must know; values are JSON or text."""
    normalised = "RGB, (value / 255 - mean) / std, float32 [B, 3, H, W]"
    return {
        "classes": json.dumps(loaded.classes),
        "palette": json.dumps(loaded.palette.tolist()),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "input": "RGB, uint8 [B, H, W, 3]" if labels else normalised,
        "output": "class ids, uint8 [B, H, W]" if labels else "log-probabilities, float32 [B, K, H, W]",
    }


def check(path: Path, file_format: str, model: ReferenceDFN, shapes: list[tuple[int, int, int]], labels: bool) -> int:
    """Compares the file with the model and prints the largest differences. Returns the exit code: 1 where they differ,
    or where the file does not load or run; it stays where it is."""
    device = next(model.parameters()).device
    images = [random_images(shape, labels, device) for shape in shapes]
    try:
        with torch.no_grad(), quiet():
            exported = read(path, file_format)
            results = [exported(image) for image in images]
    except Exception as error:  # whatever it is, the file is no good
        print(f"FAILED: {path} does not load or run: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    code = 0
    for (batch, height, width), image, result in zip(shapes, images, results, strict=True):
        largest, allowed = difference(result, model, image)
        passed = largest <= allowed  # not so for nan
        verdict = f"largest difference {largest:.3g}, tolerance {allowed:.3g}: {'ok' if passed else 'FAILED'}"
        print(f"batch {batch}, {height}x{width}: {verdict}")
        code |= not passed
    if code:
        print(f"{path} does not give what the model gives; it is kept, but do not deploy it", file=sys.stderr)
    return code


@torch.no_grad()
def difference(result: Tensor, model: ReferenceDFN, image: Tensor) -> tuple[float, float]:
    """The largest difference from the model's log-probabilities, and what is allowed. For labels it is what the label's
    log-probability falls short of the pixel's largest. Infinite where shape, dtype or a label is impossible."""
    labels = image.dtype == torch.uint8
    expected = model(normalize(image.permute(0, 3, 1, 2)) if labels else image)  # [B, K, H, W]
    tolerance = TOLERANCE_TF32 if image.is_cuda and torch.backends.cudnn.allow_tf32 else TOLERANCE
    allowed = tolerance * (expected.max() - expected.min()).item()
    like = expected.argmax(1).to(torch.uint8) if labels else expected
    if result.shape != like.shape or result.dtype != like.dtype or (labels and result.max() >= expected.shape[1]):
        return float("inf"), allowed
    if labels:
        chosen = expected.gather(1, result[:, None].long())[:, 0]
        return (expected.amax(1) - chosen).max().item(), allowed
    return (result - expected).abs().max().item(), allowed


if __name__ == "__main__":
    cli.run(main)
