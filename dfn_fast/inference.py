"""From an image to its segmentation: several scales, mirror images, windows. The plain version, one image at a time.

With ``z(x, size)`` the network's stride-4 scores of ``x`` resized to ``size`` (bilinear, ``align_corners=True``),
preset ``"mean"`` is, over scales ``s`` and, with flip, both the scaled image ``I_s`` and its mirror image::

    probabilities = mean of softmax(z(I_s, image's size))             mirrored scores are mirrored back

With windows, the scores ``z(tile, tile's size)`` of all tiles that hold a pixel are averaged at the scaled size and
then resized to the image's. A tile that is the scaled image is no different from no window at all.

Preset ``"torchseg"`` is the evaluator of DFN's authors: window 512, stride 2/3 of it, and::

    sum over s of resize(sum over tiles of softmax(z(tile)) * mirrored back softmax(z(mirrored tile)))

with products and sums not normalised, so that pixels of several tiles weigh more where scales differ, and with half
pixels as centres in the last resize. What it pads is black, unless the whole scaled image fits in a window.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn_fast import cli
from dfn_fast.data.transforms import normalize
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.losses import at_least_float32
from dfn_fast.reference import MIN_SIZE, ReferenceDFN, resize

PRESETS = ("mean", "torchseg")
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCHSEG_WINDOW = 512
# A progress bar of images, for tqdm: images/s, however slow.
IMAGES_BAR: dict[str, Any] = {
    "unit": " images",
    "dynamic_ncols": True,
    "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
}

Head = Callable[[list[Tensor]], Tensor]  # feature maps of the four stages -> stride-4 scores


class Predictor:
    """Segments images of any size: ``predictor(image)`` is the label map.

    Args:
        model: a ReferenceDFN. It is moved to ``device``; each call runs it in eval mode and leaves it as it was.
        scales: factors of the image's size, each side rounded; a side is not made smaller than 32.
        flip: takes the mirror image in too.
        window: side or (height, width) of the tiles that the scaled image is cut into; None: the image as a whole.
            Tiles cover the image, the last ones flush with its edge.
        overlap: the share of a tile that the next one covers again, at least.
        preset: ``"mean"`` or ``"torchseg"``, see this file's docstring.
        device: None: where the model is.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``: the precision of the network, not of what follows it.

    An image smaller than the window, or than 32, is padded all round with the mean colour and its scores cut out again.
    """

    def __init__(
        self,
        model: ReferenceDFN,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | tuple[int, int] | None = None,
        overlap: float = 1 / 3,
        preset: str = "mean",
        device: torch.device | str | None = None,
        amp: str = "off",
    ):
        self.scales = tuple(float(scale) for scale in scales)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(f"scales {list(scales)}: expected one or more positive numbers, such as 0.5 1 1.5")
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
        if amp not in AMP_DTYPES:
            raise ConfigError(f"amp {amp!r}: expected one of {', '.join(AMP_DTYPES)}")
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap {overlap}: expected a share of the window from 0 to below 1")
        if window is None and preset == "torchseg":
            window = TORCHSEG_WINDOW
        self.window = (window, window) if isinstance(window, int) else window
        if self.window is not None and min(self.window) < MIN_SIZE:
            raise ConfigError(f"window {window}: expected at least {MIN_SIZE}, the network's largest stride")
        self.flip, self.overlap, self.preset, self.amp = flip, overlap, preset, amp
        self.model = model if device is None else model.to(device)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``[H, W, 3]`` RGB uint8 -> class ids ``[H, W]`` uint8."""
        return self.probabilities(image).argmax(0).to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, image: np.ndarray) -> Tensor:
        """``[H, W, 3]`` RGB uint8 -> ``[K, H, W]`` float32 on the model's device; they add up to 1 at each pixel.

        Raises :class:`UserError` where the network's scores are not finite, or memory does not suffice.
        """
        with in_eval_mode(self.model), memory_advice(image):
            at_scale = self._mean_at_scale if self.preset == "mean" else self._torchseg_at_scale
            total = at_scale(image, self.scales[0])
            for scale in self.scales[1:]:
                total += at_scale(image, scale)
            # The sum is a constant for "mean". Products of torchseg's can all be too small for the dtype.
            total /= total.sum(0).clamp(min=torch.finfo(total.dtype).tiny)
        if not torch.isfinite(total).all():
            raise UserError("the network's scores are not finite: the checkpoint is damaged, or try --amp off")
        return total.float()

    @torch.inference_mode()
    def border(self, image: np.ndarray) -> np.ndarray:
        """``[H, W, 3]`` RGB uint8 -> ``[H, W]`` float32: probability of a border, at scale 1 and without mirroring."""
        if not self.model.has_border:
            raise ConfigError("this network was built without a Border Network; leave out --border")
        with in_eval_mode(self.model), memory_advice(image):
            size = image.shape[0], image.shape[1]
            scores = self._scores(self._input(image, 1.0), size, self._border_scores, flip=False)
        return torch.sigmoid(scores[0, 0]).float().cpu().numpy()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def settings(self) -> dict[str, Any]:
        """The arguments that decide the result, as plain values for JSON."""
        return {
            "scales": list(self.scales),
            "flip": self.flip,
            "window": self.window and list(self.window),
            "overlap": self.window and self.overlap,
            "preset": self.preset,
            "amp": self.amp,
        }

    def describe(self) -> str:
        """Scales, flip and window in words: what a number that came from this predictor must name."""
        window = "whole image"
        if self.window is not None:
            window = f"window {self.window[0]}x{self.window[1]} overlap {self.overlap:.2f}"
        scales = f"scale{'s' if len(self.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in self.scales)}"
        rest = ", torchseg preset" if self.preset == "torchseg" else ""
        rest += f", {self.amp}" if self.amp != "off" else ""
        return f"{scales}, {'flip' if self.flip else 'no flip'}, {window}{rest}"

    def _mean_at_scale(self, image: np.ndarray, scale: float) -> Tensor:
        size = image.shape[0], image.shape[1]
        scores = self._scores(self._input(image, scale), size, self._class_scores, self.flip)
        return torch.softmax(scores, dim=1).mean(0)

    def _torchseg_at_scale(self, image: np.ndarray, scale: float) -> Tensor:
        x = self._input(image, scale)
        assert self.window is not None
        fits = x.shape[2] <= self.window[0] and x.shape[3] <= self.window[1]
        black = None if fits else normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=x.device), x.dtype)
        x, inside = pad(x, self.window, black)

        def product(tile: Tensor) -> Tensor:
            scores = self._network(tile, tile.shape[2:], self._class_scores, self.flip)
            return F.log_softmax(scores, dim=1).sum(0, keepdim=True).exp()

        total = self._over_windows(x, product)[inside]
        return F.interpolate(total, image.shape[:2], mode="bilinear", align_corners=False)[0]

    def _input(self, image: np.ndarray, scale: float) -> Tensor:
        """The scaled image, normalised, ``[1, 3, h, w]`` in the model's dtype and on its device."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got {image.dtype} {list(image.shape)}")
        sides = [round(scale * side) for side in image.shape[:2]]
        if self.preset == "torchseg" and min(sides) > 0:
            # By factor, not by size: that is another grid where a side was rounded.
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        elif scale != 1:
            height, width = (max(side, min(MIN_SIZE, old)) for side, old in zip(sides, image.shape[:2], strict=True))
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        dtype = next(self.model.parameters()).dtype
        return normalize(torch.tensor(image, device=self.device).permute(2, 0, 1)[None], dtype)

    def _scores(self, x: Tensor, size: tuple[int, int] | torch.Size, head: Head, flip: bool) -> Tensor:
        """Scores of ``x`` at ``size``, ``[1 or 2, K, *size]``: those of the mirror image, mirrored back, are second."""
        window = self.window or (max(x.shape[2], MIN_SIZE), max(x.shape[3], MIN_SIZE))
        if x.shape[2:] == window:
            return self._network(x, size, head, flip)
        x, inside = pad(x, window)
        total = self._over_windows(x, lambda tile: self._network(tile, tile.shape[2:], head, flip))
        total /= self._over_windows(x, lambda tile: torch.ones_like(tile[:, :1]))
        return resize(total[inside], size)

    def _over_windows(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum, at each pixel of ``x``, of ``function`` of the tiles that hold it."""
        height, width = self.window or x.shape[2:]
        total = None
        for top in window_starts(x.shape[2], height, self.overlap):
            for left in window_starts(x.shape[3], width, self.overlap):
                place = (..., slice(top, top + height), slice(left, left + width))
                values = function(x[place])
                if total is None:
                    total = values.new_zeros(*values.shape[:2], *x.shape[2:])
                total[place] += values
        assert total is not None
        return total

    def _network(self, x: Tensor, size: tuple[int, int] | torch.Size, head: Head, flip: bool) -> Tensor:
        """Stride-4 scores of ``x`` and, with ``flip``, of its mirror image mirrored back, resized to ``size``."""
        batch = torch.cat([x, x.flip(3)]) if flip else x
        dtype = AMP_DTYPES[self.amp]
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            scores = head(self.model.stages(batch))
        scores = at_least_float32(scores)
        if flip:
            scores = torch.stack([scores[0], scores[1].flip(2)])
        return resize(scores, size)

    def _class_scores(self, stages: list[Tensor]) -> Tensor:
        return self.model.smooth_network(stages, stages[0].shape[2:])[-1]

    def _border_scores(self, stages: list[Tensor]) -> Tensor:
        return self.model.border_network(stages, stages[0].shape[2:])[-1]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start along a side: every ``ceil((1 - overlap) * window)`` pixels, the last one flush."""
    stride = max(math.ceil((1 - overlap) * window - 1e-6), 1)  # 1 - 1/3 is a little more than 2/3 in floating point
    count = math.ceil(max(length - window, 0) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def pad(x: Tensor, size: tuple[int, int], colour: Tensor | None = None) -> tuple[Tensor, tuple]:
    """``x`` in the middle of a larger image where a side is shorter than in ``size``; and the index that cuts it out.

    ``colour`` ``[1, 3, 1, 1]``, normalised, is that of the padding; None: 0, the mean of all images.
    """
    height, width = x.shape[2:]
    missing = [max(side - have, 0) for side, have in zip(size, (height, width), strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    inside = (..., slice(top, top + height), slice(left, left + width))
    if not any(missing):
        return x, inside
    padded = x.new_zeros(*x.shape[:2], height + missing[0], width + missing[1])
    padded = padded.contiguous(memory_format=torch.channels_last)
    if colour is not None:
        padded += colour
    padded[inside] = x
    return padded, inside


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs the block with every module in eval mode, and gives each its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def memory_advice(image: np.ndarray) -> Iterator[None]:
    """Turns an out-of-memory error into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"an image of {image.shape[1]}x{image.shape[0]} does not fit into memory; use --window 512, smaller "
            "--scales or --amp bf16"
        ) from error


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """The options of a :class:`Predictor`, alike in evaluate and predict."""
    group = parser.add_argument_group("inference")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="image scales (default: 1)")
    group.add_argument("--flip", action="store_true", help="take the mirror image in at each scale")
    group.add_argument(
        "--window", type=cli.size, metavar="SIZE", help="cut into windows, 512 or 512x1024 (default: whole image)"
    )
    group.add_argument(
        "--overlap",
        type=float,
        default=1 / 3,
        metavar="X",
        help="share of a window that the next covers (default: 1/3)",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="mean",
        metavar="NAME",
        help="mean: probabilities are averaged (default); torchseg: as DFN's authors combine them, windows of 512",
    )
    group.add_argument("--amp", choices=("off", "bf16"), default="off", metavar="NAME", help="off (default) or bf16")
    group.add_argument("--device", default="auto", help="cuda, cuda:1, cpu or auto: CUDA where there is one (default)")


def predictor_from(arguments: argparse.Namespace, model: ReferenceDFN) -> Predictor:
    """The predictor that the options of :func:`add_inference_options` ask for, on the model's device."""
    names = ("scales", "flip", "window", "overlap", "preset", "amp")
    return Predictor(model, **{name: getattr(arguments, name) for name in names})
