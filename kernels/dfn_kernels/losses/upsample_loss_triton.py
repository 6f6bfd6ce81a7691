"""Kernels of the fused losses: each full-size pixel is resized, judged and differentiated once, and never stored.

With ``align_corners=True`` the full-size pixels fall into cells between four small pixels. A program owns ``COLUMNS``
small columns of ``BANDS`` small rows: it walks down the rows, keeps the logits and the gradients of its cells' corners
in registers ``[REGISTERS, COLUMNS, LANES]`` (class ``r * LANES + l``; a column's classes lie in one warp) and visits
the pixels of all its cells in step. Rows of the gradient that neighbouring programs share are written by each to a
place of its own, ``gradient`` ``[B, h / BANDS, SPLITS, w / COLUMNS, BANDS + 1, pitch]``, where a row is
``(COLUMNS + 1) * K`` sums and some padding; the backward pass adds them in a fixed order. The one pass over the pixels
is made of float32 multiply-adds (float64 for float64): no matrix units, no atomics, no recomputation.
"""

from math import prod

import torch
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.common.backend import accumulator, nhwc
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.resize import first_target
from dfn_kernels.common.triton_or_stub import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
PADDING = tl.constexpr(16)  # rows of the gradient begin at multiples of this, so that they can be read in wide accesses
LOWEST = tl.constexpr(-1e38)  # logit of an absent class; finite, so that it can be interpolated


@triton.jit
def _sum_classes(x):
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _largest(x):
    return tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _sum_all(x):
    return tl.sum(tl.sum(tl.sum(x, 2), 1), 0)


@triton.jit
def _load_logits(ptr, mask, ACC: tl.constexpr, SIGMOID: tl.constexpr):
    """Loads logits of small pixels. For the softmax, subtracts each pixel's largest: an offset that all classes share
    changes nothing, and without it the resize loses no digits."""
    # As a vector: loaded in their own shape, the contiguous classes may be spread over the lanes of a warp (Triton 3.6
    # does so), and then every thread computes the pixels of eight columns.
    flat = tl.load(tl.ravel(ptr), mask=tl.ravel(tl.broadcast_to(mask, ptr.shape)), other=0.0)
    x = tl.reshape(flat, ptr.shape).to(ACC)
    if not SIGMOID:
        x = tl.where(mask, x, LOWEST)
        x = tl.where(mask, x - _largest(x), LOWEST)
    return x


@triton.jit
def _power(q, GAMMA: tl.constexpr):
    """``q ** GAMMA`` for q in [0, 1]."""
    if GAMMA == 2.0:
        power = q * q
    else:
        power = tl.exp2(GAMMA * tl.log2(q))
    return power


@triton.jit
def _softmax_loss(z, hit, weight, GAMMA: tl.constexpr):
    """Softmax loss ``weight * (1 - p_y)^GAMMA * -log(p_y)`` ``[1, COLUMNS, 1]`` and its gradient, like the logits z;
    ``hit``: whether this class is the label."""
    largest = _largest(z)
    e = tl.exp2(z * LOG2_E - largest * LOG2_E)  # one multiply-add a class
    total = _sum_classes(e)
    nll = tl.log(total) - (_sum_classes(tl.where(hit, z, 0.0)) - largest)
    if GAMMA != 0.0:
        q = _sum_classes(tl.where(hit, 0.0, e)) / total  # 1 - p_y, without cancellation
        slope = tl.where(q > 0, nll / tl.where(q > 0, q, 1.0), 1.0)  # -log(1 - q) / q
        power = weight * _power(q, GAMMA)
        loss, factor = power * nll, power * (1 + GAMMA * tl.exp(-nll) * slope)
    else:
        loss, factor = weight * nll, weight
    return loss, e * (factor / total) - tl.where(hit, factor, 0.0)


