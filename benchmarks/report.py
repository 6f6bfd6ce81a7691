"""``python -m benchmarks.report``: makes tables and pictures from the files under ``benchmarks/results/``.

Writes all of them to ``benchmarks/RESULTS.md`` and a short table between two markers of the README. ``--check`` instead
says whether they are up to date, as a test does. The newest rows of each group count, for each machine, and every table
names its files. A figure that a file does not have is a dash.
"""

import sys
from pathlib import Path

from benchmarks.reporting import plots
from benchmarks.reporting.results import RESULTS, machines, newest, title_of
from benchmarks.reporting.summary import summary
from benchmarks.reporting.tables import TABLES, Row
from dfn_fast import cli
from dfn_fast.files import write_text

README = RESULTS.parent.parent / "README.md"
PAGE = RESULTS.parent / "RESULTS.md"
BEGIN = "<!-- made by python -m benchmarks.report from benchmarks/results: do not edit -->"
END = "<!-- end of results -->"
INTRODUCTION = """
# Results

Columns named after an implementation say how many times faster ours is; [README.md](README.md) explains the others.
"""
PICTURES = {
    "waterfall.png": "Bars: how fast each technique makes training and inference, as a multiple of eager float32",
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
    lines = [f"## {title_of(machine)}", ""]
    if "copy_gb_per_s" in machine:
        lines += [roofs(machine), ""]
    for picture, words in PICTURES.items():
        if (folder / picture).is_file():
            lines += [f"![{words}](results/{folder.name}/{picture})", ""]
    for name in kept:
        files = " and ".join(f"`results/{folder.name}/{file}`" for file in suites[name]["files"])
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
    """``RESULTS.md``: the first machine's tables, then the others', folded."""
    lines: list[str] = []
    for folder in machines(results):
        found = section(folder)
        lines += folded(found[0].lstrip("# "), found[2:]) if lines and found else found
    return "\n".join([BEGIN, INTRODUCTION, *lines])


def with_results(readme: str, results: str) -> str:
    """The README with ``results`` between its markers. Raises ValueError if it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """The text of each file that shows results."""
    return {README: with_results(README.read_text(encoding="utf-8"), "\n".join(summary())), PAGE: text()}


def differing(wanted: dict[Path, str]) -> list[str]:
    """The names of the files whose text is not the wanted one."""
    return [path.name for path, new in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != new]


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.report",
        usage="%(prog)s [--check]",
        description="Write benchmarks/RESULTS.md and the README's table from benchmarks/results/.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if one of the two differs")
    arguments = parser.parse_args(argv)
    if arguments.check:
        for name in (different := differing(pages())):
            print(f"{name} does not show benchmarks/results/: run python -m benchmarks.report", file=sys.stderr)
        return int(bool(different))
    for folder in machines():
        machine, suites = newest(folder)
        plots.draw({name: found["rows"] for name, found in suites.items()}, folder, machine)
    for path, new in pages().items():
        write_text(path, new)
    return 0


if __name__ == "__main__":
    cli.run(main)
