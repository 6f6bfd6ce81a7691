"""Label maps as pictures: in colour, over the image, with a legend.

Matplotlib is imported where it is used, and only its Agg canvas: no display, no global state.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfn_fast.media.images import IGNORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
LEGEND_ROWS = 12


def colorize(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Class ids ``[H, W]`` uint8 -> RGB ``[H, W, 3]`` uint8; 255 is white, a value without a colour black."""
    table = np.zeros((256, 3), np.uint8)
    table[IGNORE] = 255
    table[: len(palette)] = palette
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, palette: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """The image with its classes' colours over it, ``[H, W, 3]`` uint8.

    ``alpha`` goes from 0 (only the image) to 1 (only the colours). Pixels labelled 255 show the image.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected 0..1")
    mixed = np.rint((1 - alpha) * image.astype(np.float32) + alpha * colorize(label, palette)).astype(np.uint8)
    return np.where((label == IGNORE)[:, :, None], image, mixed)


def legend(classes: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """A picture of the classes' colours and names, ``[H, W, 3]`` uint8."""
    from matplotlib.figure import Figure

    columns = math.ceil(len(classes) / LEGEND_ROWS)
    figure = Figure(figsize=(columns * entry_width(classes), min(len(classes), LEGEND_ROWS) * 0.26 + 0.4), dpi=DPI)
    draw_legend(figure, classes, palette, columns, loc="center")
    picture = pixels(figure)
    drawn = (picture != 255).any(axis=2)
    margin = 20
    (top, bottom), (left, right) = (np.flatnonzero(drawn.any(axis=axis))[[0, -1]] for axis in (1, 0))
    return np.pad(
        picture[top : bottom + 1, left : right + 1], ((margin, margin), (margin, margin), (0, 0)), constant_values=255
    )


def entry_width(names: Sequence[str]) -> float:
    """The largest width of a legend's column, in inches."""
    return 0.6 + 0.085 * max(map(len, names), default=0)


def draw_legend(figure: "Figure", classes: Sequence[str], palette: np.ndarray, columns: int, loc: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=tuple(colour / 255), edgecolor="black", linewidth=0.4) for colour in palette]
    drawn = figure.legend(
        handles,
        ["x"] * len(handles),
        ncols=columns,
        loc=loc,
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        handleheight=1,
    )
    # Set afterwards: a label like "_background_" would be left out, and "$" would begin a formula.
    for text, name in zip(drawn.get_texts(), classes, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def pixels(figure: "Figure") -> np.ndarray:
    """The figure as RGB ``[H, W, 3]`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]
