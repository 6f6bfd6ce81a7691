"""Sliding windows for large images: the network sees tiles, and the result is assembled one band of rows at a time.

Let ``z(tile)`` be the stride-4 scores of a tile, resized to the tile. A pixel of the scaled image gets the mean of
``z`` over the tiles that hold it, weighted by its place in the tile. Only the small scores of the rows of tiles that a
band touches are kept, so memory grows only with the image's width.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_fast.network.losses import at_least_float32

WEIGHTS = ("count", "gaussian")
SIGMA = 1 / 8  # of a Gaussian weight, in windows
Network = Callable[[Tensor], Tensor]  # normalised images [B, 3, h, w] -> stride-4 scores [B, K, h / 4, w / 4]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start along a side: every ``ceil((1 - overlap) * window)`` pixels, the last one flush."""
    stride = max(math.ceil((1 - overlap) * window - 1e-6), 1)  # 1 - 1/3 is a little more than 2/3 in floating point
    count = math.ceil(max(length - window, 0) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def _side_weight(length: int, kind: str, like: Tensor) -> Tensor:
    """The weight of each pixel along one side of a window, ``[length]``: 1, or a Gaussian around the middle."""
    if kind == "count":
        return like.new_ones(length)
    middle = (length - 1) / 2
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.exp(-0.5 * ((position - middle) / (SIGMA * length)) ** 2)


def taps(
    begin: int, end: int, length: int, small: int, align_corners: bool, like: Tensor
) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """Where rows ``begin .. end - 1`` of ``length`` lie among ``small`` rows: the first small row that they need and
    the one past the last, then for each row the upper and lower one, counted from the first, and the lower's share."""
    row = torch.arange(begin, end, device=like.device)
    if align_corners:  # row * (small - 1) / (length - 1), exactly
        position, unit = row * (small - 1), max(length - 1, 1)
        first, last = (r * (small - 1) // unit for r in (begin, end - 1))
    else:  # half pixels
        position, unit = ((2 * row + 1) * small - length).clamp(min=0), 2 * length
        first, last = (max((2 * r + 1) * small - length, 0) // unit for r in (begin, end - 1))
    upper = position // unit
    share = (position - upper * unit).to(like.dtype) / unit
    stop = min(last + 1, small - 1) + 1
    return first, stop, upper - first, (upper + 1).clamp(max=small - 1) - first, share


def resized_rows(
    rows: Callable[[int, int], Tensor],
    small: tuple[int, int],
    begin: int,
    end: int,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    like: Tensor,
) -> Tensor:
    """Rows ``begin .. end - 1`` of a map of ``small`` (h, w) resized to ``size`` (H, W), ``[F, K, end - begin, W]``.

    ``rows(a, b)`` gives rows ``a .. b - 1`` of the small map, ``[F, K, b - a, w]``; it is called only for those needed.
    """
    if small == size:
        return rows(begin, end)
    first, stop, upper, lower, share = taps(begin, end, size[0], small[0], align_corners, like)
    x = rows(first, stop)
    if small[0] != size[0]:
        x = torch.lerp(x[:, :, upper], x[:, :, lower], share[:, None])
    if small[1] == size[1]:
        return x
    return F.interpolate(x, size=(x.shape[2], size[1]), mode="bilinear", align_corners=align_corners)


class WholeScores:
    """Scores ``[F, K, h, w]`` of a scaled image that the network saw as a whole."""

    align_corners = True

    def __init__(self, scores: Tensor):
        self.like = self.scores = at_least_float32(scores)
        self.size = (scores.shape[2], scores.shape[3])

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin .. end - 1``, ``[F, K, rows, w]``."""
        return self.scores[:, :, begin:end]


class WindowScores:
    """Scores of a scaled image ``[1, 3, h, w]`` that the network sees in windows, row by row of tiles.

    Args:
        network: scores several tiles at once.
        window: (height, width) of a tile, at most those of the image.
        overlap: the least share of a tile that the next one covers too.
        flip: also scores the mirror image of each tile, mirrored back: F is 2, else 1.
        batch: tiles in one run of the network.
        weight: ``"count"`` or ``"gaussian"``.
        product: for each tile the product over F of its softmax, summed over tiles and not divided; F is then 1.

    Call :meth:`rows` from the top to the bottom, because tiles above are dropped.
    """

    def __init__(
        self,
        network: Network,
        image: Tensor,
        window: tuple[int, int],
        overlap: float,
        *,
        flip: bool,
        batch: int,
        weight: str = "count",
        product: bool = False,
    ):
        self.network, self.image, self.window, self.batch = network, image, window, batch
        self.flip, self.product, self.align_corners = flip, product, not product
        self.size = (image.shape[2], image.shape[3])
        self.tops, self.lefts = (window_starts(n, side, overlap) for n, side in zip(self.size, window, strict=True))
        self.like = at_least_float32(image.new_empty(0))
        self.row_weight, self.column_weight = (_side_weight(side, weight, self.like) for side in window)
        self.row_total, self.column_total = (
            _total(n, starts, w)
            for n, starts, w in zip(
                self.size, (self.tops, self.lefts), (self.row_weight, self.column_weight), strict=True
            )
        )
        self.kept: dict[int, Tensor] = {}  # by row of tiles: small scores [tiles, F, K, h, w]

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin .. end - 1`` of the scaled image, ``[F, K, rows, w]``."""
        height = self.window[0]
        self.kept = {i: scores for i, scores in self.kept.items() if self.tops[i] + height > begin}
        total: Tensor | None = None
        for i, top in enumerate(self.tops):
            inside = slice(max(begin - top, 0), min(end - top, height))
            if inside.start >= inside.stop:
                continue
            if i not in self.kept:
                self.kept[i] = self._row_of_tiles(top)
            place = slice(inside.start + top - begin, inside.stop + top - begin)
            for left, small in zip(self.lefts, self.kept[i], strict=True):
                values = self._tile_rows(small, inside)
                if total is None:
                    total = values.new_zeros(*values.shape[:2], end - begin, self.size[1])
                total[:, :, place, left : left + self.window[1]] += values
        assert total is not None
        if not self.product:
            total /= self.row_total[begin:end, None] * self.column_total
        return total

    def _row_of_tiles(self, top: int) -> Tensor:
        """The small scores ``[tiles, F, K, h, w]`` of all tiles that start at row ``top``."""
        height, width = self.window
        found = []
        for group in range(0, len(self.lefts), self.batch):
            lefts = self.lefts[group : group + self.batch]
            tiles = torch.cat([self.image[:, :, top : top + height, left : left + width] for left in lefts])
            scores = self.network(torch.cat([tiles, tiles.flip(3)]) if self.flip else tiles)
            scores = at_least_float32(scores).unflatten(0, (-1, len(tiles))).transpose(0, 1)  # [tiles, F, K, h, w]
            found.append(torch.stack([scores[:, 0], scores[:, 1].flip(-1)], 1) if self.flip else scores)
        return torch.cat(found)

    def _tile_rows(self, small: Tensor, inside: slice) -> Tensor:
        """Rows of one tile at its full size, weighted, ``[F or 1, K, rows, width]``, from ``[F, K, h, w]``."""
        scores = resized_rows(
            lambda a, b: small[:, :, a:b],
            (small.shape[2], small.shape[3]),
            inside.start,
            inside.stop,
            self.window,
            like=small,
        )
        if self.product:
            return F.log_softmax(scores, dim=1).sum(0, keepdim=True).exp()
        return scores * (self.row_weight[inside, None] * self.column_weight)


class Cropped:
    """A padded image's scores, cropped to the image."""

    def __init__(self, source: WindowScores, inside: tuple):
        self.source, self.align_corners, self.like = source, source.align_corners, source.like
        _, self.vertical, self.horizontal = inside
        self.size = (self.vertical.stop - self.vertical.start, self.horizontal.stop - self.horizontal.start)

    def rows(self, begin: int, end: int) -> Tensor:
        first = self.vertical.start
        return self.source.rows(begin + first, end + first)[..., self.horizontal]


def _total(length: int, starts: Iterable[int], weight: Tensor) -> Tensor:
    """The sum of the windows' weights at each pixel along a side, ``[length]``."""
    total = weight.new_zeros(length)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total
