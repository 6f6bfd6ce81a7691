"""The pictures beside the tables: what each technique gives, and speed against image size, from result rows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

Rows = list[dict[str, Any]]
OURS, THEIRS, ASIDE = "#1f6f8b", "#b0b7bd", "#e0a458"
SETTINGS = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120}


def draw(suites: dict[str, Rows], folder: Path) -> list[Path]:
    """Writes the pictures that the suites allow into ``folder``; returns their files."""
    written = []
    with plt.rc_context(SETTINGS):
        waterfalls = [rows for name in ("waterfall_training", "waterfall_inference") if (rows := suites.get(name))]
        if waterfalls:
            height = 0.34 * max(len(rows) for rows in waterfalls) + 0.9
            figure, axes = plt.subplots(1, len(waterfalls), figsize=(5.6 * len(waterfalls), height), squeeze=False)
            for axis, rows, kind in zip(axes[0], waterfalls, ("training step", "inference"), strict=False):
                waterfall(axis, rows, kind)
            written.append(_save(figure, folder / "waterfall.png"))
        scaling = {kind: rows for kind in ("inference", "training") if (rows := suites.get(f"scaling_{kind}"))}
        if scaling:
            figure, axis = plt.subplots(figsize=(5.6, 3.2))
            against_size(axis, scaling)
            written.append(_save(figure, folder / "scaling.png"))
    return written


def waterfall(axis: Axes, rows: Rows, kind: str) -> None:
    """A bar a technique, from the plain network at the top; torch.compile, which stands aside, in its own colour."""
    names = [row["implementation"] for row in rows]
    colours = [THEIRS if i < 3 else OURS for i in range(len(rows))]
    colours = [ASIDE if name.startswith("(") else colour for name, colour in zip(names, colours, strict=True)]
    values = [row["speed_up"] for row in rows]
    bars = axis.barh(range(len(rows)), values, color=colours, height=0.72)
    axis.bar_label(bars, [f"{value:.2f} x" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(values))
    axis.set_xlabel("times as fast as eager float32")
    axis.set_title(f"{kind}, {rows[0]['group']}", fontsize=10)


def against_size(axis: Axes, scaling: dict[str, Rows]) -> None:
    """Milliseconds over the pixels of an image, both logarithmic, with the slope in the legend."""
    sides: list[int] = []
    for (kind, rows), colour in zip(scaling.items(), (OURS, ASIDE), strict=False):
        rows = [row for row in rows if row["group"].endswith(", side")]
        sides = [int(row["implementation"]) for row in rows if "ms" in row]
        points = [(side**2, row["ms"]) for side, row in zip(sides, rows, strict=False)]
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


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path
