"""The arguments of a :class:`~dfn_fast.inference.predictor.Predictor` as options of evaluate and predict."""

import argparse

from dfn_fast import cli
from dfn_fast.inference.engine import AMPS
from dfn_fast.inference.predictor import Predictor
from dfn_fast.inference.settings import RULES
from dfn_fast.inference.windows import WEIGHTS
from dfn_fast.network.reference import ReferenceDFN


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """The options of a :class:`Predictor`, alike in evaluate and predict."""
    group = parser.add_argument_group("inference")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="image scales (default: 1)")
    group.add_argument("--flip", action="store_true", help="take the mirror image in at each scale")
    group.add_argument(
        "--window", type=cli.size, metavar="SIZE", help="cut into windows, 512 or 512x1024 (default: whole image)"
    )
    group.add_argument(
        "--overlap",
        type=float,
        default=1 / 3,
        metavar="X",
        help="share of a window that the next covers (default: 1/3)",
    )
    group.add_argument(
        "--rule",
        "--preset",  # its older name
        dest="rule",
        choices=RULES,
        default="mean",
        metavar="NAME",
        help="mean: probabilities are averaged (default); torchseg: as DFN's authors combine them, windows of 512",
    )
    group.add_argument(
        "--window-weight",
        choices=WEIGHTS,
        default="count",
        metavar="NAME",
        help="of windows that overlap: count, all alike (default), or gaussian, less towards their edges",
    )
    group.add_argument(
        "--amp",
        choices=AMPS,
        metavar="NAME",
        help="off, bf16, fp16, or auto: bf16, on a CPU unless the first image's labels change with it "
        "(default: auto on CUDA, off on a CPU)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network: half a minute a size, first")
    group.add_argument(
        "--bucket", type=int, metavar="N", help="pad images to multiples of N: fewer sizes to prepare for on CUDA"
    )
    group.add_argument("--device", default="auto", help="cuda, cuda:1, cpu or auto: CUDA where there is one (default)")


def predictor_from(arguments: argparse.Namespace, model: ReferenceDFN) -> Predictor:
    """The predictor that the options of :func:`add_inference_options` ask for, on the model's device."""
    names = ("scales", "flip", "window", "overlap", "window_weight", "rule", "amp", "compile", "bucket")
    settings = {name: getattr(arguments, name) for name in names}
    if settings["amp"] is None:  # labels that depend on which image came first must be asked for
        settings["amp"] = "auto" if next(model.parameters()).is_cuda else "off"
    return Predictor(model, **settings)
