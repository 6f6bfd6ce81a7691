"""Multi-scale decision: ``labels = argmax over K of the mean over maps of softmax(resize(map))``.

Takes any number of score maps ``[B, K, h_i, w_i]`` of different sizes and dtypes, some of them of mirrored images, and
a full size ``(H, W)``. Each map is resized (bilinear, ``align_corners=True``), mirrored back if it was mirrored, and
softmaxed over ``K``. Probabilities are summed in the order given; if sums tie, the lower class wins. One launch, no
full-size tensor but the labels, no gradient. Maps whose classes are innermost are read in place, others are copied to
channels_last first.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfn_kernels import tuning
from dfn_kernels.common.backend import DTYPES, nhwc, operator, use_triton
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.resize import source
from dfn_kernels.common.triton_or_stub import tl, triton

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
CPU_CHUNK = 2**18  # elements of one [K, rows, W] block on the CPU: a megabyte, which stays in cache


def multiscale_argmax_ref(
    logits: Sequence[Tensor], size: tuple[int, int], *, flipped: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: labels uint8 ``[B, H, W]`` and mean probabilities ``[B, K, H, W]``."""
    dtype = _score_dtype(logits)
    total = torch.zeros((), dtype=dtype, device=logits[0].device)
    for x, mirrored in zip(logits, flipped or [False] * len(logits), strict=True):
        resized = F.interpolate(x.to(dtype), size=size, mode="bilinear", align_corners=True)
        total = total + (resized.flip(-1) if mirrored else resized).softmax(1)
    return total.argmax(1).to(torch.uint8), nhwc(total / len(logits))


@triton.jit
def _pick(numbers, i):
    """``numbers[i]``, int64, for an ``i`` known only at run time. It allows a loop over maps: a copy of the code for
    each map would take minutes to compile and all registers."""
    number = tl.cast(numbers[0], tl.int64)
    for j in tl.static_range(1, len(numbers)):
        number = tl.where(i == j, tl.cast(numbers[j], tl.int64), number)
    return number


@triton.jit
def _pick_size(numbers, i):
    """The number behind :func:`_opaque`."""
    return (_pick(numbers, i) - 3) >> 1


@triton.jit
def _gather(
    address, kind, offsets, mask, TYPES: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr
):
    """Loads ``[CLASSES, PIXELS]`` of a map of ``TYPES[kind]`` as a vector, so that a thread holds all of a pixel.

    Loaded as a matrix, the contiguous classes would be spread over the threads: each softmax would need shuffles
    and every thread would compute every pixel's address.
    """
    offsets = tl.reshape(offsets, [CLASSES * PIXELS])
    mask = tl.reshape(mask, [CLASSES * PIXELS])
    flat = tl.zeros([CLASSES * PIXELS], ACC)
    for j in tl.static_range(len(TYPES)):
        if kind == j:
            flat = tl.load(address.to(tl.pointer_type(TYPES[j])) + offsets, mask=mask, other=0.0).to(ACC)
    return tl.reshape(flat, [CLASSES, PIXELS])


