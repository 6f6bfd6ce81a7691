"""Bilinear resizing with ``align_corners=True`` by integers, for kernels.

Pixel ``j`` of ``full`` lies at ``j * (small - 1) / (full - 1)`` of ``small``: the quotient is the index, the
remainder over ``full - 1`` the weight of the next pixel. Exact at any size, and alike forward and backward.
"""

import torch
from torch import Tensor

from dfn_kernels.common.triton_or_stub import tl, triton


@triton.jit
def source(j, small, full):
    """Index, next index and the remainder (0 .. full - 2, the next one's weight times ``full - 1``) of pixel j."""
    last = tl.maximum(full - 1, 1)
    position = j * (small - 1)
    index = position // last
    return index, tl.minimum(index + 1, small - 1), position - index * last


@triton.jit
def first_target(i, small, full):
    """The first pixel of ``full`` that lies at or after pixel ``i`` of ``small``; full if none does.

    The pixels between small rows ``i`` and ``i + 1`` are ``first_target(i) ... first_target(i + 1) - 1``; the last
    row, ``small - 1``, owns the last pixel.
    """
    step = tl.maximum(small - 1, 1)
    target = (i * (full - 1) + step - 1) // step
    return tl.where(((small == 1) | (full == 1)) & (i > 0), full, tl.minimum(target, full))


def resize_matrix(small: int, full: int) -> Tensor:
    """The resize as a float64 matrix ``[full, small]``: ``resized = matrix @ x``. For definitions and tests."""
    matrix = torch.zeros(full, small, dtype=torch.float64)
    last = max(full - 1, 1)
    for j in range(full):
        index, remainder = divmod(j * (small - 1), last)
        matrix[j, index] += 1 - remainder / last
        if remainder:
            matrix[j, index + 1] += remainder / last
    return matrix


@triton.jit
def mean_weight(i, small, full, ACC: tl.constexpr):
    """The weight of pixel ``i`` of ``small`` in the mean over its ``full`` resized pixels.

    A column sum of the resize matrix in closed form: the weights of the pixels before and from ``i`` on are two
    arithmetic series of integers (over ``full - 1``), each its count times the mean of its first and last term.
    """
    last = tl.maximum(full - 1, 1)
    before = first_target(tl.maximum(i - 1, 0), small, full)
    begin = first_target(i, small, full)
    end = first_target(i + 1, small, full)
    rising = (before + begin - 1) * (small - 1) - 2 * (i - 1) * last
    falling = 2 * (i + 1) * last - (begin + end - 1) * (small - 1)
    total = (begin - before).to(ACC) * rising.to(ACC) + (end - begin).to(ACC) * falling.to(ACC)
    return total / 2 / last / full
