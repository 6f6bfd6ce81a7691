"""The Triton kernels that channel_attention does not share with upsample_add: pooling and linear layers.

Sums over pixels go to a row of partial sums per program, ``[B, parts, ...]``, and are added in a fixed order.
Everything between the pooling passes is ``[B, C]`` or ``[B, 2C]`` in the accumulator's dtype, and stays on the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.attention import upsample_add_triton as upsample_add
from dfn_kernels.attention.upsample_add_triton import CHANNELS, SIZES, TYPES, features_case, triton_dtype
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.resize import mean_weight
from dfn_kernels.common.triton_or_stub import tl, triton

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _sum_pixels(x, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The sum of ``[PIXELS, CHANNELS]`` over its pixels in two steps: fewer terms in a row, fewer roundings."""
    return tl.sum(tl.sum(tl.reshape(x, [4, PIXELS // 4, CHANNELS]), axis=0), axis=0)


@triton.jit(do_not_specialize=[*SIZES, "share", "parts"])
def _mean_fwd_kernel(
    low_ptr,
    high_ptr,
    partial_ptr,
    height,
    width,
    small_height,
    small_width,
    share,
    parts,
    groups,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One part's share of the means of low and of the resized high: ``share`` pixels of low, rows of high."""
    channels = groups * VECTOR
    blocks = tl.cdiv(channels, CHANNELS)
    col = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = (col < channels)[None, :]
    part = tl.program_id(0) // blocks % parts
    image = (tl.program_id(0) // blocks // parts).to(tl.int64)
    partial_ptr += (image * parts + part) * 2 * channels

    pixels = height.to(tl.int64) * width
    first = part.to(tl.int64) * share
    count = tl.minimum(pixels - first, share)
    low_ptr += (image * pixels + first) * channels
    pixel = tl.arange(0, PIXELS)
    offsets = pixel[:, None] * channels + col[None, :]
    total = tl.zeros([PIXELS, CHANNELS], ACC)
    for start in range(0, count, PIXELS):
        mask = (pixel + start < count)[:, None] & in_channels
        total += tl.load(low_ptr + offsets, mask=mask, other=0.0).to(ACC)
        low_ptr += PIXELS * channels
    tl.store(partial_ptr + col, _sum_pixels(total, PIXELS, CHANNELS) / pixels, mask=col < channels)

    rows = tl.cdiv(small_height, parts)
    high_ptr += (image * small_height + part * rows) * small_width * channels
    total = tl.zeros([PIXELS, CHANNELS], ACC)
    for left in range(0, small_width, PIXELS):
        weight = mean_weight(pixel + left, small_width, width, ACC)
        mask = (pixel + left < small_width)[:, None] & in_channels
        row_ptr = high_ptr
        for step in range(tl.minimum(rows, small_height - part * rows)):
            high = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(ACC)
            total += (weight * mean_weight(part * rows + step, small_height, height, ACC))[:, None] * high
            row_ptr += small_width * channels
        high_ptr += PIXELS * channels
    tl.store(partial_ptr + channels + col, _sum_pixels(total, PIXELS, CHANNELS), mask=col < channels)


@triton.jit(do_not_specialize=["height", "width", "share", "parts"])
def _gate_bwd_kernel(
    d_out_ptr,
    low_ptr,
    partial_ptr,
    height,
    width,
    share,
    parts,
    groups,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One part of the gate's gradient: the sum of ``d_out * low`` over ``share`` pixels."""
    channels = groups * VECTOR
    blocks = tl.cdiv(channels, CHANNELS)
    col = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(0) // blocks % parts
    image = (tl.program_id(0) // blocks // parts).to(tl.int64)
    pixels = height.to(tl.int64) * width
    first = part.to(tl.int64) * share
    count = tl.minimum(pixels - first, share)
    d_out_ptr += (image * pixels + first) * channels
    low_ptr += (image * pixels + first) * channels
    pixel = tl.arange(0, PIXELS)
    offsets = pixel[:, None] * channels + col[None, :]
    total = tl.zeros([PIXELS, CHANNELS], ACC)
    for start in range(0, count, PIXELS):
        mask = (pixel + start < count)[:, None] & (col < channels)[None, :]
        d_out = tl.load(d_out_ptr + offsets, mask=mask, other=0.0).to(ACC)
        total += d_out * tl.load(low_ptr + offsets, mask=mask, other=0.0).to(ACC)
        d_out_ptr += PIXELS * channels
        low_ptr += PIXELS * channels
    total = _sum_pixels(total, PIXELS, CHANNELS)
    tl.store(partial_ptr + (image * parts + part) * channels + col, total, mask=col < channels)


@triton.jit
def _sum_parts_kernel(
    partial_ptr, gate_ptr, out_ptr, parts, size, PARTS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr
):
    """Adds the parts ``[B, parts, size]``; with a gate, goes on to the gradient of the sigmoid's argument."""
    image = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([PARTS, CHANNELS], ACC)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (col < size)[None, :]
        total += tl.load(partial_ptr + (image * parts + part)[:, None] * size + col[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * size + col, mask=col < size, other=0.0)
        result *= gate * (1 - gate)
    tl.store(out_ptr + image * size + col, result, mask=col < size)


@triton.jit(do_not_specialize=["batch"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    relu_ptr,
    out_ptr,
    batch,
    inputs,
    outputs,
    weight_stride,
    FORWARD: tl.constexpr,
    SIGMOID: tl.constexpr,
    BATCH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Forward ``relu(x @ weight.T + bias)`` or its sigmoid; backward ``x @ weight``, 0 where relu_ptr holds 0."""
    row = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([BATCH, OUTPUTS], ACC)
    for start in range(0, inputs, INPUTS):
        col = start + tl.arange(0, INPUTS)
        mask = (row < batch)[:, None] & (col < inputs)[None, :]
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * inputs + col[None, :], mask=mask, other=0.0)
        mask = (out < outputs)[:, None] & (col < inputs)[None, :]
        if FORWARD:
            offsets = out[:, None].to(tl.int64) * weight_stride + col[None, :]
        else:
            offsets = col[None, :].to(tl.int64) * weight_stride + out[:, None]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(ACC)
        total += tl.sum(x[:, None, :] * weight[None, :, :], axis=2)
    offsets = row[:, None].to(tl.int64) * outputs + out[None, :]
    mask = (row < batch)[:, None] & (out < outputs)[None, :]
    if FORWARD:
        total += tl.load(bias_ptr + out, mask=out < outputs, other=0.0).to(ACC)[None, :]
        total = 1 / (1 + tl.exp(-total)) if SIGMOID else tl.where(total < 0, 0.0, total)  # nan stays nan
    elif relu_ptr is not None:
        total = tl.where(tl.load(relu_ptr + offsets, mask=mask, other=0.0) > 0, total, 0.0)
    tl.store(out_ptr + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _linear_weight_bwd_kernel(
    d_out_ptr,
    x_ptr,
    d_weight_ptr,
    d_bias_ptr,
    batch,
    inputs,
    outputs,
    BATCH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``d_weight = d_out.T @ x`` and ``d_bias``, the sum of d_out over the batch."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    d_weight = tl.zeros([OUTPUTS, INPUTS], ACC)
    d_bias = tl.zeros([OUTPUTS], ACC)
    for start in range(0, batch, BATCH):
        for step in tl.static_range(BATCH):  # independent loads, several in flight
            left = batch - start - step
            d_out = tl.load(d_out_ptr + out, mask=out < tl.where(left > 0, outputs, 0), other=0.0)
            x = tl.load(x_ptr + col, mask=col < tl.where(left > 0, inputs, 0), other=0.0)
            d_weight += d_out[:, None] * x[None, :]
            d_bias += d_out
            d_out_ptr += outputs
            x_ptr += inputs
    mask = (out < outputs)[:, None] & (col < inputs)[None, :]
    tl.store(d_weight_ptr + out[:, None].to(tl.int64) * inputs + col[None, :], d_weight, mask=mask)
    tl.store(d_bias_ptr + out, d_bias, mask=out < tl.where(tl.program_id(1) == 0, outputs, 0))


def _pool(kernel: Any, x: Tensor, y: Tensor, sizes: tuple[int, ...], width: int, acc: torch.dtype) -> Tensor:
    """The partial sums ``[B, parts, width]`` of a pooling kernel over x and y."""
    B, C, H, W = x.shape
    tile = tuning.pool_tile(C, x.element_size())
    parts = tuning.pool_parts(B, H * W, C, tile)
    partial = torch.empty((B, parts, width), dtype=acc, device=x.device)
    vector = tuning.vector_width(C, x.element_size())
    grid = (B * parts * triton.cdiv(C, tile.channels),)
    options = {"VECTOR": vector, "ACC": triton_dtype(acc)} | tuning.launch_options(tile)
    kernel[grid](x, y, partial, *sizes, triton.cdiv(H * W, parts), parts, C // vector, **options)
    return partial


def _sum_parts(partial: Tensor, gate: Tensor | None = None) -> Tensor:
    B, parts, size = partial.shape
    out = torch.empty((B, size), dtype=partial.dtype, device=partial.device)
    tile = tuning.SUM_PARTS
    grid = (B, triton.cdiv(size, tile.channels))
    acc = triton_dtype(partial.dtype)
    _sum_parts_kernel[grid](partial, gate, out, parts, size, ACC=acc, **tuning.launch_options(tile))
    return out


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: Tensor | None = None, sigmoid: bool = False
) -> Tensor:
    """With a bias, the layer and its activation; without one, the gradient of its input. weight is ``[out, in]``."""
    forward = bias is not None
    outputs = weight.shape[0 if forward else 1]
    B, inputs = x.shape
    out = torch.empty((B, outputs), dtype=x.dtype, device=x.device)
    tile = tuning.LINEAR[forward]
    grid = (triton.cdiv(B, tile.batch), triton.cdiv(outputs, tile.outputs))
    arguments = (x, weight, bias, relu, out, B, inputs, outputs, weight.stride(0), forward, sigmoid)
    _linear_kernel[grid](*arguments, ACC=triton_dtype(x.dtype), **tuning.launch_options(tile))
    return out


def _linear_weight_bwd(d_out: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (B, outputs), inputs = d_out.shape, x.shape[1]
    d_weight = torch.empty((outputs, inputs), dtype=dtype, device=x.device)
    d_bias = torch.empty(outputs, dtype=dtype, device=x.device)
    tile = tuning.LINEAR_WEIGHT_BWD
    grid = (triton.cdiv(outputs, tile.outputs), triton.cdiv(inputs, tile.inputs))
    arguments = (d_out, x, d_weight, d_bias, B, inputs, outputs)
    _linear_weight_bwd_kernel[grid](*arguments, ACC=triton_dtype(x.dtype), **tuning.launch_options(tile))
    return d_weight, d_bias


def forward(
    low: Tensor, high: Tensor, parameters: tuple[Tensor, ...], acc: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, mean ``[B, 2C]``, hidden and gate ``[B, C]``; features in channels_last, contiguous parameters."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    sizes = (*low.shape[2:], *high.shape[2:])
    mean = _sum_parts(_pool(_mean_fwd_kernel, low, high, sizes, 2 * low.shape[1], acc))
    hidden = _linear(mean, fc1_weight, fc1_bias)
    gate = _linear(hidden, fc2_weight, fc2_bias, sigmoid=True)
    return upsample_add.forward(low, high, gate), mean, hidden, gate


def backward(
    d_out: Tensor,
    low: Tensor,
    size: tuple[int, int],
    vectors: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
) -> Gradients:
    """d_low, d_high of ``size`` (h, w) and the gradients of both layers' weights and biases."""
    mean, hidden, gate = vectors
    fc1_weight, fc2_weight = weights
    partial = _pool(_gate_bwd_kernel, d_out, low, tuple(low.shape[2:]), low.shape[1], gate.dtype)
    d_gate = _sum_parts(partial, gate)  # of the sigmoid's argument
    d_hidden = _linear(d_gate, fc2_weight, relu=hidden)  # of the ReLU's argument
    d_mean = _linear(d_hidden, fc1_weight)
    d_low, d_high = upsample_add.backward(d_out, size, gate, d_mean)
    d_fc1 = _linear_weight_bwd(d_hidden, mean, fc1_weight.dtype)
    d_fc2 = _linear_weight_bwd(d_gate, hidden, fc2_weight.dtype)
    return d_low, d_high, *d_fc1, *d_fc2


def compile_cases() -> list[CompileCase]:
    """Every kernel with every entry of its tables, besides those of upsample_add."""
    cases = []
    for dtype in TYPES:
        for C in CHANNELS:
            tile = tuning.pool_tile(C, dtype.itemsize)
            sums: dict[str, str | None] = {"partial_ptr": "*fp32"}
            integers = ["height", "width", "share", "parts"]
            features = ("low_ptr", "high_ptr")
            small = ["small_height", "small_width"]
            cases.append(features_case(_mean_fwd_kernel, dtype, C, tile, features, sums, [*integers, *small]))
            features = ("d_out_ptr", "low_ptr")
            cases.append(features_case(_gate_bwd_kernel, dtype, C, tile, features, sums, integers))
    for kind in TYPES.values():  # of the parameters; the pooling passes' results are float32
        for C, note in ((512, "512 channels"), (21, "21 channels")):
            aligned = C % 16 == 0
            cases += _linear_cases(kind, aligned, f"{kind[1:]}, {note}")
    for gate in ("*fp32", None):
        pointers: dict[str, str | None] = {"partial_ptr": "*fp32", "gate_ptr": gate, "out_ptr": "*fp32"}
        cases.append(_case(_sum_parts_kernel, tuning.SUM_PARTS, pointers, ["parts", "size"], True, "512 channels"))
    return cases


def _linear_cases(kind: str, aligned: bool, note: str) -> list[CompileCase]:
    sums, integers = "*fp32", ["batch", "inputs", "outputs", "weight_stride"]
    cases = []
    for forward, sigmoid, relu in ((True, False, None), (True, True, None), (False, False, sums), (False, False, None)):
        pointers = {"x_ptr": sums, "weight_ptr": kind, "bias_ptr": kind if forward else None}
        pointers |= {"relu_ptr": relu, "out_ptr": sums}
        flags = {"FORWARD": forward, "SIGMOID": sigmoid}
        cases.append(_case(_linear_kernel, tuning.LINEAR[forward], pointers, integers, aligned, note, **flags))
    pointers = {"d_out_ptr": sums, "x_ptr": sums, "d_weight_ptr": kind, "d_bias_ptr": kind}
    tile, integers = tuning.LINEAR_WEIGHT_BWD, ["batch", "inputs", "outputs"]
    return [*cases, _case(_linear_weight_bwd_kernel, tile, pointers, integers, aligned, note)]


def _case(
    kernel: Any,
    tile: Any,
    pointers: Mapping[str, str | None],
    integers: list[str],
    aligned: bool,
    note: str,
    **flags: Any,
) -> CompileCase:
    present = {name: kind for name, kind in pointers.items() if kind}
    options = tuning.launch_options(tile)
    num_warps = options.pop("num_warps")
    constexprs = options | flags | {"ACC": tl.float32} | dict.fromkeys(pointers.keys() - present.keys())
    divisible = (*present, *[name for name in integers if aligned and name not in ("batch", "parts")])
    signature = present | dict.fromkeys(integers, "i32")
    return CompileCase(kernel, signature, constexprs, divisible, num_warps, 3, (), note)