@triton.jit
def _sigmoid_loss(z, positive, weight, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Sigmoid focal loss ``-alpha_t (1 - p_t)^GAMMA log(p_t)`` and its gradient, both like the logits z."""
    sign = tl.where(positive, 1.0, -1.0)
    z *= sign  # logit of the true side
    small = tl.exp(-tl.abs(z))
    more = 1 + small
    p, q = tl.where(z >= 0, 1.0, small) / more, tl.where(z >= 0, small, 1.0) / more  # p_t and 1 - p_t
    # log(1 + small) to the last digit: the ratio restores what rounding took from 1 + small.
    log1p = tl.where(more > 1, tl.log(more) * (small / tl.where(more > 1, more - 1, 1.0)), small)
    nll = tl.maximum(-z, 0.0) + log1p
    power = tl.where(positive, weight * ALPHA, weight * (1 - ALPHA))  # alpha in the weight's dtype, not float32
    if GAMMA != 0.0:
        power *= _power(q, GAMMA)
    return power * nll, -sign * power * (GAMMA * p * nll + q)


@triton.jit
def _pixel_loss(
    z, pixel, inside, k, K, labels_ptr, class_weight_ptr, pixel_weight_ptr, pixel_loss_ptr, ignore,
    SIGMOID: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss and weight of one pixel of each cell, ``[1, COLUMNS, LANES]``, and the gradient for its logits ``z``.

    ``pixel``: offset of its label, per class if each has its own (SIGMOID).
    """
    mask = inside & (k < K) if SIGMOID else inside
    label = tl.load(labels_ptr + pixel, mask=mask, other=0)
    valid = mask & (label != ignore) & (label >= 0) & (label < (2 if SIGMOID else K))
    weight = tl.where(valid, 1.0, 0.0).to(ACC)
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + tl.where(valid, label, 0), mask=valid, other=0.0)
    counted = weight
    if pixel_weight_ptr is not None:
        weight *= tl.load(pixel_weight_ptr + pixel, mask=valid, other=0.0)
    if SIGMOID:
        loss, d_z = _sigmoid_loss(z, label == 1, weight, ALPHA, GAMMA)
    else:
        loss, d_z = _softmax_loss(z, k == tl.where(valid, label.to(tl.int32), -1), weight, GAMMA)
    loss = tl.where(valid, loss, 0.0)
    if pixel_loss_ptr is not None:
        tl.store(pixel_loss_ptr + pixel, loss, mask=mask)
    if SIGMOID:
        loss, counted = tl.sum(loss, 0, keep_dims=True), tl.sum(counted, 0, keep_dims=True)
    else:  # all lanes of a column hold the same number
        first = tl.arange(0, LANES)[None, None, :] == 0
        loss, counted = tl.where(first, loss, 0.0), tl.where(first, counted, 0.0)
    return loss, counted, d_z


@triton.jit
def _store_row(row_ptr, left, right, s, k, K, pitch, COLUMNS: tl.constexpr):
    """One row of gradients: a column's sum from its own cell and from the cell to its left; zeros fill it up."""
    previous = tl.broadcast_to(tl.maximum(s - 1, 0), left.shape)
    shifted = tl.where(s > 0, tl.gather(right, previous, 1), 0.0)
    tl.store(row_ptr + s * K + k, left + shifted, mask=k < K)
    tl.store(row_ptr + (s + 1) * K + k, right, mask=(k < K) & (s == COLUMNS - 1))
    padding = (COLUMNS + 1) * K + tl.arange(0, PADDING)
    tl.store(row_ptr + padding, tl.zeros([PADDING], left.dtype), mask=padding < pitch)


