"""``python -m dfn_fast.evaluate``: the metrics of a checkpoint on a split of a data set."""

import argparse
import sys
from pathlib import Path

from dfn_fast import cli
from dfn_fast.config import LARGEST
from dfn_fast.data.base import IGNORE, SegmentationDataset
from dfn_fast.data.border import check_width
from dfn_fast.data.datasets.classes import TABLES
from dfn_fast.data.registry import DATASETS, build_dataset
from dfn_fast.errors import CheckpointError, ConfigError
from dfn_fast.evaluate.evaluation import BORDER_WIDTH, evaluate
from dfn_fast.files import write_json
from dfn_fast.inference.loading import LoadedModel, load_model
from dfn_fast.inference.options import add_inference_options, predictor_from
from dfn_fast.runtime.device import choose_algorithms, choose_device
from dfn_fast.runtime.processes import World, processes

EXAMPLES = """\
examples:
  python -m dfn_fast.evaluate runs/camvid/best.pth --root CamVid
  python -m dfn_fast.evaluate best.pth --data voc --root VOCdevkit --scales 0.5 0.75 1 1.5 1.75 --flip
  python -m dfn_fast.evaluate best.pth --data cityscapes --root cityscapes --window 800 --json val.json
  python -m dfn_fast.evaluate dfn.pth --data voc --root VOCdevkit --rule torchseg
"""


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m dfn_fast.evaluate",
        usage="%(prog)s CHECKPOINT [--data NAME] [--root DATA] [--split SPLIT] [options]",
        description="Measure a checkpoint on a split of a data set: IoU of each class, mIoU, mean and pixel accuracy,\n"
        "boundary F-score.",
        epilog=EXAMPLES,
    )
    result.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint of ours or of DFN's authors, or safetensors"
    )
    data = result.add_argument_group("data")
    data.add_argument(
        "--data", choices=tuple(DATASETS), metavar="NAME", help=f"{', '.join(DATASETS)} (default: as in training)"
    )
    data.add_argument("--root", metavar="DATA", help="folder of the data set; see `python -m dfn_fast.data list`")
    data.add_argument("--split", metavar="SPLIT", help="split to measure on (default: the validation split)")
    data.add_argument(
        "--num-classes", type=int, metavar="N", help="classes of folder or list data (default: the checkpoint's)"
    )
    data.add_argument(
        "--classes", metavar="FILE", help="file of class names of folder, list or coco data, one per line"
    )
    data.add_argument(
        "--ignore-value",
        type=int,
        metavar="N",
        help="value in folder or list data's masks to ignore, besides 255 (default: as in training)",
    )
    data.add_argument(
        "--label-offset",
        type=int,
        metavar="N",
        help="number to add to the values in folder or list data's masks (default: as in training)",
    )
    data.add_argument("--allow-outside-root", action="store_true", help="let lists name files outside --root")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the synthetic scenes (default: 0)")
    data.add_argument("--limit", type=int, metavar="N", help="use only the first N images")
    add_inference_options(result)
    result.add_argument(
        "--deterministic",
        action="store_true",
        help="give the same bits each time (on a CPU: with as many threads), slower on a GPU",
    )
    metrics = result.add_argument_group("metrics")
    metrics.add_argument(
        "--no-boundary", action="store_true", help="leave out the boundary F-score, the slowest metric"
    )
    metrics.add_argument("--border", action="store_true", help="measure the Border Network too")
    metrics.add_argument(
        "--border-width",
        type=int,
        metavar="N",
        help=f"width of the border targets (default: as in training, or {BORDER_WIDTH})",
    )
    metrics.add_argument("--json", type=Path, metavar="FILE", help="also write metrics, settings and versions to FILE")
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for name, minimum, maximum in (("limit", 1, LARGEST), ("num_classes", 2, IGNORE), ("seed", 0, LARGEST)):
        if getattr(arguments, name) is not None:
            cli.require_range(f"--{cli.dashed(name)}", getattr(arguments, name), minimum, maximum)
    if arguments.border_width is not None:
        check_width(arguments.border_width)
        if not arguments.border:
            raise ConfigError(f"--border-width {arguments.border_width} is for the Border Network: add --border")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: its folder does not exist; create it first")
    both = [path for path in (arguments.json, Path(arguments.checkpoint)) if path is not None and path.exists()]
    if len(both) == 2 and both[0].samefile(both[1]):
        raise ConfigError(f"--json {arguments.json} is the checkpoint itself, which it would replace; name another")
    if arguments.deterministic:
        choose_algorithms(True)
    with processes() as world:
        report(arguments, world)
    return 0


