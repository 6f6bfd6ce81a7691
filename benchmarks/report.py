"""``python -m benchmarks.report``: the tables of the README, made from the files under ``benchmarks/results/``.

Writes them between two markers of the README; ``--check`` says instead whether they are there, as a test does. Of each
machine the newest rows of each group count, and every table names its files. A figure that a file does not have is a
dash.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.record import RESULTS, with_newer
from dfn_fast import cli
from dfn_fast.files import write_text

README = RESULTS.parent.parent / "README.md"
BEGIN = "<!-- made by python -m benchmarks.report from benchmarks/results: do not edit -->"
END = "<!-- end of results -->"
Row = dict[str, Any]


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


def figure(row: Row | None, name: str, form: str) -> str:
    """A figure of a row in a format such as ``"{:.2f}"``."""
    return form.format(row[name]) if row and row.get(name) is not None else "-"


def share(row: Row, other: Row | None, name: str) -> str:
    """A figure as a share of another row's."""
    return f"{row[name] / other[name]:.2f} x" if other and name in row and other.get(name) else "-"


def milliseconds(row: Row) -> str:
    """The median, and the range from the 20th to the 80th percentile."""
    form = "{:.0f}" if row["median_ms"] >= 100 else "{:.3g}"
    spread = f" ({form.format(row['p20_ms'])}-{form.format(row['p80_ms'])})" if "p20_ms" in row else ""
    return form.format(row["median_ms"]) + spread


OTHERS = {"float32": "float32", "channels_last": "eager", "compiled": "compile"}  # column: implementation
POWER = {"J/image": ("joules_per_image", "{:.3g}"), "W": ("watts", "{:.0f}"), "MHz": ("sm_clock_mhz", "{:.0f}")}


def with_power(header: list[str], lines: list[list[str]], rows: list[Row]) -> list[str]:
    """The table, with columns for energy, power and clock where a row has them."""
    if any("watts" in row for row in rows):
        header = [*header, *POWER]
        lines = [line + [figure(row, *how) for how in POWER.values()] for line, row in zip(lines, rows, strict=True)]
    return table(header, lines)


def speed_table(title: str, rows: list[Row], shares: dict[str, tuple[str, str]]) -> list[str]:
    """A line for each ``ours``: its time, how much faster it is than each other, its shares of what the machine can do,
    and memory (``column: (figure, implementation)``) as a share of theirs."""
    found = [group for group in by_group(rows).values() if "ours" in group]
    lines = []
    for group in found:
        ours = group["ours"]
        line = [ours["group"], milliseconds(ours), figure(ours, "images_per_s", "{:.2f}")]
        line += [figure(ours, f"speed_up_over_{name}", "{:.2f} x") for name in OTHERS.values()]
        line += [figure(ours, "tflop_per_s", "{:.3g}"), figure(ours, "share_of_floor", "{:.0%}")]
        lines.append(line + [share(ours, group.get(other), name) for name, other in shares.values()])
    header = [title, "ms", "images/s", *OTHERS, "TFLOP/s", "of the floor", *shares]
    return with_power(header, lines, [group["ours"] for group in found])


def training_table(rows: list[Row]) -> list[str]:
    shares = {
        "peak memory": ("peak_memory_bytes", "eager"),
        "held for backward": ("held_after_forward_bytes", "eager"),
    }
    return speed_table("training step", rows, shares)


def inference_table(rows: list[Row]) -> list[str]:
    return speed_table("inference", rows, {"peak memory": ("peak_memory_bytes", "float32")})


def operator_table(rows: list[Row]) -> list[str]:
    """Those that are slower than ``torch.compile`` of their definition come first, and are marked."""
    ours = [found["ours"] for found in by_group(rows).values() if "ours" in found]
    lines = []
    for row in sorted(ours, key=lambda row: -row.get("ratio_to_compile", 0)):
        ratios = [f"{1 / row[name]:.2f} x" if name in row else "-" for name in ("ratio_to_eager", "ratio_to_compile")]
        name = f"**slower than compiled:** {row['group']}" if row.get("ratio_to_compile", 0) > 1 else row["group"]
        shares = [figure(row, "gb_per_s", "{:.1f}"), figure(row, "share_of_copy", "{:.0%}")]
        lines.append([name, milliseconds(row), *ratios, *shares, figure(row, "tflop_per_s", "{:.2g}")])
    return table(["operator", "ms", "eager", "compiled", "GB/s", "of a copy", "TFLOP/s"], lines)


