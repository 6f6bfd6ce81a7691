"""Combines the scores of several scales and windows, as :mod:`dfn_fast.inference.settings` defines.

Whole images take one :func:`~dfn_kernels.resize_normalize` a scale, with both mirror images in a batch. With windows
the result is assembled one band of rows at a time (:mod:`dfn_fast.inference.windows`).
"""

from collections.abc import Callable, Iterator, Sequence

import cv2
import torch
from torch import Tensor

from dfn_fast.data.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from dfn_fast.inference.engine import Engine
from dfn_fast.inference.padding import pad_centred
from dfn_fast.inference.settings import Settings
from dfn_fast.inference.windows import Cropped, WholeScores, WindowScores, resized_rows
from dfn_fast.network.backbone import MIN_SIZE
from dfn_fast.network.blocks import resize
from dfn_fast.network.losses import at_least_float32
from dfn_kernels import resize_normalize

BAND_BYTES = 1 << 26  # of the probabilities that are assembled at a time


def small_maps(engine: Engine, settings: Settings, images: Tensor) -> tuple[list[Tensor], list[bool]]:
    """The small score maps of whole uint8 images ``[B, H, W, 3]``, and which of them are of mirror images.

    One map ``[B, K, h, w]`` per scale; with flip another one, of the mirror images and not mirrored back.
    """
    maps, flipped = [], []
    for scale in settings.scales:
        x = _scaled_input(engine, images, scale, settings.flip)
        inside = None
        if min(x.shape[2:]) < MIN_SIZE:
            x, inside = pad_centred(x, (MIN_SIZE, MIN_SIZE))
        scores = engine.scores(x)
        if inside is not None:
            scores = resize(at_least_float32(scores), x.shape[2:])[inside]
        halves = scores.split(len(images))
        maps += halves
        flipped += [False, True][: len(halves)]
    return maps, flipped


def bands(engine: Engine, settings: Settings, image: Tensor) -> Iterator[Tensor]:
    """Sums over the scales of a uint8 image ``[1, H, W, 3]``, from the top, ``[K, rows, W]`` at a time.

    Rule ``"mean"`` gives probabilities, ``"torchseg"`` its sums, which are not normalised.
    """
    size = (image.shape[1], image.shape[2])
    torchseg = settings.rule == "torchseg"
    if torchseg:
        sources: list[WholeScores | WindowScores | Cropped]
        sources = [_torchseg_source(engine, settings, image, scale) for scale in settings.scales]
    else:
        inputs = (_scaled_input(engine, image, scale) for scale in settings.scales)
        sources = [source(engine, settings, x, engine.scores, settings.flip) for x in inputs]
    rows = max(BAND_BYTES // (4 * engine.network.num_classes * size[1] * (2 if settings.flip else 1)), 1)
    for begin in range(0, size[0], rows):
        end = min(begin + rows, size[0])
        total: Tensor | None = None
        for scores in sources:
            x = resized_rows(
                scores.rows, scores.size, begin, end, size, align_corners=scores.align_corners, like=scores.like
            )
            x = x[0] if torchseg else torch.softmax(x, dim=1).mean(0) / len(sources)
            total = x if total is None else total + x
        assert total is not None
        yield total


def source(
    engine: Engine, settings: Settings, x: Tensor, network: Callable[[Tensor], Tensor], flip: bool
) -> WholeScores | WindowScores | Cropped:
    """``network``'s scores of a scaled image ``[1, 3, h, w]``, in windows if it does not fit into one."""
    inside = None
    if min(x.shape[2:]) < MIN_SIZE:
        x, inside = pad_centred(x, (MIN_SIZE, MIN_SIZE))
    window = tuple(min(a, b) for a, b in zip(settings.window or x.shape[2:], x.shape[2:], strict=True))
    height, width = (max(side, MIN_SIZE) for side in window)
    if (height, width) == x.shape[2:]:
        scores = network(torch.cat([x, x.flip(3)]) if flip else x)
        scores = torch.stack([scores[0], scores[1].flip(-1)]) if flip else scores
        if inside is None:
            return WholeScores(scores)
        return WholeScores(resize(at_least_float32(scores), x.shape[2:])[inside])
    tiles = WindowScores(
        network,
        x,
        (height, width),
        settings.overlap,
        flip=flip,
        batch=engine.tiles_at_once(x, (height, width), flip),
        weight=settings.window_weight,
    )
    return tiles if inside is None else Cropped(tiles, inside)


def _torchseg_source(engine: Engine, settings: Settings, image: Tensor, scale: float) -> Cropped:
    """The authors' rule at one scale. It resizes by factor, not to a size: the grid differs if a side was rounded."""
    assert settings.window is not None
    scaled = image[0].cpu().numpy()
    if min(round(scale * side) for side in scaled.shape[:2]) > 0:
        scaled = cv2.resize(scaled, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    x = normalize(torch.tensor(scaled, device=image.device).permute(2, 0, 1)[None], engine.network.dtype)
    fits = x.shape[2] <= settings.window[0] and x.shape[3] <= settings.window[1]
    black = None if fits else normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=x.device), x.dtype)
    x, inside = pad_centred(x, settings.window, black)
    batch = engine.tiles_at_once(x, settings.window, settings.flip)
    tiles = WindowScores(
        engine.scores, x, settings.window, settings.overlap, flip=settings.flip, batch=batch, product=True
    )
    return Cropped(tiles, inside)


def _scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) times ``scale``, rounded; a side is not made smaller than 32."""
    height, width = (max(round(scale * side), min(MIN_SIZE, side)) for side in size)
    return height, width


def _scaled_input(engine: Engine, images: Tensor, scale: float, flip: bool = False) -> Tensor:
    """The scaled images, normalised, ``[B, 3, h, w]``, with ``flip`` their mirror images as a second half."""
    size = _scaled_size(images.shape[1:3], scale)
    return resize_normalize(images, size, IMAGENET_MEAN, IMAGENET_STD, flip=flip, dtype=engine.network.dtype)
