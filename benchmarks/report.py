"""``python -m benchmarks.report``: the tables of the README, made from the files under ``benchmarks/results/``.

Writes them between two markers of the README; ``--check`` says instead whether they are there, as a test does. Of each
machine the newest rows of each group count, and every table names its files. A figure that a file does not have is a
dash.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.reporting import plots
from benchmarks.reporting.results import RESULTS, with_newer
from benchmarks.reporting.tables import TABLES, Row
from dfn_fast import cli
from dfn_fast.files import write_text

README = RESULTS.parent.parent / "README.md"
BEGIN = "<!-- made by python -m benchmarks.report from benchmarks/results: do not edit -->"
END = "<!-- end of results -->"


def machines(results: Path = RESULTS) -> list[Path]:
    """The folders of result files, one for each machine."""
    return sorted({path.parent for path in results.glob("*/*.json")})


def newest(folder: Path) -> tuple[Row, dict[str, dict[str, Any]]]:
    """A machine's facts, and each suite's ``rows``, of each group the newest, with the ``files`` that they are from."""
    machine: Row = {}
    suites: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        machine |= content["machine"]
        for name, rows in content["suites"].items():
            fresh = [row | {"file": path.name} for row in rows]
            suites[name] = {"rows": with_newer(suites[name]["rows"] if name in suites else [], fresh)}
    for suite in suites.values():
        suite["files"] = sorted({row["file"] for row in suite["rows"]})
    return machine, suites


PICTURES = {
    "waterfall.png": "Bars: how many times faster than eager float32 each technique makes training and inference",
    "roofline.png": "Points: operations a second over operations a byte, below the roofs that were measured",
    "learning.png": "Lines: mIoU of validation over epochs and over minutes of training, the plain network and ours",
    "scaling.png": "Lines: milliseconds of a batch over the pixels of an image",
}


LONG = ("test_convolutions",)  # folded


def section(folder: Path) -> list[str]:
    """A machine's tables."""
    machine, suites = newest(folder)
    kept = [name for name in TABLES if name in suites]
    if not kept:
        return []
    of = "" if "driver" in machine or "instructions" not in machine else f" ({machine['instructions']})"
    lines = [f"### {machine['device']}{of}, torch {machine['torch']}, {machine['threads']} threads", ""]
    if "copy_gb_per_s" in machine:
        lines += [roofs(machine), ""]
    for picture, words in PICTURES.items():
        if (folder / picture).is_file():
            lines += [f"![{words}](benchmarks/results/{folder.name}/{picture})", ""]
    for name in kept:
        files = " and ".join(f"`benchmarks/results/{folder.name}/{file}`" for file in suites[name]["files"])
        source = f"`{name}`, from {files}"
        body = [*TABLES[name](suites[name]["rows"]), "", source, ""]
        lines += folded(f"{name}: {len(suites[name]['rows'])} rows", body) if name in LONG else body
    for path in sorted(folder.glob("breakdown_*.txt")):
        title, *body = path.read_text().splitlines()
        lines += folded(f"where the time goes: {title}", ["```", *body, "```", ""])
    return lines


def roofs(machine: Row) -> str:
    """The ceilings of the shares, in words."""
    products = [
        f"{machine[f'product_{dtype}_tflop_per_s']:.3g} TFLOP/s {dtype}"
        for dtype in ("float32", "bfloat16", "float16")
        if f"product_{dtype}_tflop_per_s" in machine
    ]
    return f"Measured here: a copy moves {machine['copy_gb_per_s']:.3g} GB/s, a matrix product {', '.join(products)}."


def folded(title: str, lines: list[str]) -> list[str]:
    """Markdown that opens at a click."""
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]


def text(results: Path = RESULTS) -> str:
    """What stands between the markers: the first machine's tables, and those of others folded. GPUs come first, then
    what was measured last.

    Columns named after an implementation say how much faster ours is.
    """

    def rank(folder: Path) -> tuple[bool, str]:
        return "driver" in newest(folder)[0], max(path.stem for path in folder.glob("*.json"))

    folders = sorted(machines(results), key=rank, reverse=True)
    lines: list[str] = []
    for folder in folders:
        found = section(folder)
        lines += folded(found[0].lstrip("# "), found[2:]) if lines and found else found
    return "\n".join([BEGIN, "", *lines, END])


def with_results(readme: str, results: str) -> str:
    """The README with ``results`` in place of what stands between its markers. ValueError where it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no markers {BEGIN!r} and {END!r}")
    return before + results + after


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.report",
        usage="%(prog)s [--check]",
        description="Write the tables of the README from benchmarks/results/.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the README differs")
    arguments = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    if arguments.check:
        return int(old != with_results(old, text()))
    for folder in machines():
        machine, suites = newest(folder)
        plots.draw({name: found["rows"] for name, found in suites.items()}, folder, machine)
    write_text(README, with_results(old, text()))
    return 0


if __name__ == "__main__":
    cli.run(main)
