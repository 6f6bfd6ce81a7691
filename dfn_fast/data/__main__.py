"""``python -m dfn_fast.data``: checks a data set, shows the layouts on disk, converts labels."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dfn_fast import cli
from dfn_fast.data.base import FILE_SECONDS, IGNORE
from dfn_fast.data.check import Report, check
from dfn_fast.data.convert.write import FORMS, convert
from dfn_fast.data.datasets.sbd import convert_sbd
from dfn_fast.data.registry import DATASETS
from dfn_fast.errors import ConfigError, printable
from dfn_fast.files import write_json

PROG = "python -m dfn_fast.data"
SHOWN = 20
MAX_TIMEOUT = 86400
MAX_WORKERS = 256


def main(arguments: list[str] | None = None) -> int:
    """Runs the command named first with the arguments after it; returns the exit code."""
    parser = cli.Parser(
        prog=PROG,
        description="Data sets: see their layouts on disk, check yours, convert labels of other programs.",
        epilog=f"`{PROG} COMMAND --help` shows a command's options.\n\n" + layouts(),
    )
    parser.add_argument(
        "command",
        choices=list(COMMANDS),
        help="check: read every file of a data set; list: show the data sets and their folders; "
        "convert: make a folder of masks from LabelMe, COCO, YOLO, CVAT or colours; "
        "convert-sbd: make VOC's train_aug from SBD",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    chosen = parser.parse_args(arguments)
    return COMMANDS[chosen.command](chosen.arguments)


def _check_command(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog=f"{PROG} check",
        description="Reads every image and label of a data set. Exit code: 0 if all is well, 1 if\n"
        "something is wrong with the data, 2 if something is wrong with the command.",
    )
    parser.add_argument("dataset", metavar="DATASET", choices=list(DATASETS), help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--root", metavar="DIR", help=f"the data set's folder; `{PROG} list` shows what is in it")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="splits to read (default: train and val)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes, if there is no classes.txt")
    parser.add_argument(
        "--classes", metavar="FILE", help="classes of a folder, a list or coco, one per line: name, or name R G B"
    )
    parser.add_argument(
        "--ignore-value", type=int, metavar="N", help="value in the masks of a folder or list to ignore, besides 255"
    )
    parser.add_argument(
        "--label-offset",
        type=int,
        metavar="N",
        default=0,
        help="number to add to the values in the masks of a folder or list; -1 if their classes begin at 1 and 0 is "
        "no label (default: 0)",
    )
    parser.add_argument("--allow-outside-root", action="store_true", help="let lists name files outside --root")
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=int, metavar="N", default=cores, help="threads (default: one per core, up to 8)"
    )
    parser.add_argument(
        "--file-timeout",
        type=float,
        metavar="SECONDS",
        default=FILE_SECONDS,
        help=f"for an image and its label (default: {FILE_SECONDS}; 0: no limit)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything found to this file too")
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.workers <= MAX_WORKERS:
        raise ConfigError(f"--workers {chosen.workers}: expected at least 1 and at most {MAX_WORKERS}")
    if not 0 <= chosen.file_timeout <= MAX_TIMEOUT:
        raise ConfigError(f"--file-timeout {chosen.file_timeout}: expected 0..{MAX_TIMEOUT} seconds")
    if chosen.json and not Path(chosen.json).parent.is_dir():
        raise ConfigError(f"--json {chosen.json}: its folder does not exist; create it first")
    report = check(
        chosen.dataset,
        chosen.root,
        chosen.split,
        num_classes=chosen.num_classes,
        classes=chosen.classes,
        ignore_value=chosen.ignore_value,
        label_offset=chosen.label_offset,
        allow_outside_root=chosen.allow_outside_root,
        workers=chosen.workers,
        file_timeout=chosen.file_timeout,
    )
    print(printable(_render(report)))
    if chosen.json:
        try:
            write_json(chosen.json, report.as_json())
        except OSError as error:
            raise ConfigError(f"--json {chosen.json}: cannot be written ({error.strerror})") from error
    return 1 if report.all_problems() else 0


def _list_command(arguments: list[str]) -> int:
    cli.Parser(prog=f"{PROG} list", description="Shows the data sets and their folders.").parse_args(arguments)
    print(layouts())
    return 0


def _convert_command(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog=f"{PROG} convert",
        description="Makes a data set of form `folder` from labels of another program: images, masks of class ids and\n"
        "classes.txt, with the splits that it has. Nothing is written unless everything can be read.",
        epilog="FORM      SOURCE\n"
        "labelme   a folder of images and LabelMe's .json files\n"
        "coco      annotations/instances_X.json and X/, or *.coco.json beside its images\n"
        "yolo      images/ and labels/ with outlines in .txt files, data.yaml or classes.txt\n"
        "cvat      annotations.xml of 'CVAT for images 1.1', and images/\n"
        "colour    images/, masks/ of colours, and their table, as data set `folder` reads them",
    )
    parser.add_argument("form", metavar="FORM", choices=list(FORMS), help=f"one of {', '.join(FORMS)}")
    parser.add_argument("source", metavar="SOURCE", help="the folder of the labels")
    parser.add_argument("target", metavar="TARGET", help="the folder to write, which must not exist or be empty")
    parser.add_argument("--classes", metavar="FILE", help="the classes that shapes may have (default: all in SOURCE)")
    chosen = parser.parse_args(arguments)
    done = convert(chosen.form, chosen.source, chosen.target, chosen.classes)
    values = [v for v in range(256) if v < len(done.classes) or done.pixels[v]]
    names = [done.classes[v] if v < len(done.classes) else "ignored" for v in values]
    rows = [[str(v), name, str(done.images[v]), str(done.pixels[v])] for v, name in zip(values, names, strict=True)]
    lines = _table(["id", "class", "images", "pixels"], rows)
    lines += [f"note: {note}" for note in done.notes]
    counts = ", ".join(f"{count} {split}".strip() for split, count in done.splits.items())
    lines += [f"{counts} images in {chosen.target}; look at them with", f"{PROG} check folder --root {chosen.target}"]
    print(printable("\n".join(lines)))
    return 0


def _convert_sbd_command(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog=f"{PROG} convert-sbd",
        description="Makes VOC's SegmentationClassAug and train_aug.txt from SBD's .mat files (needs SciPy).\n"
        "Existing labels are kept, so an interrupted run can be started again.",
    )
    parser.add_argument("sbd_root", metavar="SBD_ROOT", help="the folder of the unpacked benchmark.tgz")
    parser.add_argument("voc_root", metavar="VOC_ROOT", help="VOC2012, or VOCdevkit; the labels are written there")
    chosen = parser.parse_args(arguments)
    done = convert_sbd(chosen.sbd_root, chosen.voc_root)
    print(f"{done.images} images in {done.list_file}, {done.written} labels written")
    if done.sbd_images:
        print(
            f"{done.sbd_images} of the images are not in VOC's JPEGImages: the list takes them from SBD's img folder. "
            "If that is not below --root, read it with --allow-outside-root"
        )
    if done.images != DATASETS["voc"].counts["train_aug"]:
        print(f"note: the published train_aug has {DATASETS['voc'].counts['train_aug']} images")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "check": _check_command,
    "list": _list_command,
    "convert": _convert_command,
    "convert-sbd": _convert_sbd_command,
}


def layouts() -> str:
    """Every data set with its splits and its directory tree, as text."""
    blocks = []
    for name, entry in DATASETS.items():
        splits = f"splits: {', '.join(entry.splits)}" if entry.splits else "splits: they depend on the root"
        blocks.append(f"{name}: {entry.description}\n  {splits}\n{textwrap.indent(entry.tree, '  ')}".rstrip())
    return "\n\n".join(blocks)


def _render(report: Report) -> str:
    """The report as text: a table of the splits, one of the classes, then problems, warnings and notes."""
    lines = [f"{report.dataset}" + (f" in {report.root}" if report.root else ""), ""]
    header = ["split", "images", "most common size", "smallest", "median", "largest", f"ignored ({IGNORE})"]
    rows = []
    for s in report.splits:
        sizes = {what: f"{w}x{h}" for what, (w, h) in s.size_summary().items()}
        common = f"{sizes['most common']} ({max(s.sizes.values())} images)" if sizes else "-"
        rows.append(
            [s.split, str(len(s.names)), common]
            + [sizes.get(what, "-") for what in ("smallest", "median", "largest")]
            + [_percent(s.shares()[IGNORE])]
        )
    lines += [*_table(header, rows), ""]
    values = [v for v in range(256) if v < len(report.classes) or any(s.pixels[v] for s in report.splits)]
    if any(s.pixels.any() for s in report.splits):
        rows = [[str(v), _class_name(v, report), *(_percent(s.shares()[v]) for s in report.splits)] for v in values]
        lines += ["Share of all pixels:", *_table(["id", "class", *(s.split for s in report.splits)], rows), ""]
    for title, texts in (
        ("Problem", report.all_problems()),
        ("Warning", report.all_warnings()),
        ("Note", report.all_notes()),
    ):
        if texts:
            more = [f"  and {len(texts) - SHOWN} more; --json FILE writes them all"] if len(texts) > SHOWN else []
            lines += [f"{title}s ({len(texts)}):", *(f"  {text}" for text in texts[:SHOWN]), *more, ""]
    return "\n".join([*lines, _verdict(len(report.all_problems()), len(report.all_warnings()))])


def _verdict(problems: int, warnings: int) -> str:
    if problems:
        return f"{problems} problem{'s' * (problems != 1)} found"
    if warnings:
        return f"No problem found, but {warnings} warning{'s' * (warnings != 1)}: read before you train."
    return "Nothing is wrong."


def _class_name(value: int, report: Report) -> str:
    if value < len(report.classes):
        return report.classes[value]
    return "ignored" if value == IGNORE else "NO CLASS"


def _percent(share: np.floating) -> str:
    """Per cent with two decimals, but never 0.00 for a share above 0."""
    return "-" if not share else "<0.01 %" if share < 5e-5 else f"{100 * share:.2f} %"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    left = [any(row[i][:1].isalpha() for row in rows) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = zip(row, widths, left, strict=True)
        return "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in cells).rstrip()

    return [line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)]


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