def report(arguments: argparse.Namespace, world: World) -> None:
    """Measures the checkpoint, prints the report and, with ``--json``, writes it."""
    loaded = load_model(arguments.checkpoint, choose_device(arguments.device, world))
    predictor = predictor_from(arguments, loaded.model)
    if arguments.border and not loaded.model.has_border:
        raise ConfigError(f"--border: {arguments.checkpoint} has no Border Network; leave the option out")
    width = _border_width(arguments, loaded)
    dataset = _dataset_from(arguments, loaded)
    for note in dataset.notes if world.is_first else ():
        print(f"note: {note}", file=sys.stderr)
    result = evaluate(
        predictor,
        dataset,
        boundary=not arguments.no_boundary,
        border=arguments.border,
        border_width=width,
        limit=arguments.limit,
        progress=world.is_first,
        world=world,
    )
    print(result.table())
    if arguments.json is not None and world.is_first:
        content = {"checkpoint": arguments.checkpoint, "device": str(predictor.device), **result.to_dict()}
        try:
            write_json(arguments.json, content)
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written ({error.strerror})") from error


def _border_width(arguments: argparse.Namespace, loaded: LoadedModel) -> int:
    """The width of the border targets: the option's, the checkpoint's, or the default."""
    if arguments.border_width is not None:
        return arguments.border_width
    if loaded.border_width is None:
        return BORDER_WIDTH
    try:
        check_width(loaded.border_width)
    except ConfigError as error:
        raise CheckpointError(f"{arguments.checkpoint}: {error}; copy or save the checkpoint again") from error
    return loaded.border_width


def _dataset_from(arguments: argparse.Namespace, loaded: LoadedModel) -> SegmentationDataset:
    """The data set that the options name. Raises :class:`ConfigError` if its class count is not the checkpoint's."""
    name = arguments.data or loaded.dataset
    if name not in DATASETS:
        raise ConfigError(f"--data is missing, and {arguments.checkpoint} does not name the data set it was trained on")
    entry, num_classes = DATASETS[name], arguments.num_classes
    root = Path(arguments.root or "")
    tables = (path for table in TABLES for path in (root / table, *root.glob(f"*/{table}")))
    given = num_classes is not None or arguments.classes is not None or any(path.is_file() for path in tables)
    borrowed = entry.free_classes and not given
    ignore_value, label_offset = arguments.ignore_value, arguments.label_offset
    if entry.free_classes:
        ignore_value = loaded.ignore_value if ignore_value is None else ignore_value
        label_offset = loaded.label_offset if label_offset is None else label_offset
    dataset = build_dataset(
        name,
        arguments.root,
        arguments.split or entry.val,
        num_classes=loaded.model.num_classes if borrowed else num_classes,
        classes=arguments.classes,
        ignore_value=ignore_value,
        label_offset=label_offset or 0,
        allow_outside_root=arguments.allow_outside_root,
        seed=arguments.seed,
    )
    if borrowed:
        dataset.classes, dataset.palette = loaded.classes, loaded.palette
    if dataset.num_classes != loaded.model.num_classes:
        trained = f", trained on {loaded.dataset}" if loaded.dataset else ""
        raise ConfigError(
            f"{arguments.checkpoint} has {loaded.model.num_classes} classes{trained}, but data set {name!r} has "
            f"{dataset.num_classes}; choose the checkpoint's data set with --data, or another checkpoint"
        )
    if dataset.classes != loaded.classes:
        first = next(i for i, (a, b) in enumerate(zip(dataset.classes, loaded.classes, strict=True)) if a != b)
        print(
            f"note: class {first} is {dataset.classes[first]!r} in the data set and {loaded.classes[first]!r} in the "
            "checkpoint; the numbers below are meaningful only if both names mean the same class",
            file=sys.stderr,
        )
    return dataset


if __name__ == "__main__":
    cli.run(main)
