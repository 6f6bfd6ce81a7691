"""The arguments of a :class:`~dfn_fast.inference.predictor.Predictor` as options of evaluate and predict."""

import argparse

from dfn_fast import cli
from dfn_fast.inference.engine import AMPS
from dfn_fast.inference.predictor import Predictor
from dfn_fast.inference.settings import RULES
from dfn_fast.inference.windows import WEIGHTS
from dfn_fast.network.reference import ReferenceDFN


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a :class:`Predictor`, the same for evaluate and predict."""
    group = parser.add_argument_group("inference")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="image scales (default: 1)")
    group.add_argument("--flip", action="store_true", help="also average over the mirror image at each scale")
    group.add_argument(
        "--window",
        type=cli.size,
        metavar="SIZE",
        help="use sliding windows, such as 512 or 512x1024 (default: whole image)",
    )
    group.add_argument(
        "--overlap",
        type=float,
        default=1 / 3,
        metavar="X",
        help="least share of a window that the next one covers too (default: 1/3)",
    )
    group.add_argument(
        "--rule",
        "--preset",  # its older name
        dest="rule",
        choices=RULES,
        default="mean",
        metavar="NAME",
        help="mean: average probabilities (default); torchseg: combine them as DFN's authors do, in windows of "
        "512; --preset is the older name",
    )
    group.add_argument(
        "--window-weight",
        choices=WEIGHTS,
        default="count",
        metavar="NAME",
        help="weigh overlapping windows: count, all alike (default), or gaussian, less towards their edges",
    )
    group.add_argument(
        "--amp",
        choices=AMPS,
        metavar="NAME",
        help="precision of inference: off, bf16, fp16, or auto: bf16, on a CPU only if it changes fewer than one label "
        "in a thousand of the first image (default: auto on CUDA, off on a CPU); independent of --amp in training",
    )
    group.add_argument(
        "--compile", action="store_true", help="use torch.compile, which takes half a minute for each new size"
    )
    group.add_argument(
        "--bucket", type=int, metavar="N", help="pad images to multiples of N, for fewer sizes to prepare on CUDA"
    )
    group.add_argument("--device", default="auto", help="cuda, cuda:1, cpu or auto: CUDA if there is one (default)")


def predictor_from(arguments: argparse.Namespace, model: ReferenceDFN) -> Predictor:
    """The predictor for the options of :func:`add_inference_options`, on the model's device."""
    names = ("scales", "flip", "window", "overlap", "window_weight", "rule", "amp", "compile", "bucket")
    settings = {name: getattr(arguments, name) for name in names}
    if settings["amp"] is None:  # on a CPU, auto makes labels depend on the first image, so it is never the default
        settings["amp"] = "auto" if next(model.parameters()).is_cuda else "off"
    return Predictor(model, **settings)