@triton.jit(do_not_specialize=["height", "width"])
def _multiscale_argmax_kernel(
    map_ptrs, heights, widths, strides, flips, labels_ptr, scores_ptr, height, width,
    KINDS: tl.constexpr, TYPES: tl.constexpr, SCORES: tl.constexpr, K: tl.constexpr,
    CLASSES: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, PIXELS)
    image = (tl.program_id(0) // (tiles * height)).to(tl.int64)
    row = tl.program_id(0) // tiles % height
    column = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    inside = column < width
    column = tl.minimum(column, width - 1)
    k = tl.arange(0, CLASSES)[:, None]
    classes = tl.broadcast_to(k < K, [CLASSES, PIXELS])

    total = tl.zeros([CLASSES, PIXELS], ACC)
    for i in range(len(map_ptrs)):
        mirrored = tl.where(_pick_size(flips, i) == 1, width - 1 - column, column)
        h, w = _pick_size(heights, i).to(tl.int32), _pick_size(widths, i).to(tl.int32)
        top, bottom, below = source(row, h, height)
        left, right, beyond = source(mirrored, w, width)
        below = below.to(ACC) / tl.maximum(height - 1, 1).to(ACC)
        beyond = (beyond.to(ACC) / tl.maximum(width - 1, 1).to(ACC))[None, :]
        stride = _pick_size(strides, i)
        upper = (image * h + top) * w * stride
        lower = (image * h + bottom) * w * stride
        left = (left * stride)[None, :] + k
        right = (right * stride)[None, :] + k
        x, kind = _pick(map_ptrs, i), _pick(KINDS, i)
        logit = _gather(x, kind, upper + left, classes, TYPES, CLASSES, PIXELS, ACC) * ((1 - below) * (1 - beyond))
        logit += _gather(x, kind, upper + right, classes, TYPES, CLASSES, PIXELS, ACC) * ((1 - below) * beyond)
        logit += _gather(x, kind, lower + left, classes, TYPES, CLASSES, PIXELS, ACC) * (below * (1 - beyond))
        logit += _gather(x, kind, lower + right, classes, TYPES, CLASSES, PIXELS, ACC) * (below * beyond)
        logit = tl.where(classes, logit, float("-inf"))
        power = tl.exp(logit - tl.max(logit, axis=0)[None, :])
        total += power * (1 / tl.sum(power, axis=0))[None, :]

    pixel = (image * height + row) * width + column
    if SCORES:
        tl.store(scores_ptr + pixel[None, :] * K + k, total / len(map_ptrs), mask=classes & inside[None, :])
    total = tl.where(classes, total, -1.0)
    best = tl.max(total, axis=0)
    label = tl.min(tl.where(total == best[None, :], k, CLASSES), axis=0)
    label = tl.where(label < K, label, 0)  # if a score is nan, no class is the best
    tl.store(labels_ptr + pixel, label.to(tl.uint8), mask=inside)


def _opaque(number: int) -> int:
    """Maps a number to an odd one above 1. Triton recompiles for integers that are 1 or multiples of 16. In tuples that
    cannot be turned off, and sizes must not cause it."""
    return 2 * number + 3


def _launch(
    logits: Sequence[Tensor], height: int, width: int, flipped: Sequence[bool], labels: Tensor, scores: Tensor | None
) -> None:
    B, K = logits[0].shape[:2]
    # [B h w, K], without a copy if the pixels are evenly spaced.
    maps = [x.permute(0, 2, 3, 1).reshape(-1, K) for x in logits]
    maps = [x if x.stride(1) == 1 else x.contiguous() for x in maps]
    dtypes = list(dict.fromkeys(x.dtype for x in maps))
    score_dtype = _score_dtype(logits)
    tile = tuning.multiscale_argmax_tile(K, score_dtype.itemsize)
    _multiscale_argmax_kernel[(triton.cdiv(width, tile.pixels) * height * B,)](
        tuple(maps),
        tuple(_opaque(x.shape[2]) for x in logits),
        tuple(_opaque(x.shape[3]) for x in logits),
        tuple(_opaque(x.stride(0)) for x in maps),
        tuple(_opaque(int(mirrored)) for mirrored in flipped),
        labels,
        labels if scores is None else scores,
        height,
        width,
        KINDS=tuple(dtypes.index(x.dtype) for x in maps),
        TYPES=tuple(TYPES[dtype] for dtype in dtypes),
        SCORES=scores is not None,
        K=K,
        CLASSES=tuning.power_of_two(K),
        ACC=TYPES[score_dtype],
        **tuning.launch_options(tile),
    )


def _resized_rows(x: Tensor, begin: int, end: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows ``begin .. end - 1`` of ``x`` ``[K, h, w]`` resized to ``[K, height, width]``, ``h`` at most ``height``.

    Columns first, while there are few rows, then rows by a product with their part of the resize matrix.
    """
    last_row, last = x.shape[1] - 1, max(height - 1, 1)
    first = begin * last_row // last
    stop = min((end - 1) * last_row // last + 1, last_row) + 1
    x = x[None, :, first:stop].to(dtype).contiguous()
    x = F.interpolate(x, size=(stop - first, width), mode="bilinear", align_corners=True)[0]
    if last_row + 1 == height:
        return x[:, : end - begin]
    position = torch.arange(begin, end, device=x.device)[:, None] * last_row
    top = position // last
    below = (position - top * last).to(dtype) / last
    row = torch.arange(first, stop, device=x.device)
    weight = torch.where(row == top, 1 - below, 0) + torch.where(row == (top + 1).clamp(max=last_row), below, 0)
    with torch.autocast(x.device.type, enabled=False):  # it would run the product in half precision
        return weight @ x


def _shrunk(x: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``x`` shrunk to at most the image's rows and columns. The result is no larger than ``x``, so resize it whole."""
    size = min(x.shape[2], height), min(x.shape[3], width)
    return x if x.shape[2:] == size else F.interpolate(x.to(dtype), size=size, mode="bilinear", align_corners=True)


def _run_torch(
    logits: Sequence[Tensor], height: int, width: int, flipped: Sequence[bool], labels: Tensor, scores: Tensor | None
) -> None:
    """Plain PyTorch, one block of rows at a time: no full-size map of ``K`` classes but ``scores``."""
    dtype = _score_dtype(logits)
    B, K = logits[0].shape[:2]
    step = max(CPU_CHUNK // (K * width), 1)
    maps = [_shrunk(x, height, width, dtype) for x in logits]
    for image, begin in itertools.product(range(B), range(0, height, step)):
        end = min(begin + step, height)
        total = None
        for x, mirrored in zip(maps, flipped, strict=True):
            small = x[image].flip(-1) if mirrored else x[image]
            probabilities = _resized_rows(small, begin, end, height, width, dtype).softmax(0)
            total = probabilities if total is None else total.add_(probabilities)
        labels[image, begin:end] = total.max(0).indices  # the same as argmax, several times faster
        if scores is not None:
            scores[image, :, begin:end] = total.div_(len(logits))


def _score_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _check(logits: Sequence[Tensor], size: tuple[int, int], flipped: Sequence[bool]) -> None:
    name = "multiscale_argmax"
    if isinstance(logits, Tensor) or not logits:
        raise ValueError(f"{name} expects a list of one or more score maps, got {type(logits).__name__}")
    if len(flipped) != len(logits):
        raise ValueError(f"{name} expects one value of flipped for each of {len(logits)} maps, got {len(flipped)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} expects size (H, W), both at least 1, got {tuple(size)}")
    first = logits[0]
    for i, x in enumerate(logits):
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(
                f"{name} expects logits[{i}] [B, K, h, w], all but B at least 1, got shape {list(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} expects logits[{i}] in float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.shape[:2] != first.shape[:2] or x.device != first.device:
            raise ValueError(
                f"{name} expects logits[{i}] like logits[0] ([B, K] = {list(first.shape[:2])} on {first.device}), "
                f"got {list(x.shape[:2])} on {x.device}"
            )
        if x.shape[2] * size[0] >= 2**31 or x.shape[3] * size[1] >= 2**31:
            raise ValueError(f"{name} expects h * H and w * W below 2^31, got {list(x.shape[2:])} and {list(size)}")
    if first.shape[1] > 256:
        raise ValueError(f"{name} expects at most 256 classes, which fit uint8 labels, got {first.shape[1]}")


def multiscale_argmax(
    logits: Sequence[Tensor],
    size: tuple[int, int],
    *,
    flipped: Sequence[bool] | None = None,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Labels from the score maps of several scales: resize, softmax, mean over maps, argmax.

    ``logits``: one or more ``[B, K, h_i, w_i]`` of finite scores before the softmax, K from 1 to 256, of any sizes and
    layouts, each float32, bfloat16, float16 or float64. ``size``: the full ``(H, W)``. ``flipped``: for each map
    whether it is of the mirrored image (default: none is); its column ``W - 1 - x`` then counts for pixel ``x``.

    Returns uint8 labels ``[B, H, W]``, ties going to the lower class; with ``return_scores`` also the mean
    probabilities ``[B, K, H, W]``, channels_last, float32 (float64 if a map is float64). Softmax and sum are computed
    in that dtype, under autocast too. Not differentiable: labels have no gradient, and going backward through the
    probabilities raises RuntimeError. Raises ValueError for wrong shapes, dtypes, devices or class counts.
    """
    flipped = [False] * len(logits) if flipped is None else [bool(mirrored) for mirrored in flipped]
    _check(logits, size, flipped)
    if return_scores:
        return _multiscale_scores(list(logits), size[0], size[1], flipped)
    return _multiscale_argmax(list(logits), size[0], size[1], flipped)


def _empty_labels(logits: Sequence[Tensor], height: int, width: int) -> Tensor:
    return logits[0].new_empty((logits[0].shape[0], height, width), dtype=torch.uint8)


def _empty_scores(logits: Sequence[Tensor], height: int, width: int) -> Tensor:
    B, K = logits[0].shape[:2]
    return logits[0].new_empty((B, height, width, K), dtype=_score_dtype(logits)).permute(0, 3, 1, 2)


@operator("multiscale_argmax")
def _multiscale_argmax(logits: Sequence[Tensor], height: int, width: int, flipped: Sequence[bool]) -> Tensor:
    labels = _empty_labels(logits, height, width)
    run = _launch if use_triton(logits[0]) else _run_torch
    run(logits, height, width, flipped, labels, None)
    return labels


@_multiscale_argmax.register_fake
def _(logits, height, width, flipped):
    return _empty_labels(logits, height, width)


@operator("multiscale_scores")
def _multiscale_scores(
    logits: Sequence[Tensor], height: int, width: int, flipped: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    labels, scores = _empty_labels(logits, height, width), _empty_scores(logits, height, width)
    run = _launch if use_triton(logits[0]) else _run_torch
    run(logits, height, width, flipped, labels, scores)
    return labels, scores


@_multiscale_scores.register_fake
def _(logits, height, width, flipped):
    return _empty_labels(logits, height, width), _empty_scores(logits, height, width)


def _backward(ctx, *gradients):
    raise RuntimeError("multiscale_argmax has no gradient: it is for inference; train on each map's own loss")


_multiscale_argmax.register_autograd(_backward)
_multiscale_scores.register_autograd(_backward)


def compile_cases() -> list[CompileCase]:
    """Every tile, with and without probabilities; one map to ten, of one dtype and of several."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cases = [_case(K, [half, half], scores) for K in (21, 60, 100, 150) for scores in (False, True)]
    cases += [_case(K, [single, single], False) for K in (21, 256)]
    cases += [_case(21, [torch.float16], False), _case(19, [single, half, torch.float16, half], True)]
    # Five scales, each with its mirror image.
    return [*cases, _case(21, [double], True), _case(21, [half] * 10, False)]


def _case(K: int, dtypes: list[torch.dtype], scores: bool) -> CompileCase:
    score_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    options = tuning.launch_options(tuning.multiscale_argmax_tile(K, score_dtype.itemsize))
    sizes = ("heights", "widths", "strides", "flips")
    kinds = list(dict.fromkeys(dtypes))
    return CompileCase(
        kernel=_multiscale_argmax_kernel,
        signature={
            "map_ptrs": tuple(f"*{TYPES[dtype]}" for dtype in dtypes),
            **dict.fromkeys(sizes, ("i32",) * len(dtypes)),
            "labels_ptr": "*u8",
            "scores_ptr": f"*{TYPES[score_dtype]}" if scores else "*u8",
            "height": "i32",
            "width": "i32",
        },
        num_warps=options.pop("num_warps"),
        constexprs={
            "KINDS": tuple(kinds.index(dtype) for dtype in dtypes),
            "TYPES": tuple(TYPES[dtype] for dtype in kinds),
            "SCORES": scores,
            "K": K,
            "CLASSES": tuning.power_of_two(K),
            "ACC": TYPES[score_dtype],
            **options,
        },
        divisible=("map_ptrs", "labels_ptr", "scores_ptr"),
        num_stages=2,
        streaming=(),  # gathers of a few bytes that meet in the cache, and one byte a pixel
        note=f"{K} classes, {len(dtypes)} maps {' '.join(str(TYPES[x]) for x in kinds)}" + ", probabilities" * scores,
    )
