"""The fields of :class:`TrainConfig` as options of ``python -m dfn_fast.train``."""

import argparse
import dataclasses
import sys
import typing
from typing import Any

from dfn_fast import cli
from dfn_fast.config import LARGEST, PRESETS, RECIPES, TrainConfig, load_config, recipe
from dfn_fast.errors import ConfigError

EPILOG = """\
recipes (--preset torchseg: learning rates, weight decay and focal loss of the authors' code):
  synthetic    scenes made on the spot, no data needed; ResNet-18, minutes on a CPU
  camvid       DFN-R101 from scratch, 352 x 480
  voc          DFN-R101 on VOC 2012 with SBD's labels, 512 x 512
  cityscapes   DFN-R101, 800 x 800
A recipe's network and numbers suit other data too: `camvid --data folder --root photos/`.

examples:
  python -m dfn_fast.train
  python -m dfn_fast.train camvid --root CamVid --backbone resnet18 --channels 128
  python -m dfn_fast.train voc --root VOCdevkit --preset torchseg --output-dir runs/torchseg
  python -m dfn_fast.train voc --resume --output-dir runs/torchseg
  torchrun --nproc_per_node=8 -m dfn_fast.train voc --root VOCdevkit
"""

# Fields that a continuation may change: they decide where and how fast the run computes, not what.
RESUMABLE = {"root", "workers", "device", "log_every", "val_every", "checkpoint_every", "tensorboard", "output_dir"}
RESUMABLE |= {"memory", "cuda_graph", "fsdp", "allow_outside_root", "loader_timeout"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the options. ``--help`` shows the defaults of the recipe, preset or ``--config`` given with it."""
    given = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(given):
        rest = [word for word in given if word not in ("-h", "--help")]
        chosen, _ = parser().parse_known_args(rest)
        parser(_base(chosen)).print_help()
        sys.exit(0)
    arguments = parser().parse_args(argv)
    if arguments.stop_after is not None:
        cli.require_range("--stop-after", arguments.stop_after, 1, LARGEST)
    return arguments


def parser(defaults: TrainConfig | None = None) -> cli.Parser:
    """Returns a parser with a group for each group of fields, in the dataclass's order. Help shows ``defaults``."""
    defaults = defaults or recipe("synthetic")
    result = cli.Parser(
        prog="python -m dfn_fast.train",
        usage="%(prog)s [RECIPE] [--root DATA] [--output-dir DIR] [--resume] [options]",
        description=f"Train DFN. The defaults below are those of the recipe {defaults.recipe}; options override them.\n"
        "`RECIPE --help` shows another recipe's.",
        epilog=EPILOG,
    )
    result.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"{', '.join(RECIPES)} (default: synthetic)")
    result.add_argument(
        "--preset",
        choices=PRESETS,
        help="training numbers of the recipe: the paper's (default) or TorchSeg's; unrelated to --rule of evaluate",
    )
    result.add_argument("--config", metavar="FILE", help="start from the config.json of another run, not a recipe")
    result.add_argument("--resume", action="store_true", help="continue the run in --output-dir (default: the newest)")
    result.add_argument("--stop-after", type=int, metavar="N", help="save and exit after iteration N of the run")
    result.add_argument(
        "--profile", action="store_true", help="show where the time of a few steps goes, and write trace.json.gz"
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(TrainConfig):
        name = f.metadata["group"]
        if name:
            group = groups.get(name) or groups.setdefault(name, result.add_argument_group(name))
            _add_field(group, f, getattr(defaults, f.name))
    return result


def _add_field(group: Any, f: dataclasses.Field, default: Any) -> None:
    kind = typing.get_type_hints(TrainConfig)[f.name]
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name, "help": f.metadata["help"]}
    if kind is bool or bool in typing.get_args(kind):
        settings |= {"action": argparse.BooleanOptionalAction}
        if default is not None:
            settings["help"] += f" (default: {'on' if default else 'off'})"
    else:
        plain = next(t for t in (int, float, str) if t is kind or t in typing.get_args(kind))
        if f.name == "crop":
            settings |= {"type": cli.size, "metavar": "SIZE"}
            default = "x".join(map(str, default))
        elif typing.get_origin(kind) is tuple:
            settings |= {"type": plain, "nargs": "+", "metavar": "X"}
            default = " ".join(f"{x:g}" for x in default)
        else:
            settings |= {"type": plain, "metavar": {int: "N", float: "X", str: "TEXT"}[plain]}
        if f.name in ("pretrained", "weights"):
            settings["type"] = _file_or_none
        if f.metadata["choices"]:
            settings |= {"choices": f.metadata["choices"], "metavar": "NAME"}
            settings["help"] += f": {', '.join(f.metadata['choices'])}"
        if default is not None:
            settings["help"] += (
                f" (default: {default:g})"
                if plain is float and not isinstance(default, str)
                else f" (default: {default})"
            )
    group.add_argument(f"--{cli.dashed(f.name)}", **settings)


def _file_or_none(text: str) -> str | None:
    """The file or name, or None for ``none``; a file of that name is ``./none``."""
    return None if text == "none" else text


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given on the command line."""
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"recipe"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def new_config(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration of a new run: a recipe or a file, then the options."""
    return dataclasses.replace(_base(arguments), **overrides(arguments))


def _base(arguments: argparse.Namespace) -> TrainConfig:
    """The recipe or file that the options override."""
    if arguments.config:
        if arguments.recipe or arguments.preset:
            raise ConfigError("--config takes the place of RECIPE and --preset; give one or the other")
        return dataclasses.replace(load_config(arguments.config), output_dir=None)
    return recipe(arguments.recipe or "synthetic", arguments.preset or "paper")


def _fields_of(arguments: argparse.Namespace, saved: TrainConfig) -> dict[str, Any]:
    """The fields that ``--config`` or ``--preset`` sets."""
    if arguments.config:
        file = load_config(arguments.config)
        return {f.name: getattr(file, f.name) for f in dataclasses.fields(file) if f.name != "recipe"}
    if not arguments.preset:
        return {}
    presets = [recipe(saved.recipe, preset) for preset in PRESETS]
    differ = [f.name for f in dataclasses.fields(saved) if len({getattr(one, f.name) for one in presets}) > 1]
    return {name: getattr(recipe(saved.recipe, arguments.preset), name) for name in differ}


def resumed_config(saved: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """The saved configuration with the given options. Raises :class:`ConfigError` if one would change the result."""
    given = overrides(arguments)
    for name, value in {**_fields_of(arguments, saved), **given}.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ConfigError(
                f"--{cli.dashed(name)} {value} differs from the run that --resume continues ({getattr(saved, name)}); "
                "leave it out, or start a new run with --config and --weights"
            )
    if arguments.recipe not in (None, saved.recipe):
        raise ConfigError(f"--resume: the run in this folder is of recipe {saved.recipe!r}, not {arguments.recipe!r}")
    return dataclasses.replace(saved, **{k: v for k, v in given.items() if k in RESUMABLE})
