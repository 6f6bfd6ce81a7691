"""Winograd's minimal filtering (Lavin and Gray, CVPR 2016) of 3x3 convolutions, in plain PyTorch, for CPUs.

The output is cut into tiles of ``m`` x ``m`` pixels. A tile is ``A^T [(G w G^T) * (B^T d B)] A``, with ``d`` the
``m + 2`` x ``m + 2`` pixels of input that it sees. Summed over input channels, the elementwise product becomes one
matrix product for each of the ``(m + 2)^2`` positions. For each pixel, input channel and output channel that is 2.25
multiplications with ``m = 4`` and 4 with ``m = 2``; the definition has 9. The two-dimensional transforms are Kronecker
products here, so each is one matrix product as well.

The cost is temporary memory, ``(m + 2)^2 / m^2`` times the input and the output, bounded by processing the tiles in
groups, and some rounding: in float32 with ``m = 4`` some 2e-6 of the largest value.
"""

import functools
import math
import threading
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels.common.backend import accumulator

# Interpolation points, besides infinity. Symmetric ones around 1 round least: 2e-6, against 7e-6 for 0, 1, -1, 2, -2.
POINTS = {2: ("0", "1", "-1"), 4: ("0", "3/4", "-3/4", "3/2", "-3/2")}
WORKSPACE_BYTES = 1 << 26  # of a group of tiles, before or after a product; kept, because new pages are slow on a CPU

_workspaces = threading.local()


def _product(roots: list[Fraction]) -> list[Fraction]:
    """The coefficients of the polynomial with these roots, the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


@functools.cache
def transforms(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``B^T``, ``G`` and ``A^T`` for two dimensions: ``[(m+2)^2, (m+2)^2]``, ``[(m+2)^2, 9]``, ``[m^2, (m+2)^2]``."""
    points = [Fraction(point) for point in POINTS[m]]
    others = [[q for q in points if q != p] for p in points]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    input_rows = [[*_product(rest), Fraction(0)] for rest in others] + [_product(points)]
    weight_rows = [[p**k / s for k in range(3)] for p, s in zip(points, scales, strict=True)] + [[0, 0, 1]]
    output_rows = [[p**k for p in points] + [int(k == m - 1)] for k in range(m)]
    matrices = [torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)
                for rows in (input_rows, weight_rows, output_rows)]  # fmt: skip
    return tuple(torch.kron(x, x).to(dtype) for x in matrices)  # type: ignore[return-value]


def transform_weight(weight: Tensor, m: int, *, keep: bool = True) -> Tensor:
    """``[O, I, 3, 3]`` -> ``[(m+2)^2, O, I]`` in the same dtype, rounded once. Without ``keep`` the result may lie in a
    workspace that the next call overwrites."""
    positions, (outputs, C) = (m + 2) ** 2, weight.shape[:2]
    high = accumulator(weight.dtype)
    taps = _workspace("taps", 3, 3, outputs, C, dtype=high).copy_(weight.permute(2, 3, 0, 1)).view(9, -1)
    if keep:
        return (transforms(m, high)[1] @ taps).view(positions, outputs, C).to(weight.dtype)
    result = torch.mm(transforms(m, high)[1], taps, out=_workspace("weight", positions, outputs * C, dtype=high))
    return result.view(positions, outputs, C).to(weight.dtype)