# Sizes change from batch to batch, and their products are added up only once a row: specialising gains nothing.
@triton.jit(do_not_specialize=["K", "h", "w", "H", "W", "stride_b", "stride_row", "stride_column", "pitch", "ignore"])
def _loss_kernel(
    logits_ptr, labels_ptr, class_weight_ptr, pixel_weight_ptr, pixel_loss_ptr, sums_ptr, gradient_ptr,
    K, h, w, H, W, stride_b, stride_row, stride_column, pitch, ignore,
    SIGMOID: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACC: tl.constexpr,
    REGISTERS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, BANDS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program's sums of loss and weight and, if needed, per-pixel losses and rows of the gradient."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tiles, segments = tl.cdiv(w, COLUMNS), tl.cdiv(h, BANDS)
    tile, split = program % tiles, program // tiles % SPLITS
    segment = program // (tiles * SPLITS) % segments
    b = program // (tiles * SPLITS) // segments
    k = tl.arange(0, REGISTERS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    s = tl.arange(0, COLUMNS)[None, :, None]

    # Columns of the cells: cell c holds the pixels begin ... begin + count - 1.
    c = tile * COLUMNS + s
    begin = first_target(c, w, W)
    remainder = (begin * (w - 1) - c * (W - 1)).to(tl.int32)
    count = (first_target(c + 1, w, W) - begin).to(tl.int32)
    longest = tl.max(tl.max(tl.max(count, 2), 1), 0)
    left, right = tl.minimum(c, w - 1) * stride_column, tl.minimum(c + 1, w - 1) * stride_column
    unit_x, unit_y = 1.0 / tl.maximum(W - 1, 1).to(ACC), 1.0 / tl.maximum(H - 1, 1).to(ACC)

    zero = tl.zeros([REGISTERS, COLUMNS, LANES], ACC)
    loss_sum, weight_sum = tl.zeros([1, COLUMNS, LANES], ACC), tl.zeros([1, COLUMNS, LANES], ACC)
    d_top_left, d_top_right = zero, zero
    row_ptr = logits_ptr + b * stride_b + tl.minimum(segment * BANDS, h - 1) * stride_row
    top_left = _load_logits(row_ptr + left + k, k < K, ACC, SIGMOID)
    top_rise = _load_logits(row_ptr + right + k, k < K, ACC, SIGMOID) - top_left
    plane = (b * K + k) * H if SIGMOID else b * H  # rows of labels that come before
    for band in range(BANDS):
        i = segment * BANDS + band
        row_ptr = logits_ptr + b * stride_b + tl.minimum(i + 1, h - 1) * stride_row
        low_left = _load_logits(row_ptr + left + k, k < K, ACC, SIGMOID)
        low_rise = _load_logits(row_ptr + right + k, k < K, ACC, SIGMOID) - low_left
        d_low_left, d_low_right = zero, zero
        y_begin = first_target(i, h, H)
        y_remainder = (y_begin * (h - 1) - i * (H - 1)).to(tl.int32)
        rows = (first_target(i + 1, h, H) - y_begin).to(tl.int32)
        for x in range(longest):
            inside = x < count
            x_weight = tl.where(inside, remainder + x * (w - 1), 0).to(ACC) * unit_x
            top = top_left + x_weight * top_rise
            drop = low_left + x_weight * low_rise - top
            d_top, d_low = zero, zero
            for y in range(split.to(tl.int32), rows, SPLITS):
                y_weight = (y_remainder + y * (h - 1)).to(ACC) * unit_y
                loss, weight, d_z = _pixel_loss(
                    top + y_weight * drop, (plane + y_begin + y) * W + begin + x, inside, k, K,
                    labels_ptr, class_weight_ptr, pixel_weight_ptr, pixel_loss_ptr, ignore,
                    SIGMOID, ALPHA, GAMMA, ACC, LANES,
                )  # fmt: skip
                loss_sum += loss
                weight_sum += weight
                d_top += d_z * (1 - y_weight)
                d_low += d_z * y_weight
            d_top_left += d_top * (1 - x_weight)
            d_top_right += d_top * x_weight
            d_low_left += d_low * (1 - x_weight)
            d_low_right += d_low * x_weight
        if gradient_ptr is not None:
            row = (program * (BANDS + 1) + band) * pitch
            _store_row(gradient_ptr + row, d_top_left, d_top_right, s, k, K, pitch, COLUMNS)
        top_left, top_rise, d_top_left, d_top_right = low_left, low_rise, d_low_left, d_low_right
    if gradient_ptr is not None:
        row = (program * (BANDS + 1) + BANDS) * pitch
        _store_row(gradient_ptr + row, d_top_left, d_top_right, s, k, K, pitch, COLUMNS)
    tl.store(sums_ptr + program, _sum_all(loss_sum))
    tl.store(sums_ptr + programs + program, _sum_all(weight_sum))


@triton.jit
def _total_kernel(sums_ptr, loss_ptr, scale_ptr, programs, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The loss from the programs' sums, added in a fixed order, and the factor for the gradient."""
    loss, weight = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        loss += tl.load(sums_ptr + offsets, mask=offsets < programs, other=0.0).to(tl.float64)
        weight += tl.load(sums_ptr + programs + offsets, mask=offsets < programs, other=0.0).to(tl.float64)
    total = tl.sum(weight, 0)
    scale = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0) if MEAN else total * 0 + 1
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, tl.sum(loss, 0) * scale)


@triton.jit
def _collect_kernel(
    gradient_ptr, d_loss_ptr, scale_ptr, d_logits_ptr, K, h, width, tiles, segments, pitch,
    COLUMNS: tl.constexpr, BANDS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of one row of ``d_logits`` (``width`` = w * K elements a row) from the programs that hold a share of it:
    its own, the one above, the one to the left and the one above that, in this order."""
    program = tl.program_id(0).to(tl.int64)
    tile, i, b = program % tiles, program // tiles % h, program // tiles // h
    segment, band = i // BANDS, i % BANDS
    e = tl.arange(0, BLOCK)
    start = tile * (COLUMNS * K)
    mask = (e < COLUMNS * K) & (start + e < width)
    above = mask & (e < tl.where((band == 0) & (segment > 0), COLUMNS * K, 0))
    # The first column of a tile is the last of the one to its left; read with its padding of zeros, in wide accesses.
    seam = mask & (e < tl.where(tile > 0, pitch - COLUMNS * K, 0))
    d_logits = tl.zeros([BLOCK], gradient_ptr.dtype.element_ty)
    for split in range(SPLITS):
        here = ((b * segments + segment) * SPLITS + split) * tiles + tile
        row_ptr = gradient_ptr + (here * (BANDS + 1) + band) * pitch
        above_ptr = gradient_ptr + ((here - SPLITS * tiles) * (BANDS + 1) + BANDS) * pitch
        back = COLUMNS * K - (BANDS + 1) * pitch
        d_logits += tl.load(row_ptr + e, mask=mask, other=0.0)
        d_logits += tl.load(above_ptr + e, mask=above, other=0.0)
        d_logits += tl.load(row_ptr + back + e, mask=seam, other=0.0)
        d_logits += tl.load(above_ptr + back + e, mask=seam & above, other=0.0)
    scale = tl.load(scale_ptr) * tl.load(d_loss_ptr).to(tl.float64)
    tl.store(d_logits_ptr + (b * h + i) * width + start + e, d_logits.to(tl.float64) * scale, mask=mask)


def gradient_shape(logits: Tensor, height: int, sigmoid: bool) -> tuple[int, ...]:
    """The shape of the rows of sums that the programs write: see the module's docstring."""
    B, K, h, w = logits.shape
    tile, (bands, splits) = tuning.loss_tile(K, w, sigmoid), tuning.loss_bands(h, height)
    pitch = -(-(tile.columns + 1) * K // PADDING.value) * PADDING.value
    return B, -(-h // bands), splits, -(-w // tile.columns), bands + 1, pitch


def launch_fwd(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    *,
    sigmoid: bool,
    alpha: float,
    gamma: float,
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the gradient's rows of sums (empty unless needed) and the factor still to be applied to them."""
    K, h, w = logits.shape[1:]
    H, W = labels.shape[-2:]
    if K > 1 and logits.stride(1) != 1:
        logits = nhwc(logits)
    acc = accumulator(logits.dtype)
    shape = gradient_shape(logits, H, sigmoid)
    tile, programs = tuning.loss_tile(K, w, sigmoid), prod(shape[:4])
    gradient = logits.new_empty(shape if need_grad else (0,), dtype=acc)
    pixel_loss = logits.new_empty(labels.shape, dtype=acc) if reduction == "none" else None
    sums = logits.new_empty((2, programs), dtype=acc)
    stride_b, _, stride_row, stride_column = logits.stride()
    _loss_kernel[(programs,)](
        logits, labels.contiguous(), class_weight, pixel_weight, pixel_loss, sums, gradient if need_grad else None,
        K, h, w, H, W, stride_b, stride_row, stride_column, shape[-1], ignore_index,
        sigmoid, alpha, gamma, tl.float64 if acc == torch.float64 else tl.float32,
        tile.registers, tile.columns, tile.lanes, shape[4] - 1, shape[2], num_warps=tile.num_warps,
    )  # fmt: skip
    if pixel_loss is not None:
        return pixel_loss, gradient, logits.new_empty(0, dtype=torch.float64)
    loss, scale = logits.new_empty((), dtype=acc), logits.new_empty((), dtype=torch.float64)
    _total_kernel[(1,)](sums, loss, scale, programs, reduction == "mean", tuning.LOSS_TOTAL_BLOCK)
    return loss, gradient, scale


def launch_bwd(
    d_loss: Tensor, gradient: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, sigmoid: bool
) -> Tensor:
    """d_logits of ``shape`` (B, K, h, w) from the sums of :func:`launch_fwd`."""
    B, K, h, w = shape
    segments, splits, tiles, bands, pitch = gradient.shape[1:]
    columns = tuning.loss_tile(K, w, sigmoid).columns
    d_logits = torch.empty(shape, dtype=dtype, device=gradient.device, memory_format=torch.channels_last)
    block = tuning.power_of_two(columns * K)
    _collect_kernel[(B * h * tiles,)](
        gradient, d_loss, scale, d_logits, K, h, w * K, tiles, segments, pitch,
        columns, bands - 1, splits, block, num_warps=tuning.loss_collect_warps(block),
    )  # fmt: skip
    return d_logits


POINTERS = (
    "logits_ptr",
    "labels_ptr",
    "class_weight_ptr",
    "pixel_weight_ptr",
    "pixel_loss_ptr",
    "sums_ptr",
    "gradient_ptr",
)
SIZES = ("K", "h", "w", "H", "W", "stride_b", "stride_row", "stride_column", "pitch", "ignore")


def loss_case(
    classes: int, sigmoid: bool, gamma: float, *, small: int = 128, factor: int = 4, logits: str = "*fp32",
    labels: str = "*u8", absent: tuple[str, ...] = POINTERS[2:5], note: str = "",
) -> CompileCase:  # fmt: skip
    """The loss of ``classes`` at one size; ``absent`` names the operands that this call does not have."""
    tile, bands = tuning.loss_tile(classes, small, sigmoid), tuning.loss_bands(small, factor * small)
    types = {**dict.fromkeys(POINTERS, "*fp32"), "logits_ptr": logits, "labels_ptr": labels}
    signature = {name: kind for name, kind in types.items() if name not in absent} | dict.fromkeys(SIZES, "i32")
    constexprs = {
        **dict.fromkeys(absent), "SIGMOID": sigmoid, "ALPHA": 0.25, "GAMMA": gamma, "ACC": tl.float32,
        "REGISTERS": tile.registers, "COLUMNS": tile.columns, "LANES": tile.lanes,
        "BANDS": bands.bands, "SPLITS": bands.splits,
    }  # fmt: skip
    divisible = tuple(name for name in POINTERS if name not in absent)
    # Nothing streams: the logits are a sixteenth of the pixels or less, and the time goes into exponentials.
    note = f"{logits[1:]}, {classes} classes, {small} -> {factor * small}, {labels[1:]} labels{note}"
    return CompileCase(_loss_kernel, signature, constexprs, divisible, tile.num_warps, 3, (), note)


def collect_case(
    classes: int, sigmoid: bool, *, small: int = 128, factor: int = 4, logits: str = "*fp32"
) -> CompileCase:
    """The gradient of a loss's logits."""
    tile, bands = tuning.loss_tile(classes, small, sigmoid), tuning.loss_bands(small, factor * small)
    block = tuning.power_of_two(tile.columns * classes)
    pointers = {"gradient_ptr": "*fp32", "d_loss_ptr": "*fp32", "scale_ptr": "*fp64", "d_logits_ptr": logits}
    integers = {
        "K": classes,
        "h": small,
        "width": small * classes,
        "tiles": -(-small // tile.columns),
        "segments": -(-small // bands.bands),
    }
    divisible = (*pointers, "pitch", *(name for name, value in integers.items() if value % 16 == 0))
    # The rows of one or two classes are shorter than 16 bytes a lane of the one warp that adds them.
    streaming = ("gradient_ptr", "d_logits_ptr") if block >= 256 else ()
    return CompileCase(
        _collect_kernel,
        {**pointers, **dict.fromkeys(integers, "i32"), "pitch": "i32"},
        {"COLUMNS": tile.columns, "BANDS": bands.bands, "SPLITS": bands.splits, "BLOCK": block},
        divisible,
        tuning.loss_collect_warps(block),
        3,
        streaming,
        f"{logits[1:]}, {classes} classes, {small} -> {factor * small}",
    )


def total_case() -> CompileCase:
    """The sum over programs."""
    signature = {"sums_ptr": "*fp32", "loss_ptr": "*fp32", "scale_ptr": "*fp64", "programs": "i32"}
    constexprs = {"MEAN": True, "BLOCK": tuning.LOSS_TOTAL_BLOCK}
    return CompileCase(_total_kernel, signature, constexprs, tuple(signature), 4, 3, (), "mean")
