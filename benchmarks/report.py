"""``python -m benchmarks.report``: the tables of the README, made from the files under ``benchmarks/results/``.

Writes them between two markers of the README; ``--check`` says instead whether they are there, as a test does. Of each
machine the newest row of each benchmark counts, and every table names its file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.record import RESULTS
from dfn_fast import cli
from dfn_fast.atomic import write_text

README = RESULTS.parent.parent / "README.md"
BEGIN = "<!-- made by python -m benchmarks.report from benchmarks/results: do not edit -->"
END = "<!-- end of results -->"
Row = dict[str, Any]


def machines(results: Path = RESULTS) -> list[Path]:
    """The folders of result files, one for each machine."""
    return sorted(path for path in results.iterdir() if path.is_dir())


def newest(folder: Path) -> tuple[Row, dict[str, dict[str, Any]]]:
    """A machine's facts, and each suite's rows with the date of its newest file."""
    machine: Row = {}
    suites: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        machine = content["machine"]
        suites |= {name: {"date": content["date"], "rows": rows} for name, rows in content["suites"].items()}
    return machine, suites


def by_group(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by group and implementation."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["implementation"]] = row
    return groups


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown, the first column to the left and the others to the right."""
    return [
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def times(row: Row, name: str) -> str:
    """A speed-up, or a dash where there was nothing to compare with."""
    return f"{row[name]:.2f} x" if name in row else "-"


def share(row: Row, name: str, other: str) -> str:
    return f"{row[name] / row[other]:.2f} x" if name in row and row.get(other) else "-"


def speed_table(title: str, rows: list[Row], shares: dict[str, tuple[str, str]]) -> list[str]:
    """A line for each ``ours``: its time, how much faster it is than each other, and memory as ``shares`` of theirs."""
    others = {"float32": "float32", "channels_last": "eager", "compiled": "compile"}
    lines = []
    for group, found in by_group(rows).items():
        ours = found.get("ours")
        if ours is not None:
            figures = [f"{ours['ours_ms']:.0f}", f"{ours['images_per_s']:.2f}"]
            figures += [times(ours, f"speed_up_over_{name}") for name in others.values()]
            lines.append([group, *figures, *(share(ours, *names) for names in shares.values())])
    return table([title, "ms", "images/s", *others, *shares], lines)


def training_table(rows: list[Row]) -> list[str]:
    shares = {"peak memory": ("ours_memory", "eager_memory"), "activations": ("ours_held", "eager_held")}
    return speed_table("training step", rows, shares)


def inference_table(rows: list[Row]) -> list[str]:
    return speed_table("inference", rows, {"peak memory": ("peak_memory_bytes", "float32_memory")})


def operator_table(rows: list[Row]) -> list[str]:
    """Those that are slower than ``torch.compile`` of their definition come first."""
    ours = [found["ours"] for found in by_group(rows).values() if "ours" in found]
    lines = []
    for row in sorted(ours, key=lambda row: -row.get("ratio_to_compile", 0)):
        ratios = [f"{1 / row[name]:.2f} x" if name in row else "-" for name in ("ratio_to_eager", "ratio_to_compile")]
        lines.append(
            [row["group"], f"{row['median_ms']:.2f}", *ratios, f"{row['gb_per_s']:.1f}", f"{row['share_of_copy']:.0%}"]
        )
    return table(["operator", "ms", "eager", "compiled", "GB/s", "of a copy"], lines)


def waterfall_table(rows: list[Row]) -> list[str]:
    """A technique a row, each added to those above it."""
    lines = [
        [
            row["implementation"],
            f"{row['ms']:.0f}",
            f"{row['images_per_s']:.2f}",
            f"{row['speed_up']:.2f} x",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    return table([rows[0]["group"], "ms", "images/s", "speed-up", "peak MB", "difference"], lines)


def scaling_table(rows: list[Row]) -> list[str]:
    """The exponents alone; the points are in the file and in the picture."""
    found = [row for row in rows if row["implementation"] == "exponent"]
    lines = [
        [f"{row['group'].split(',')[0]}, {row['of']}", f"{row['time_exponent']:.2f}", f"{row['memory_exponent']:.2f}"]
        for row in found
    ]
    return table(["grows with", "time to the power of", "memory to the power of"], lines)


PICTURES = {
    "waterfall.png": "Bars: how many times faster than eager float32 each technique makes training and inference",
    "scaling.png": "Lines: milliseconds of a batch over the pixels of an image",
}
TABLES = {
    "waterfall_training": waterfall_table,
    "waterfall_inference": waterfall_table,
    "test_training_step": training_table,
    "test_inference": inference_table,
    "test_operators": operator_table,
    "scaling_inference": scaling_table,
    "scaling_training": scaling_table,
}


def section(folder: Path) -> list[str]:
    """A machine's tables."""
    machine, suites = newest(folder)
    kept = [name for name in TABLES if name in suites]
    if not kept:
        return []
    lines = [f"### {machine['device']}, torch {machine['torch']}, {machine['threads']} threads", ""]
    for picture, words in PICTURES.items():
        if (folder / picture).is_file():
            lines += [f"![{words}](benchmarks/results/{folder.name}/{picture})", ""]
    for name in kept:
        lines += [*TABLES[name](suites[name]["rows"]), ""]
        lines += [f"`{name}`, from `benchmarks/results/{folder.name}/{suites[name]['date']}.json`", ""]
    return lines


def text(results: Path = RESULTS) -> str:
    """What stands between the markers. Columns named after an implementation say how much faster ours is."""
    lines: list[str] = []
    for folder in machines(results):
        lines += section(folder)
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
        suites = {name: found["rows"] for name, found in newest(folder)[1].items()}
        plots.draw(suites, folder)
    write_text(README, with_results(old, text()))
    return 0


if __name__ == "__main__":
    cli.run(main)