def _workspace(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory that this thread keeps. Its next tensor of the same name overwrites it."""
    size = dtype.itemsize
    for side in shape:
        size *= side
    kept = getattr(_workspaces, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        if size <= 2 * WORKSPACE_BYTES:  # a single row of tiles may be larger than a group should be
            setattr(_workspaces, name, kept)
    return kept[:size].view(dtype).view(shape)


class _Tiles:
    """The tiles of ``[B, H, W, channels]``, in groups of whole rows of tiles, or of whole images."""

    def __init__(self, shape: torch.Size, m: int, channels: int, element_size: int):
        self.m, (B, _, H, W) = m, shape
        self.rows, self.columns = -(-H // m), -(-W // m)
        row_bytes = (m + 2) ** 2 * self.columns * channels * element_size
        fitting = max(WORKSPACE_BYTES // row_bytes, 1)
        images, rows = max(fitting // self.rows, 1), min(fitting, self.rows)
        self.groups = [
            (slice(b, min(b + images, B)), slice(r, min(r + rows, self.rows)))
            for b in range(0, B, images)
            for r in range(0, self.rows, rows)
        ]

    def pad(self, x: Tensor, before: int) -> Tensor:
        """``x`` ``[B, C, H, W]`` as ``[B, rows, columns, C]``, zero-padded to whole tiles, with ``before`` in front."""
        behind = [
            self.m * count - side + before
            for count, side in zip((self.columns, self.rows), x.shape[:1:-1], strict=True)
        ]
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, before, behind[0], before, behind[1]))
        return x.contiguous()  # F.pad returns its input if there is nothing to pad

    def read(self, padded: Tensor, group: tuple[slice, slice], side: int, name: str) -> Tensor:
        """The ``side`` x ``side`` pixels of each tile of a group: ``[side^2, tiles * C]``, in a workspace."""
        images, rows = group
        m, C = self.m, padded.shape[3]
        step = padded.stride()
        count = (images.stop - images.start, rows.stop - rows.start)
        offset = padded.storage_offset() + images.start * step[0] + rows.start * m * step[1]
        tiles = padded.as_strided(
            (side, side, *count, self.columns, C), (step[1], step[2], step[0], m * step[1], m * step[2], 1), offset
        )
        return _workspace(name, *tiles.shape, dtype=padded.dtype).copy_(tiles).view(side * side, -1)

    def write(self, tiles: Tensor, out: Tensor, group: tuple[slice, slice], bias: Tensor | None) -> None:
        """Writes a group's ``tiles`` ``[m^2, tiles * C]``, plus ``bias``, into ``out`` ``[B, C, H, W]``."""
        images, rows = group
        m, C = self.m, out.shape[1]
        count = (images.stop - images.start, rows.stop - rows.start)
        target = out.permute(0, 2, 3, 1)[images, rows.start * m : rows.stop * m]
        # [B, row of tiles, row in it, column of tiles, column in it, C]
        pixels = tiles.view(m, m, *count, self.columns, C).permute(2, 3, 0, 4, 1, 5)
        pixels = pixels.reshape(count[0], count[1] * m, self.columns * m, C)[:, : target.shape[1], : target.shape[2]]
        if bias is None:
            target.copy_(pixels)
        else:
            torch.add(pixels, bias, out=target)


def convolve(x: Tensor, transformed: Tensor, m: int, bias: Tensor | None = None) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)`` of ``x`` ``[B, I, H, W]``, with the weight of :func:`transform_weight`.

    Returns ``[B, O, H, W]``, channels_last.
    """
    B, C, H, W = x.shape
    positions, outputs, _ = transformed.shape
    forward, _, back = transforms(m, x.dtype)
    tiles = _Tiles(x.shape, m, max(C, outputs), x.element_size())
    padded = tiles.pad(x, 1)
    out = torch.empty((B, outputs, H, W), dtype=x.dtype, memory_format=torch.channels_last)
    for group in tiles.groups:
        seen = tiles.read(padded, group, m + 2, "first")
        seen = torch.mm(forward, seen, out=_workspace("second", *seen.shape, dtype=x.dtype))
        count = seen.shape[1] // C
        product = _workspace("first", positions, count, outputs, dtype=x.dtype)
        torch.bmm(seen.view(positions, count, C), transformed.transpose(1, 2), out=product)
        result = _workspace("second", m * m, count * outputs, dtype=x.dtype)
        torch.mm(back, product.view(positions, -1), out=result)
        tiles.write(result, out, group, bias)
    return out


def weight_gradient(x: Tensor, d_out: Tensor, m: int) -> Tensor:
    """The gradient of ``weight`` ``[O, I, 3, 3]`` in ``conv2d(x, weight, padding=1)``, from ``d_out``."""
    positions, C, outputs = (m + 2) ** 2, x.shape[1], d_out.shape[1]
    forward, weights, back = transforms(m, x.dtype)
    tiles = _Tiles(x.shape, m, max(C, outputs), x.element_size())
    padded, d_padded = tiles.pad(x, 1), tiles.pad(d_out, 0)
    total = _workspace("weight", positions, outputs, C, dtype=x.dtype)
    for i, group in enumerate(tiles.groups):
        seen = tiles.read(padded, group, m + 2, "first")
        seen = torch.mm(forward, seen, out=_workspace("second", *seen.shape, dtype=x.dtype))
        d_tiles = tiles.read(d_padded, group, m, "third")
        count = seen.shape[1] // C
        d_product = _workspace("first", positions, count * outputs, dtype=x.dtype)
        torch.mm(back.T, d_tiles, out=d_product)
        factors = d_product.view(positions, count, outputs).transpose(1, 2), seen.view(positions, count, C)
        torch.bmm(*factors, out=total) if i == 0 else total.baddbmm_(*factors)
    return (weights.T @ total.view(positions, -1)).view(3, 3, outputs, C).permute(2, 3, 0, 1)