def waterfall_table(rows: list[Row]) -> list[str]:
    """A technique a row, each added to those above it."""
    lines = [
        [
            row["implementation"],
            milliseconds(row),
            figure(row, "images_per_s", "{:.2f}"),
            figure(row, "speed_up", "{:.2f} x"),
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            figure(row, "difference", "{:.0e}"),
        ]
        for row in rows
    ]
    header = [rows[0]["group"], "ms", "images/s", "speed-up", "peak MB", "difference"]
    return with_power(header, lines, rows)


def scaling_table(rows: list[Row]) -> list[str]:
    """The exponents alone; the points are in the file and in the picture."""
    found = [row for row in rows if row["implementation"] == "exponent"]
    lines = [
        [f"{row['group'].split(',')[0]}, {row['of']}", f"{row['time_exponent']:.2f}", f"{row['memory_exponent']:.2f}"]
        for row in found
    ]
    return table(["grows with", "time to the power of", "memory to the power of"], lines)


DIRECTIONS = ("forward", "input gradient", "weight gradient")


def convolution_table(rows: list[Row]) -> list[str]:
    """A layer a line: its share of the measured matrix product in each direction, and how much faster ours is; then
    what was compared beside the layers."""
    layers: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "layer" in row:
            layers.setdefault(row["layer"], {})[row["direction"]] = row

    def cell(row: Row | None) -> str:
        return figure(row, "share_of_product", "{:.0%}") + figure(row, "ours_speed_up", ", ours {:.2f} x").lstrip("-")

    lines = [
        [name, figure(found.get("forward"), "tflop_per_s", "{:.3g}"), *(cell(found.get(d)) for d in DIRECTIONS)]
        for name, found in layers.items()
    ]
    others = [
        [
            row["group"],
            milliseconds(row),
            figure(row, "tflop_per_s", "{:.3g}"),
            figure(row, "speed_up", "{:.2f} x"),
        ]
        for row in rows
        if "layer" not in row
    ]
    return [
        *table(["convolution, of a matrix product", "TFLOP/s forward", *DIRECTIONS], lines),
        "",
        *table(["beside them", "ms", "TFLOP/s", "as fast as apart"], others),
    ]


def learning_table(rows: list[Row]) -> list[str]:
    """Two runs from the same weights, over the same images: what they learnt, and in which time."""
    lines = []
    for group in by_group(rows).values():
        ours = group.get("ours")
        for name, row in group.items():
            numbers = [f"{row[key]:.3f}" for key in ("mean_iou", "mean_iou_five_scales", "best_mean_iou")]
            speed = [f"{row['seconds']:.0f}", f"{row['images_per_s']:.1f}"]
            faster = f"{ours['images_per_s'] / row['images_per_s']:.2f} x" if ours and name != "ours" else "-"
            lines.append([f"{row['group']}, {name}", *numbers, *speed, faster])
    header = ["learnt", "val mIoU", "five scales, flip", "best", "s of training", "images/s", "ours is faster"]
    return table(header, lines)


def startup_table(rows: list[Row]) -> list[str]:
    return table(["before the first result", "s"], [[row["what"], figure(row, "seconds", "{:.2f}")] for row in rows])


def data_table(rows: list[Row]) -> list[str]:
    lines = [
        [row["group"], f"{1e3 * row['median_s']:.2f}", figure(row, "images_per_s", "{:.1f}")]
        for row in sorted(rows, key=lambda row: "images_per_s" not in row)
    ]
    return table(["input", "ms", "images/s a worker"], lines)


PICTURES = {
    "waterfall.png": "Bars: how many times faster than eager float32 each technique makes training and inference",
    "roofline.png": "Points: operations a second over operations a byte, below the roofs that were measured",
    "learning.png": "Lines: mIoU of validation over epochs and over minutes of training, the plain network and ours",
    "scaling.png": "Lines: milliseconds of a batch over the pixels of an image",
}
TABLES = {
    "waterfall_training": waterfall_table,
    "waterfall_inference": waterfall_table,
    "learning": learning_table,
    "test_training_step": training_table,
    "test_inference": inference_table,
    "test_operators": operator_table,
    "test_convolutions": convolution_table,
    "test_data": data_table,
    "test_startup": startup_table,
    "scaling_inference": scaling_table,
    "scaling_training": scaling_table,
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
