"""The pictures of a training run: curves.png and predictions.png."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfn_fast.media.images import IGNORE, write_image
from dfn_fast.media.overlays import DPI, colorize, draw_legend, entry_width, pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#1f5fa8", "#d9731a", "#8a8a8a"
Row = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]  # image, truth, prediction, border


def prediction_sheet(rows: Sequence[Row], classes: Sequence[str], palette: np.ndarray, path: str | Path) -> None:
    """Writes a picture with a row for each (image, truth, prediction, border), and a legend of the classes in them.

    Images are RGB uint8, truth and prediction ``[H, W]`` class ids (255: ignored, white), border ``[H, W]``
    probabilities. All but the image may be None; a column with nothing else is left out.
    """
    from matplotlib.figure import Figure

    titles = ("image", "truth", "prediction", "border")
    shown = [i for i in range(4) if any(row[i] is not None for row in rows)]
    names, colours = _seen_classes(rows, classes, palette)

    # In inches, from the bottom: legend, rows, titles. Every gap is the same.
    cell, gap, above = 2.6, 0.06, 0.28
    heights = [cell * row[0].shape[0] / row[0].shape[1] for row in rows]
    width = len(shown) * (cell + gap) + gap
    columns = max(int(width / entry_width(names)), 1)
    below = 0.22 * math.ceil(len(names) / columns) + 0.2
    height = below + sum(heights) + gap * (len(rows) - 1) + above
    figure = Figure(figsize=(width, height), dpi=DPI)
    top = height - above
    for row, row_height in zip(rows, heights, strict=True):
        for x, i in enumerate(shown):
            left = gap + x * (cell + gap)
            axes = figure.add_axes((left / width, (top - row_height) / height, cell / width, row_height / height))
            axes.set_axis_off()
            _draw_cell(axes, row[i], titles[i], palette)
            if row is rows[0]:
                axes.set_title(titles[i], fontsize=10, pad=4)
        top -= row_height + gap
    draw_legend(figure, names, colours, columns, loc="lower center")
    write_image(path, pixels(figure))


def _seen_classes(rows: Sequence[Row], classes: Sequence[str], palette: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes in the rows' truths and predictions, and of "ignored" if 255 occurs."""
    seen = {int(value) for row in rows for labels in row[1:3] if labels is not None for value in np.unique(labels)}
    ids = sorted(seen - {IGNORE})
    names, colours = [classes[i] for i in ids], palette[ids]
    if IGNORE in seen:
        names, colours = [*names, "ignored"], np.concatenate([colours, [[255, 255, 255]]])
    return names, colours


def _draw_cell(axes: "Axes", values: np.ndarray | None, title: str, palette: np.ndarray) -> None:
    if values is None:
        return
    if title == "border":
        axes.imshow(np.asarray(values), cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    elif title == "image":
        axes.imshow(values, interpolation="antialiased")
    else:
        axes.imshow(colorize(np.asarray(values), palette), interpolation="nearest")


def plot_curves(metrics: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Writes the curves of a run: loss and learning rate by iteration, validation mIoU by epoch.

    ``metrics`` are records with ``iteration`` or ``epoch``, and any of ``loss``, ``lr`` and ``mean_iou``. Values that
    are missing, None or nan are left out. The loss is drawn twice: raw, in a pale line, and as a running mean.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.2), dpi=DPI, layout="constrained")
    loss_axes, lr_axes, iou_axes = figure.subplots(1, 3)
    iterations, losses = series(metrics, "iteration", "loss")
    loss_axes.plot(iterations, losses, color=BLUE, alpha=0.3, linewidth=0.8)
    loss_axes.plot(iterations, running_mean(losses), color=BLUE, linewidth=1.6)
    _decorate(loss_axes, "training loss", "iteration", losses)

    iterations, rates = series(metrics, "iteration", "lr")
    lr_axes.plot(iterations, rates, color=GREY, linewidth=1.6)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    lr_axes.yaxis.get_offset_text().set_fontsize(8)
    _decorate(lr_axes, "learning rate", "iteration", rates)

    epochs, ious = series(metrics, "epoch", "mean_iou")
    iou_axes.plot(epochs, ious, color=ORANGE, linewidth=1.6, marker="o", markersize=3)
    title = "validation mIoU"
    if ious.size:
        best = int(np.argmax(ious))
        iou_axes.axhline(ious[best], color=ORANGE, linewidth=0.8, linestyle=":")
        title += f": best {ious[best]:.4f}, epoch {epochs[best]:g}"
    _decorate(iou_axes, title, "epoch", ious)
    iou_axes.set_ylim(0, 1)
    write_image(path, pixels(figure))


def series(metrics: Sequence[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two fields as float64, from the records that have both; a record whose ``y`` is not finite is left out."""
    pairs = [(r[x], r[y]) for r in metrics if r.get(x) is not None and r.get(y) is not None]
    xs, ys = np.array(pairs, np.float64).reshape(-1, 2).T
    known = np.isfinite(ys)
    return xs[known], ys[known]


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean around each value over a twentieth of all, at least three; the window is cut at the ends."""
    half = max(len(values) // 40, 1)
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _decorate(axes: "Axes", title: str, xlabel: str, values: np.ndarray) -> None:
    """Title, labels and grid; the y axis starts at 0, and an axis without values says so."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if values.size:
        axes.set_ylim(min(0, values.min()), 1.05 * max(values.max(), 1e-12))
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", fontsize=9, color=GREY)
