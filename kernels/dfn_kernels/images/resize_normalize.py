"""Image input: ``out = (resize(image) / 255 - mean) / std``, uint8 ``[B, H, W, 3]`` -> float ``[B, 3, h, w]``.

The resize is bilinear with half-pixel centres, clamped at the edges and without antialiasing: ``cv2.resize`` with
``INTER_LINEAR`` on float input. Output pixel ``j`` of ``h`` lies at ``((2 j + 1) H - h) / (2 h)``, a quotient of
integers, so index and weight are exact at any size; equal sizes leave each pixel as it is. ``flip`` appends the
mirrored copies as a second half of the batch. ``out`` is channels_last. One pass.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.common.backend import DTYPES, accumulator, operator, use_triton
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.triton_or_stub import tl, triton

CPU_CHUNK = 2**18  # elements of one [rows, W, 3] block on the CPU: a megabyte, which stays in cache


def resize_normalize_ref(
    images: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, in plain PyTorch; computed in float64 for ``dtype`` float64, else in float32."""
    x = images.permute(0, 3, 1, 2).to(accumulator(dtype))
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    x = (x / 255 - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    x = torch.cat([x, x.flip(-1)]) if flip else x
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@triton.jit
def _half_pixel(j, small, full, ACC: tl.constexpr):
    """Index, next index and the next one's weight, in ``small``, of pixel ``j`` of ``full``."""
    position = tl.maximum((2 * j + 1) * small - full, 0).to(tl.uint32)
    step = tl.cast(2 * full, tl.uint32)  # not .to(): a size of 1 is a constant of the kernel
    index = position // step
    weight = (position - index * step).to(ACC) / step.to(ACC)
    index = index.to(tl.int32)
    return index, tl.minimum(index + 1, small - 1), weight


@triton.jit
def _channel(upper, lower, left, right, below, beyond, SCALE, SHIFT, RESIZE: tl.constexpr, ACC: tl.constexpr):
    """One channel of a row of pixels; ``upper`` and ``lower`` point to it in the first pixel of two image rows."""
    value = tl.load(upper + left).to(ACC)
    if RESIZE:
        value += (tl.load(upper + right).to(ACC) - value) * beyond
        under = tl.load(lower + left).to(ACC)
        under += (tl.load(lower + right).to(ACC) - under) * beyond
        value += (under - value) * below
    return value * SCALE + SHIFT


@triton.jit(do_not_specialize=["batch", "in_height", "in_width", "height"])
def _resize_normalize_kernel(
    images_ptr, out_ptr, batch, in_height, in_width, height, width, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    RESIZE: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS x PIXELS of one output image. Pixels are computed one a thread and stored as a contiguous stream."""
    tiles = tl.cdiv(width, PIXELS)
    bands = tl.cdiv(height, ROWS)
    start = tl.program_id(0) % tiles * PIXELS
    first_row = tl.program_id(0) // tiles % bands * ROWS
    target = (tl.program_id(0) // (tiles * bands)).to(tl.int64)  # image of the output
    image = tl.where(target >= batch, target - batch, target)
    column = tl.minimum(start + tl.arange(0, PIXELS), width - 1)
    column = tl.where(target >= batch, width - 1 - column, column)
    left, right, beyond = _half_pixel(column, in_width, width, ACC)
    left *= 3
    right *= 3
    element = tl.arange(0, 4 * PIXELS)  # of the stream; the last quarter is padding, as sizes are powers of two
    inside = (element < 3 * PIXELS) & (element < (width - start) * 3)
    place = tl.where(element < 3 * PIXELS, element // 3 * 4 + element % 3, 0)

    for i in tl.static_range(ROWS):
        row = tl.minimum(first_row + i, height - 1)  # past the end, repeat the last row rather than branch
        top, bottom, below = _half_pixel(row, in_height, height, ACC)
        upper = images_ptr + (image * in_height + top) * in_width * 3
        lower = images_ptr + (image * in_height + bottom) * in_width * 3
        red = _channel(upper, lower, left, right, below, beyond, SCALE[0], SHIFT[0], RESIZE, ACC)
        green = _channel(upper + 1, lower + 1, left, right, below, beyond, SCALE[1], SHIFT[1], RESIZE, ACC)
        blue = _channel(upper + 2, lower + 2, left, right, below, beyond, SCALE[2], SHIFT[2], RESIZE, ACC)
        pixels = tl.reshape(tl.join(tl.join(red, blue), tl.join(green, green)), [4 * PIXELS])  # red, green, blue, -
        stream = tl.gather(pixels, place, axis=0)
        out = out_ptr + ((target * height + row) * width + start) * 3
        tl.store(out + element, stream.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(images: Tensor, out: Tensor, scale: Sequence[float], shift: Sequence[float]) -> None:
    B, H, W, _ = images.shape
    h, w = out.shape[2:]
    tile = tuning.resize_normalize_tile(w)
    grid = (triton.cdiv(w, tile.pixels) * triton.cdiv(h, tile.rows) * out.shape[0],)
    _resize_normalize_kernel[grid](
        images, out, B, H, W, h, w, SCALE=tuple(scale), SHIFT=tuple(shift), RESIZE=(h, w) != (H, W),
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32, **tuning.launch_options(tile),
    )  # fmt: skip


def _half_pixels(small: int, full: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_half_pixel` of all pixels of ``full``."""
    position = ((2 * torch.arange(full, device=device) + 1) * small - full).clamp(min=0)
    index = position // (2 * full)
    return index, (index + 1).clamp(max=small - 1), (position - index * 2 * full).to(dtype) / (2 * full)


def _run_torch(images: Tensor, out: Tensor, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Plain PyTorch, one block of rows (of several small images) at a time.

    Three channels are too few for a vectorised inner loop, so a row is one vector of ``3 w`` numbers.
    """
    B, H, W, _ = images.shape
    h, w = out.shape[2:]
    dtype, device = accumulator(out.dtype), out.device
    top, bottom, below = _half_pixels(H, h, dtype, device)
    left, right, beyond = _half_pixels(W, w, dtype, device)
    left, right = ((3 * pixel[:, None] + torch.arange(3, device=device)).flatten() for pixel in (left, right))
    beyond = beyond.repeat_interleave(3)
    scales, shifts = (torch.tensor(x, dtype=dtype, device=device).repeat(w) for x in (scale, shift))
    images = images.flatten(2)  # [B, H, 3 W]
    stream = out.permute(0, 2, 3, 1)  # [B or 2 B, h, w, 3], contiguous
    rows = max(CPU_CHUNK // (3 * max(W, w)), 1)
    for first, begin in itertools.product(range(0, B, max(rows // h, 1)), range(0, h, rows)):
        block = images[first : first + max(rows // h, 1)]
        band = slice(begin, begin + rows)
        if h == H:
            x = block[:, band].to(dtype)
        else:
            x = block.index_select(1, top[band]).to(dtype)
            x = x.lerp_(block.index_select(1, bottom[band]).to(dtype), below[band, None])
        x = x.flatten(0, 1)  # [images x rows, 3 W]
        if w != W:
            x = x.index_select(1, left).lerp_(x.index_select(1, right), beyond)
        x = x.mul_(scales).add_(shifts).view(len(block), -1, w, 3)
        stream[first : first + len(block), band] = x
        if len(out) > B:
            stream[B + first : B + first + len(block), band] = x.flip(2)


def _check(
    images: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> None:
    name = "resize_normalize"
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"{name} expects images [B, H, W, 3], H and W at least 1, got shape {list(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"{name} expects images in uint8, got {images.dtype}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} expects size (h, w), both at least 1, got {tuple(size)}")
    if images.shape[1] * size[0] >= 2**30 or images.shape[2] * size[1] >= 2**30:
        raise ValueError(f"{name} expects H * h and W * w below 2^30, got {list(images.shape[1:3])} and {list(size)}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{name} expects three values of mean and of std, got {list(mean)} and {list(std)}")
    if min(std) <= 0 or max(map(abs, mean)) > 1:
        raise ValueError(
            f"{name} expects mean and std of images in 0 .. 1 (mean within -1 .. 1, std above 0), "
            f"got {list(mean)} and {list(std)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"{name} expects dtype float32, bfloat16, float16 or float64, got {dtype}")


def resize_normalize(
    images: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(resize(images) / 255 - mean) / std``, the network's input, in one pass.

    ``images``: uint8 RGB ``[B, H, W, 3]``, any strides (copied unless contiguous). ``size``: ``(h, w)`` of
    the output. The resize is that of ``cv2.resize`` with ``INTER_LINEAR`` on float input: half-pixel centres, edges
    clamped, no antialiasing; an unchanged size changes no pixel. ``mean``, ``std``: three numbers each, in units of
    0 .. 1 (ImageNet's are 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225). ``dtype``: of the output, float32, bfloat16,
    float16 or float64; computed in float32 (float64 for float64) and rounded once, under autocast too.

    Returns ``[B, 3, h, w]``, channels_last; with ``flip`` ``[2 B, 3, h, w]``, the second half mirrored left to right.
    Raises ValueError for wrong shapes or dtypes.
    """
    _check(images, size, mean, std, dtype)
    return _resize_normalize(images, size[0], size[1], list(map(float, mean)), list(map(float, std)), flip, dtype)


def _empty(images: Tensor, height: int, width: int, flip: bool, dtype: torch.dtype) -> Tensor:
    batch = images.shape[0] * (2 if flip else 1)
    return images.new_empty((batch, height, width, 3), dtype=dtype).permute(0, 3, 1, 2)


@operator("resize_normalize")
def _resize_normalize(
    images: Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = _empty(images, height, width, flip, dtype)
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    run = _launch if use_triton(images) else _run_torch
    run(images.contiguous(), out, scale, shift)
    return out


@_resize_normalize.register_fake
def _(images, height, width, mean, std, flip, dtype):
    return _empty(images, height, width, flip, dtype)


def compile_cases() -> list[CompileCase]:
    """Each tile, with and without a resize, in float32 and bfloat16, and at a width that allows no 16-byte stores."""
    variants = [(kind, *flags) for kind in ("fp32", "bf16") for flags in ((True, True), (False, True), (True, False))]
    return [
        _case(tile, *variant)
        for tile in tuning.RESIZE_NORMALIZE.values()
        for variant in [*variants, ("fp16", True, True)]
    ]


def _case(tile: tuning.StreamTile, kind: str, resize: bool, aligned: bool) -> CompileCase:
    options = tuning.launch_options(tile)
    return CompileCase(
        kernel=_resize_normalize_kernel,
        signature={
            "images_ptr": "*u8",
            "out_ptr": f"*{kind}",
            **dict.fromkeys(("batch", "in_height", "in_width", "height", "width"), "i32"),
        },
        num_warps=options.pop("num_warps"),
        constexprs={
            "SCALE": (0.0171, 0.0175, 0.0174),
            "SHIFT": (-2.12, -2.04, -1.8),
            "RESIZE": resize,
            "ACC": tl.float32,
            **options,
        },
        divisible=("images_ptr", "out_ptr", "width") if aligned else ("images_ptr", "out_ptr"),
        num_stages=2,
        streaming=("out_ptr",) if aligned else (),  # images are gathered, byte by byte, from the cache
        note=f"{kind}, {tile.pixels} pixels, {'resized' if resize else 'same size'}{'' if aligned else ', odd width'}",
    )
