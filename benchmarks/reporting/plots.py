"""The pictures beside the tables: what each technique gives, and speed against image size, from result rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

Rows = list[dict[str, Any]]
OURS, THEIRS, ASIDE = "#1f6f8b", "#b0b7bd", "#e0a458"
PLAIN = ("ReferenceDFN, eager float32", "channels_last", "bf16 autocast", "fp16 autocast", "bf16", "fp16")
KINDS = {  # of measurements in the roofline: words, colour, marker
    "test_operators": ("operators", ASIDE, "o"),
    "test_convolutions": ("convolutions of the library", THEIRS, "s"),
    "test_training_step": ("training steps", "#a23b72", "^"),
    "test_inference": ("inference", OURS, "D"),
}
SETTINGS = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120}


def draw(suites: dict[str, Rows], folder: Path, machine: dict[str, Any]) -> list[Path]:
    """Writes the pictures that the suites allow into ``folder``; returns their files. ``machine`` has the roofs."""
    written = []
    with plt.rc_context(SETTINGS):
        waterfalls = [rows for name in ("waterfall_training", "waterfall_inference") if (rows := suites.get(name))]
        if waterfalls:
            height = 0.34 * max(len(rows) for rows in waterfalls) + 0.9
            figure, axes = plt.subplots(1, len(waterfalls), figsize=(5.6 * len(waterfalls), height), squeeze=False)
            for axis, rows, kind in zip(axes[0], waterfalls, ("training step", "inference"), strict=False):
                waterfall(axis, rows, kind)
            written.append(_save(figure, folder / "waterfall.png"))
        if rows := suites.get("learning"):
            figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4))
            learning(axes, rows)
            written.append(_save(figure, folder / "learning.png"))
        scaling = {kind: rows for kind in ("inference", "training") if (rows := suites.get(f"scaling_{kind}"))}
        if scaling:
            figure, axis = plt.subplots(figsize=(5.6, 3.2))
            against_size(axis, scaling)
            written.append(_save(figure, folder / "scaling.png"))
        measured = {name: rows for name in KINDS if (rows := [r for r in suites.get(name, []) if "flops" in r])}
        if measured and "copy_gb_per_s" in machine:
            figure, axis = plt.subplots(figsize=(7.2, 4.2))
            below_the_roof(axis, measured, machine)
            written.append(_save(figure, folder / "roofline.png"))
    return written


def waterfall(axis: Axes, rows: Rows, kind: str) -> None:
    """One bar for each technique, from the plain network at the top; torch.compile stands apart in its own colour."""
    names = [row["implementation"] for row in rows]
    colours = [ASIDE if name.startswith("(") else THEIRS if name in PLAIN else OURS for name in names]
    values = [row["speed_up"] for row in rows]
    bars = axis.barh(range(len(rows)), values, color=colours, height=0.72)
    axis.bar_label(bars, [_times(value) for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, (1.3 if min(values) < 0.995 else 1.18) * max(values))
    axis.set_xlabel(f"times as fast as {names[0]}")
    axis.set_title(f"{kind}, {rows[0]['group']}", fontsize=10)


def _times(value: float) -> str:
    return f"{value:.2f} x" + (", slower" if round(value, 2) < 1 else "")


def learning(axes: Sequence[Axes], rows: Rows) -> None:
    """mIoU of validation over epochs, where the same numbers are the same curve, and over minutes of training."""
    styles = ("-", "--", ":", "-.")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for row in rows:
        epochs, seconds, mean_iou = zip(*row["curve"], strict=True)
        colour = OURS if row["implementation"] == "ours" else ASIDE
        style = styles[groups.index(row["group"]) % len(styles)]
        for axis, x in zip(axes, (epochs, [s / 60 for s in seconds]), strict=True):
            axis.plot(x, mean_iou, style, color=colour, label=f"{row['group']}, {row['implementation']}")
    for axis, words in zip(axes, ("epochs", "minutes of training"), strict=True):
        axis.set_xlabel(words)
        axis.set_ylabel("mIoU of validation")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)


def against_size(axis: Axes, scaling: dict[str, Rows]) -> None:
    """Milliseconds over the pixels of an image, both logarithmic, with the slope in the legend."""
    sides: list[int] = []
    for (kind, rows), colour in zip(scaling.items(), (OURS, ASIDE), strict=False):
        rows = [row for row in rows if row["group"].endswith(", side")]
        sides = [int(row["implementation"]) for row in rows if "median_ms" in row]
        points = [(side**2, row["median_ms"]) for side, row in zip(sides, rows, strict=False)]
        slope = next(row["time_exponent"] for row in rows if "time_exponent" in row)
        axis.loglog(*zip(*points, strict=True), "o-", color=colour, label=f"{kind}: pixels to the power of {slope:.2f}")
    axis.set_xticks([side**2 for side in sides], [f"{side} x {side}" for side in sides])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_xlabel("pixels of an image")
    axis.set_ylabel("ms of a batch")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def below_the_roof(axis: Axes, measured: dict[str, Rows], machine: dict[str, Any]) -> None:
    """Each row of ours (and of the library's convolutions) at its operations a byte, below what the machine can do:
    the copy's bandwidth on the left, the matrix products on the right."""
    products = {name: value for name, value in machine.items() if name.startswith("product_")}
    points = [(row["flops"] / row["bytes_moved"], row["tflop_per_s"]) for rows in measured.values() for row in rows]
    left, right = (limit(x for x, _ in points) for limit in (min, max))
    for (name, roof), style in zip(products.items(), ("-", "--", ":"), strict=False):
        edge = roof / machine["copy_gb_per_s"] * 1e3
        line = [left / 2, edge, max(right * 2, 2 * edge)]
        axis.loglog(line, [line[0] * machine["copy_gb_per_s"] / 1e3, roof, roof], style, color="#555", lw=1)
        axis.annotate(
            f"{name.split('_')[1]} product, {roof:.3g} TFLOP/s", (line[-1], roof), ha="right", va="bottom", fontsize=8
        )
    for name, rows in measured.items():
        words, colour, marker = KINDS[name]
        rows = [row for row in rows if row["implementation"] == "ours" or "layer" in row]
        x, y = ([row[k] for row in rows] for k in ("flops", "tflop_per_s"))
        x = [flops / row["bytes_moved"] for flops, row in zip(x, rows, strict=True)]
        axis.loglog(x, y, marker, color=colour, label=words, ms=5, alpha=0.75, mew=0)
    axis.set_xlabel("operations a byte")
    axis.set_ylabel("TFLOP/s")
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path
