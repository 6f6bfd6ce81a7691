"""The rows of result files as Markdown tables, one function for each suite."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
OTHERS = {"float32": "float32", "channels_last": "eager", "compiled": "compile"}  # column: implementation
POWER = {"J/image": ("joules_per_image", "{:.3g}"), "W": ("watts", "{:.0f}"), "MHz": ("sm_clock_mhz", "{:.0f}")}
DIRECTIONS = ("forward", "input gradient", "weight gradient")


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


def speed_up(value: float | None) -> str:
    """How many times faster ours is; says so if ours is slower."""
    if value is None:
        return "-"
    return f"**{value:.2f} x, slower**" if round(value, 2) < 1 else f"{value:.2f} x"


def share(row: Row, other: Row | None, name: str) -> str:
    """A figure, such as memory, as a share of another row's; says so if ours is more."""
    if not other or row.get(name) is None or not other.get(name):
        return "-"
    value = row[name] / other[name]
    return f"**{value:.2f} x, more**" if round(value, 2) > 1 else f"{value:.2f} x"


def milliseconds(row: Row) -> str:
    """The median, and the range from the 20th to the 80th percentile."""
    form = "{:.0f}" if row["median_ms"] >= 100 else "{:.3g}"
    spread = f" ({form.format(row['p20_ms'])}-{form.format(row['p80_ms'])})" if "p20_ms" in row else ""
    return form.format(row["median_ms"]) + spread


def with_power(header: list[str], lines: list[list[str]], rows: list[Row]) -> list[str]:
    """The table, with columns for energy, power and clock if a row has them."""
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
        line += [speed_up(ours.get(f"speed_up_over_{name}")) for name in OTHERS.values()]
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
    """The operators. Those slower than ``torch.compile`` of their definition come first, and are marked."""
    ours = [found["ours"] for found in by_group(rows).values() if "ours" in found]
    lines = []
    for row in sorted(ours, key=lambda row: -row.get("ratio_to_compile", 0)):
        ratios = [speed_up(1 / row[name] if name in row else None) for name in ("ratio_to_eager", "ratio_to_compile")]
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
            speed_up(row.get("speed_up")),
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            figure(row, "difference", "{:.0e}"),
        ]
        for row in rows
    ]
    header = [rows[0]["group"], "ms", "images/s", "speed-up", "peak MB", "difference"]
    return with_power(header, lines, rows)


def scaling_table(rows: list[Row]) -> list[str]:
    """Only the exponents; the points are in the file and in the picture."""
    found = [row for row in rows if row["implementation"] == "exponent"]
    lines = [
        [f"{row['group'].split(',')[0]}, {row['of']}", f"{row['time_exponent']:.2f}", f"{row['memory_exponent']:.2f}"]
        for row in found
    ]
    return table(["grows with", "time to the power of", "memory to the power of"], lines)


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
    """Two runs from the same weights, over the same images: what they learnt, and in how much time."""
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
