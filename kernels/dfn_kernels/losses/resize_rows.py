"""Bilinear resizing with ``align_corners=True`` by chunks of rows, and its gradient, in plain PyTorch.

On ``[rows, C, columns]`` a resize is a matrix product along each axis, and its gradient is the same two transposed.
Almost all elements of these matrices are zeros, so they are cut into pieces along the diagonal.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 128  # pixels of a piece


class _Piece(NamedTuple):
    """Pixels of one axis, the small pixels that they come from, and the resize between them."""

    full: slice
    small: slice
    matrix: Tensor  # [full, small]


@lru_cache(maxsize=64)
def _pieces(small: int, full: int, longest: int, dtype: torch.dtype, device: torch.device) -> list[_Piece]:
    """Pieces of some 32 small pixels and at most ``longest`` pixels, with positions exact in integers."""
    pieces = []
    last = max(full - 1, 1)
    length = min(max(32 * full // small, 16), longest)
    for begin in range(0, full, length):
        end = min(begin + length, full)
        position = torch.arange(begin, end) * (small - 1)  # in units of 1 / last
        first, stop = begin * (small - 1) // last, min((end - 1) * (small - 1) // last + 2, small)
        distance = position[:, None] - torch.arange(first, stop) * last
        matrix = (last - distance.abs()).clamp(min=0).double() / last
        pieces.append(_Piece(slice(begin, end), slice(first, stop), matrix.to(device, dtype)))
    return pieces


class RowResize:
    """The resize of images ``[h, C, w]`` to ``[H, C, W]``, in chunks of at most ``rows`` whole rows."""

    def __init__(self, small: tuple[int, int], full: tuple[int, int], rows: int, like: Tensor):
        self.same = small == full
        (self.h, self.w), (self.H, self.W) = small, full
        rows = max(rows, 1)
        self.down = _pieces(self.h, self.H, min(rows, LONGEST), like.dtype, like.device)
        self.across = _pieces(self.w, self.W, LONGEST, like.dtype, like.device)
        step = rows // self.down[0].full.stop
        self.chunks = [self.down[i : i + step] for i in range(0, len(self.down), step)]

    @staticmethod
    def rows(chunk: list[_Piece]) -> slice:
        """The full-size rows of a chunk."""
        return slice(chunk[0].full.start, chunk[-1].full.stop)

    def forward(self, image: Tensor, chunk: list[_Piece]) -> Tensor:
        """A chunk's rows of the resized image, ``[rows, C, W]``."""
        here = self.rows(chunk)
        if self.same:
            return image[here].clone()
        flat = image.flatten(1)
        half = flat.new_empty(here.stop - here.start, flat.shape[1])  # [rows, C * w]
        for y in chunk:
            torch.mm(y.matrix, flat[y.small], out=half[y.full.start - here.start : y.full.stop - here.start])
        half = half.view(-1, self.w)
        resized = half.new_empty(len(half), self.W)
        for x in self.across:
            torch.mm(half[:, x.small], x.matrix.T, out=resized[:, x.full])
        return resized.view(-1, image.shape[1], self.W)

    def add_backward(self, d_image: Tensor, d_resized: Tensor, chunk: list[_Piece]) -> None:
        """Adds to ``d_image`` ``[h, C, w]`` the share of a chunk's rows."""
        here = self.rows(chunk)
        if self.same:
            d_image[here] += d_resized
            return
        d_resized = d_resized.view(-1, self.W)
        d_half = d_resized.new_zeros(len(d_resized), self.w)
        for x in self.across:
            d_half[:, x.small].addmm_(d_resized[:, x.full], x.matrix)
        flat, d_half = d_image.flatten(1), d_half.view(here.stop - here.start, -1)
        for y in chunk:
            flat[y.small].addmm_(y.matrix.T, d_half[y.full.start - here.start : y.full.stop - here.start])
