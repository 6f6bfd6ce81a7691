"""Triton kernels of upsample_add, which are also the last pass of channel_attention, forward and backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.common.backend import accumulator
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.resize import first_target, mean_weight, source
from dfn_kernels.common.triton_or_stub import tl, triton

SIZES = ["height", "width", "small_height", "small_width"]


@triton.jit(do_not_specialize=SIZES)
def _upsample_add_fwd_kernel(
    low_ptr,
    high_ptr,
    gate_ptr,
    out_ptr,
    height,
    width,
    small_height,
    small_width,
    groups,
    GATED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of ``ROWS x COLUMNS`` pixels; ``VECTOR * groups`` channels, so that the compiler sees the alignment."""
    channels = groups * VECTOR
    blocks = tl.cdiv(channels, CHANNELS)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    # Last image first: the pooling pass of channel_attention has just left it in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    col = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    tile = program // blocks
    pixel = tl.arange(0, ROWS * COLUMNS)
    x = tile % across * COLUMNS + pixel % COLUMNS
    y = tile // across % down * ROWS + pixel // COLUMNS
    image = (tile // (across * down)).to(tl.int64)
    mask = ((y < height) & (x < width))[:, None] & (col < channels)[None, :]

    top, bottom, dy = source(y, small_height, height)
    left, right, dx = source(x, small_width, width)
    dy = (dy.to(ACC) / tl.maximum(height - 1, 1))[:, None]
    dx = (dx.to(ACC) / tl.maximum(width - 1, 1))[:, None]
    top, bottom = (image * small_height + top) * small_width, (image * small_height + bottom) * small_width
    top_left = tl.load(high_ptr + (top + left)[:, None] * channels + col[None, :], mask=mask).to(ACC)
    top_right = tl.load(high_ptr + (top + right)[:, None] * channels + col[None, :], mask=mask).to(ACC)
    bottom_left = tl.load(high_ptr + (bottom + left)[:, None] * channels + col[None, :], mask=mask).to(ACC)
    bottom_right = tl.load(high_ptr + (bottom + right)[:, None] * channels + col[None, :], mask=mask).to(ACC)
    offsets = ((image * height + y) * width + x)[:, None] * channels + col[None, :]
    low = tl.load(low_ptr + offsets, mask=mask).to(ACC)
    if GATED:
        low *= tl.load(gate_ptr + image * channels + col, mask=col < channels)[None, :]
    upper = (1 - dx) * top_left + dx * top_right
    lower = (1 - dx) * bottom_left + dx * bottom_right
    tl.store(out_ptr + offsets, low + (1 - dy) * upper + dy * lower, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _upsample_add_bwd_kernel(
    d_out_ptr,
    gate_ptr,
    d_mean_ptr,
    d_low_ptr,
    d_high_ptr,
    height,
    width,
    small_height,
    small_width,
    groups,
    run,
    GATED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``COLUMNS`` small columns, ``run`` small rows; between two small rows ``ROWS`` full-size rows at a time."""
    channels = groups * VECTOR
    blocks = tl.cdiv(channels, CHANNELS)
    across, down = tl.cdiv(small_width, COLUMNS), tl.cdiv(small_height, run)
    col = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = (col < channels)[None, :]
    tile = tl.program_id(0) // blocks
    first_column, first_row = tile % across * COLUMNS, tile // across % down * run
    image = (tile // (across * down)).to(tl.int64)

    pixel = tl.arange(0, ROWS * COLUMNS)
    j = first_column + pixel % COLUMNS
    # Full-size columns before ... begin - 1 lie between small columns j - 1 and j, begin ... end - 1 up to j + 1.
    before = first_target(tl.maximum(j - 1, 0), small_width, width)
    begin, end = first_target(j, small_width, width), first_target(j + 1, small_width, width)
    columns = tl.max(tl.maximum(begin - before, end - begin), axis=0)
    last_x, last_y = tl.maximum(width - 1, 1), tl.maximum(height - 1, 1)

    own = first_column + tl.arange(0, COLUMNS)
    if GATED:
        gate = tl.load(gate_ptr + image * channels + col, mask=col < channels)[None, :]
        d_mean_ptr += image * 2 * channels
        d_mean_low = tl.load(d_mean_ptr + col, mask=col < channels)[None, :] / height / width
        share = mean_weight(own, small_width, width, ACC)[:, None]

    here = tl.zeros([ROWS * COLUMNS, CHANNELS], ACC)  # of small row i, by full-size row modulo ROWS
    for step in range(run + 1):
        i = first_row - 1 + step
        below = tl.zeros([ROWS * COLUMNS, CHANNELS], ACC)  # of small row i + 1
        stop = first_target(i + 1, small_height, height)
        owned = tl.where(i >= first_row, stop, 0)  # d_low of the rows above the run belongs to another program
        for start in range(first_target(tl.maximum(i, 0), small_height, height), stop, ROWS):
            y = start + pixel // COLUMNS
            chunk = (image * height + start) * width * channels
            resized = tl.zeros([ROWS * COLUMNS, CHANNELS], ACC)
            for k in range(columns):
                x = before + k
                mask = ((y < stop) & (x < begin))[:, None] & in_channels
                offsets = (pixel // COLUMNS * width + x)[:, None] * channels + col[None, :]
                left = tl.load(d_out_ptr + chunk + offsets, mask=mask, other=0.0).to(ACC)
                rising = (x * (small_width - 1) - (j - 1) * last_x).to(ACC) / last_x
                x = begin + k
                columns_here = (x < end)[:, None] & in_channels
                mask = (y < stop)[:, None] & columns_here
                offsets = (pixel // COLUMNS * width + x)[:, None] * channels + col[None, :]
                right = tl.load(d_out_ptr + chunk + offsets, mask=mask, other=0.0).to(ACC)
                falling = ((j + 1) * last_x - x * (small_width - 1)).to(ACC) / last_x
                resized += rising[:, None] * left + falling[:, None] * right
                if GATED:
                    mask = (y < owned)[:, None] & columns_here
                    tl.store(d_low_ptr + chunk + offsets, right * gate + d_mean_low, mask=mask)
            dy = ((y * (small_height - 1) - i * last_y).to(ACC) / last_y)[:, None]
            here += (1 - dy) * resized
            below += dy * resized
        d_high = tl.sum(tl.reshape(here, (ROWS, COLUMNS, CHANNELS)), axis=0)
        if GATED:
            d_mean_high = tl.load(d_mean_ptr + channels + col, mask=col < channels)[None, :]
            d_high += d_mean_high * share * mean_weight(i, small_height, height, ACC)
        mask = (own < tl.where((i >= first_row) & (i < small_height), small_width, 0))[:, None] & in_channels
        offsets = ((image * small_height + i) * small_width + own)[:, None] * channels + col[None, :]
        tl.store(d_high_ptr + offsets, d_high, mask=mask)
        here = below


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for an accumulator's dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(low: Tensor, high: Tensor, gate: Tensor | None = None) -> Tensor:
    """``low [* gate] + resize(high)``; low and high in channels_last, gate ``[B, C]`` in the accumulator's dtype."""
    B, C, H, W = low.shape
    h, w = high.shape[2:]
    out = torch.empty_like(low, memory_format=torch.channels_last)
    tile = tuning.upsample_add_fwd_tile(C, low.element_size())
    vector = tuning.vector_width(C, low.element_size())
    acc = triton_dtype(accumulator(low.dtype) if gate is None else gate.dtype)
    grid = (B * triton.cdiv(H, tile.rows) * triton.cdiv(W, tile.columns) * triton.cdiv(C, tile.channels),)
    arguments = (low, high, gate, out, H, W, h, w, C // vector, gate is not None, vector)
    _upsample_add_fwd_kernel[grid](*arguments, ACC=acc, **tuning.launch_options(tile))
    return out


def backward(
    d_out: Tensor, size: tuple[int, int], gate: Tensor | None = None, d_mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """d_low (d_out itself without a gate) and d_high of ``size`` (h, w); d_out in channels_last, gate ``[B, C]`` and
    d_mean ``[B, 2C]``, the gradient of the means of low and of the resized high, in the accumulator's dtype."""
    B, C, H, W = d_out.shape
    h, w = size
    d_low = d_out if gate is None else torch.empty_like(d_out, memory_format=torch.channels_last)
    d_high = torch.empty((B, C, h, w), dtype=d_out.dtype, device=d_out.device, memory_format=torch.channels_last)
    tile = tuning.upsample_add_bwd_tile(C, d_out.element_size(), H, h)
    vector = tuning.vector_width(C, d_out.element_size())
    acc = triton_dtype(accumulator(d_out.dtype) if gate is None else gate.dtype)
    programs = B * triton.cdiv(w, tile.columns) * triton.cdiv(C, tile.channels)
    run = tuning.upsample_add_bwd_run(programs, h)
    arguments = (
        d_out,
        gate,
        d_mean,
        None if gate is None else d_low,
        d_high,
        H,
        W,
        h,
        w,
        C // vector,
        run,
        gate is not None,
        vector,
    )
    grid = (programs * triton.cdiv(h, run),)
    _upsample_add_bwd_kernel[grid](*arguments, ACC=acc, **tuning.launch_options(tile))
    return d_low, d_high


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CHANNELS = (512, 24, 21)  # many; few, in accesses of 16 bytes; few, one by one


def features_case(
    kernel: Any,
    dtype: torch.dtype,
    channels: int,
    tile: Any,
    features: tuple[str, ...],
    vectors: Mapping[str, str | None],
    integers: list[str],
    note: str = "",
    **flags: Any,
) -> CompileCase:
    """A kernel over features in ``dtype``, which move in 16-byte accesses if the channels allow it. ``vectors`` are
    its other pointers, by type, or None if they are absent."""
    vector = tuning.vector_width(channels, dtype.itemsize)
    pointers = dict.fromkeys(features, TYPES[dtype]) | {name: kind for name, kind in vectors.items() if kind}
    options = tuning.launch_options(tile)
    num_warps = options.pop("num_warps")
    absent = dict.fromkeys(vectors.keys() - pointers.keys())
    constexprs = options | flags | absent | {"VECTOR": vector, "ACC": tl.float32}
    aligned = (*pointers, *(["groups"] if channels // vector % 16 == 0 else []))
    signature = pointers | dict.fromkeys([*integers, "groups"], "i32")
    streaming = features if vector * dtype.itemsize == 16 else ()
    note = f"{TYPES[dtype][1:]}, {channels} channels{note}"
    return CompileCase(kernel, signature, constexprs, aligned, num_warps, 3, streaming, note)


def compile_cases(gated: bool = False) -> list[CompileCase]:
    """Both kernels with every entry of their tables."""
    cases = []
    sums = "*fp32" if gated else None
    for dtype, kind in TYPES.items():
        for C in CHANNELS:
            features: tuple[str, ...] = ("low_ptr", "high_ptr", "out_ptr")
            vectors: dict[str, str | None] = {"gate_ptr": sums}
            tile = tuning.upsample_add_fwd_tile(C, dtype.itemsize)
            cases.append(features_case(_upsample_add_fwd_kernel, dtype, C, tile, features, vectors, SIZES, GATED=gated))
            # d_high, a sixteenth of d_out from four rows on, moves as wide as its small tile allows.
            vectors |= {"d_mean_ptr": sums, "d_high_ptr": kind} | ({} if gated else {"d_low_ptr": None})
            features = ("d_out_ptr", "d_low_ptr") if gated else ("d_out_ptr",)
            for height in (17, 33, 65):  # factors 2, 4 and 8
                tile = tuning.upsample_add_bwd_tile(C, dtype.itemsize, height, 9)
                arguments = (dtype, C, tile, features, vectors, [*SIZES, "run"], f", {tile.rows} rows")
                cases.append(features_case(_upsample_add_bwd_kernel, *arguments, GATED=gated))
    return cases
