"""From images to their segmentation: several scales, mirror images, windows; as one graph on a GPU.

With ``z(x, size)`` the network's stride-4 scores of ``x`` resized to ``size`` (bilinear, ``align_corners=True``),
preset ``"mean"`` is, over scales ``s`` and, with flip, both the scaled image ``I_s`` and its mirror image::

    probabilities = mean of softmax(z(I_s, image's size))             mirrored scores are mirrored back

With windows, the scores ``z(tile, tile's size)`` of all tiles that hold a pixel are averaged at the scaled size and
then resized to the image's. A scaled image that fits into the window is seen as a whole, as without windows.

Preset ``"torchseg"`` is the evaluator of DFN's authors: window 512, stride 2/3 of it, and::

    sum over s of resize(sum over tiles of softmax(z(tile)) * mirrored back softmax(z(mirrored tile)))

with products and sums not normalised, so that pixels of several tiles weigh more where scales differ, and with half
pixels as centres in the last resize. What it pads is black, unless the whole scaled image fits in a window.

The network is the model's :class:`~dfn_fast.network.fused.FusedDFN`. Images as a whole take one upload of uint8, one
:func:`~dfn_kernels.resize_normalize` a scale with both mirror images in a batch, one
:func:`~dfn_kernels.multiscale_argmax` over all scales and one download of labels; with windows the result is put
together a band of rows at a time (:mod:`dfn_fast.inference.windows`).
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import cv2
import numpy as np
import torch
from torch import Tensor

from dfn_fast.data.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference.padding import bucketed, pad_centred, pad_corner
from dfn_fast.inference.windows import WEIGHTS, Cropped, WholeScores, WindowScores, resized_rows
from dfn_fast.network.backbone import MIN_SIZE
from dfn_fast.network.blocks import resize
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.losses import at_least_float32
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.device import HALVES, inductor_options
from dfn_fast.runtime.graph_cache import CudaGraphs, GraphCache
from dfn_kernels import multiscale_argmax, resize_normalize
from dfn_kernels.common.cpu import has_bf16_arithmetic

PRESETS = ("mean", "torchseg")
AMP_DTYPES = {"off": None, **HALVES}
AMPS = ("auto", *AMP_DTYPES)
AGREEMENT = 0.999  # of labels in bf16 with those in float32: what "auto" asks of the first image on a CPU
TORCHSEG_WINDOW = 512
BAND_BYTES = 1 << 26  # of the probabilities that are put together at a time
MOST_AT_ONCE = 32  # images or tiles of one batch


class Predictor:
    """Segments images of any size: ``predictor(image)`` is the label map.

    Args:
        model: a ReferenceDFN or FastDFN, which is moved to ``device`` and else left as it is, or a FusedDFN. Later
            changes of the model's weights are seen after :meth:`refresh`.
        scales: factors of the image's size, each side rounded; a side is not made smaller than 32.
        flip: takes the mirror image in too.
        window: side or (height, width) of the tiles that the scaled image is cut into; None: the image as a whole.
            Tiles cover the image, the last ones flush with its edge; a side longer than the image is cut to it.
        overlap: the share of a tile that the next one covers again, at least.
        window_weight: ``"count"``: tiles that hold a pixel count alike; ``"gaussian"``: less towards their edges.
        batch: images of one size, or tiles, in one run of the network; None: 1 on a CPU, on CUDA as many as free memory
            allows. Where memory does not suffice after all, half as many.
        preset: ``"mean"`` or ``"torchseg"``, see this file's docstring.
        device: None: where the model is.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``: the precision of the network, not of what follows it. ``"auto"``: bf16
            on CUDA; on a CPU with bf16 arithmetic too, unless it changes more than one label in a thousand of the first
            image.
        compile: the network through torch.compile, once for each size: half a minute, then less a run.
        graphs: on CUDA, each size of whole images as one CUDA graph.
        graph_cache_bytes: what the graphs of all sizes may take together.
        bucket: pads images to multiples of this at the bottom and right, and cuts the labels out again: fewer sizes,
            fewer graphs, slightly other labels.

    An image smaller than 32 is padded all round with the mean colour and its scores cut out again.
    """

    def __init__(
        self,
        model: ReferenceDFN | FusedDFN,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | tuple[int, int] | None = None,
        overlap: float = 1 / 3,
        window_weight: str = "count",
        batch: int | None = None,
        preset: str = "mean",
        device: torch.device | str | None = None,
        amp: str = "auto",
        compile: bool = False,  # noqa: A002  torch's own word for it
        graphs: bool = True,
        graph_cache_bytes: int = 1 << 31,
        bucket: int | None = None,
    ):
        self.scales = tuple(float(scale) for scale in scales)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(f"scales {list(scales)}: expected one or more positive numbers, such as 0.5 1 1.5")
        for name, value, choices in (
            ("preset", preset, PRESETS),
            ("amp", amp, AMPS),
            ("window_weight", window_weight, WEIGHTS),
        ):
            if value not in choices:
                raise ConfigError(f"{name} {value!r}: expected one of {', '.join(choices)}")
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap {overlap}: expected a share of the window from 0 to below 1")
        for name, number in (("batch", batch), ("bucket", bucket), ("graph_cache_bytes", graph_cache_bytes)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} {number}: expected a positive number")
        if window is None and preset == "torchseg":
            window = TORCHSEG_WINDOW
        self.window = (window, window) if isinstance(window, int) else window
        if self.window is not None and min(self.window) < MIN_SIZE:
            raise ConfigError(f"window {window}: expected at least {MIN_SIZE}, the network's largest stride")
        self.flip, self.overlap, self.preset, self.amp = flip, overlap, preset, amp
        self.window_weight, self.batch, self.bucket = window_weight, batch, bucket
        self.graphs, self.graph_cache_bytes, self.compile = graphs, graph_cache_bytes, compile
        self.model = model if device is None else model.to(device)
        self._lock = threading.RLock()  # of what is made at the first call
        self.refresh()

    def refresh(self) -> None:
        """Takes the model's weights as they are now."""
        self._network: FusedDFN | None = None
        self._border_network: FusedDFN | None = None
        self._compiled: Any = None
        self._cache: GraphCache | None = None
        self._tile_bytes: dict[tuple[int, ...], int] = {}

    @overload
    def __call__(self, image: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, image: list[np.ndarray]) -> list[np.ndarray]: ...
    @overload
    def __call__(self, image: Tensor) -> Tensor: ...

    @torch.inference_mode()
    def __call__(self, image):
        """RGB uint8 ``[H, W, 3]`` -> class ids uint8 ``[H, W]``; a list of such arrays, of any sizes -> a list.

        A tensor ``[H, W, 3]`` or ``[B, H, W, 3]`` -> a tensor ``[H, W]`` or ``[B, H, W]`` on the network's device; the
        host does not wait for it, and scores that are not finite, which are an error otherwise, pass unseen there.
        Raises :class:`UserError` where the network's scores are not finite, or memory does not suffice.
        """
        if isinstance(image, Tensor):
            check_image(image[0] if image.ndim == 4 and len(image) else image)
            batch = image if image.ndim == 4 else image[None]
            with memory_advice(batch.shape[1:3]):
                labels, _ = self._labels(batch.to(self.device))
            return labels if image.ndim == 4 else labels[0]
        images = image if isinstance(image, list) else [image]
        for x in images:
            check_image(x)
        found: dict[int, np.ndarray] = {}
        for size in dict.fromkeys(x.shape for x in images):
            places = [i for i, x in enumerate(images) if x.shape == size]
            limit = self.batch or (MOST_AT_ONCE if self.device.type == "cuda" else 1)
            for group in range(0, len(places), limit):
                at = places[group : group + limit]
                found.update(zip(at, self._from_arrays([images[i] for i in at]), strict=True))
        result = [found[i] for i in range(len(images))]
        return result if isinstance(image, list) else result[0]

    def _from_arrays(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Labels of images of one size: one upload, one download."""
        with memory_advice(images[0].shape[:2]):
            labels, finite = self._labels(self._upload(images))
            flat = torch.cat([labels.flatten(), finite[None].to(torch.uint8)]).cpu().numpy()
        if not flat[-1]:
            raise UserError(NOT_FINITE)
        return list(flat[:-1].reshape(labels.shape))

    @torch.inference_mode()
    def probabilities(self, image: np.ndarray) -> Tensor:
        """``[H, W, 3]`` RGB uint8 -> ``[K, H, W]`` float32 on the model's device; they add up to 1 at each pixel.

        Raises :class:`UserError` where the network's scores are not finite, or memory does not suffice.
        """
        check_image(image)
        with memory_advice(image.shape[:2]):
            x = self._upload([image])
            self._decide_precision(x)
            if self.window is None:
                maps, flipped = self._maps(x)
                total = multiscale_argmax(maps, image.shape[:2], flipped=flipped, return_scores=True)[1][0]
            else:
                total = torch.cat(list(self._bands(x)), 1)
                # The sum is a constant for "mean". Products of torchseg's can all be too small for the dtype.
                total /= total.sum(0).clamp(min=torch.finfo(total.dtype).tiny)
        if not torch.isfinite(total).all():
            raise UserError(NOT_FINITE)
        return total.float()

    @torch.inference_mode()
    def border(self, image: np.ndarray) -> np.ndarray:
        """``[H, W, 3]`` RGB uint8 -> ``[H, W]`` float32: probability of a border, at scale 1 and without mirroring."""
        if not getattr(self.model, "has_border", getattr(self.model, "return_border", False)):
            raise ConfigError("this network was built without a Border Network; leave out --border")
        check_image(image)
        size = image.shape[0], image.shape[1]
        with memory_advice(size):
            x = self._upload([image])
            self._decide_precision(x)
            if self._border_network is None:
                self._border_network = self._fused(return_border=True)
            network = self._border_network

            def scores_of(data: Tensor) -> Tensor:
                return network.border_scores(network.stages(data))

            x = resize_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype=network.dtype)
            source = self._source(x, scores_of, flip=False)
            rows = resized_rows(source.rows, source.size, 0, size[0], size, like=source.like)
        return torch.sigmoid(rows[0, 0]).float().cpu().numpy()

    @property
    def device(self) -> torch.device:
        return self.model.device if isinstance(self.model, FusedDFN) else next(self.model.parameters()).device

    @property
    def network(self) -> FusedDFN:
        """The fused network, made when it is first needed."""
        with self._lock:
            if self._network is None:
                self._network = self._fused()
            return self._network

    def _fused(self, *, return_border: bool = False) -> FusedDFN:
        if isinstance(self.model, FusedDFN):
            return self.model
        dtype = None if self.amp == "auto" else AMP_DTYPES[self.amp]
        return FusedDFN(self.model, return_border=return_border, dtype=dtype, plain=self.compile)

    def settings(self) -> dict[str, Any]:
        """The arguments that decide the result, as plain values for JSON."""
        return {
            "scales": list(self.scales),
            "flip": self.flip,
            "window": self.window and list(self.window),
            "overlap": self.window and self.overlap,
            "window_weight": self.window and self.window_weight,
            "preset": self.preset,
            "amp": self.amp,
            "bucket": self.bucket,
        }

    def describe(self) -> str:
        """Scales, flip and window in words: what a number that came from this predictor must name."""
        window = "whole image"
        if self.window is not None:
            window = f"window {self.window[0]}x{self.window[1]} overlap {self.overlap:.2f}"
            window += f" {self.window_weight}" if self.window_weight != "count" else ""
        scales = f"scale{'s' if len(self.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in self.scales)}"
        rest = ", torchseg preset" if self.preset == "torchseg" else ""
        rest += f", {self.amp}" if self.amp not in ("off", "auto") else ""
        rest += f", padded to multiples of {self.bucket}" if self.bucket else ""
        return f"{scales}, {'flip' if self.flip else 'no flip'}, {window}{rest}"

    def warm_up(self, sizes: Sequence[tuple[int, int]], batch: int = 1) -> None:
        """Prepares for images of ``sizes`` (height, width), the largest first, where a size has a graph of its own."""
        sizes = [bucketed(size, self.bucket) if self.bucket else size for size in sizes]
        self._decide_precision()
        cache = self._graphs()
        if cache is not None:
            cache.warm_up([(batch, *size, 3) for size in dict.fromkeys(sizes)])

    def _upload(self, images: list[np.ndarray]) -> Tensor:
        x = torch.from_numpy(np.stack(images))
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, H, W, 3]`` on the device -> labels ``[B, H, W]``, and whether all scores were finite."""
        height, width = images.shape[1:3]
        if self.bucket:
            images = pad_corner(images, bucketed((height, width), self.bucket))
        self._decide_precision(images)
        cache = self._graphs()
        flat = self._run(images) if cache is None else cache(images)
        labels = flat[:-1].view(images.shape[:3])
        return labels[:, :height, :width], flat[-1]

    def _run(self, images: Tensor) -> Tensor:
        """Labels as one row of bytes, and behind them 1 where all scores were finite: one tensor to bring home."""
        if self.window is None:
            maps, flipped = self._maps(images)
            labels = multiscale_argmax(maps, images.shape[1:3], flipped=flipped)
            finite = torch.stack([x.isfinite().all() for x in maps]).all()
        else:
            bands = [(x.argmax(0).to(torch.uint8), x.isfinite().all()) for i in images for x in self._bands(i[None])]
            labels, finite = torch.cat([band for band, _ in bands]), torch.stack([good for _, good in bands]).all()
        return torch.cat([labels.flatten(), finite[None].to(torch.uint8)])

    def _graphs(self) -> GraphCache | None:
        """The graphs of whole images, where there are to be any."""
        if not self._wants_graphs():
            return None
        if self._cache is None:
            self._cache = GraphCache(self._run, limit_bytes=self.graph_cache_bytes, graphs=CudaGraphs(self.device))
        return self._cache

    def _wants_graphs(self) -> bool:
        return self.device.type == "cuda" and self.graphs and self.window is None

    def _decide_precision(self, images: Tensor | None = None) -> None:
        """Ends ``amp="auto"``; on a CPU it takes uint8 images ``[B, H, W, 3]`` to tell, and waits for some."""
        with self._lock:
            if self.amp != "auto":
                return
            if isinstance(self.model, FusedDFN) or next(self.model.parameters()).dtype != torch.float32:
                self.amp = "off"
            elif self.device.type == "cuda":
                self._take("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off")
            elif not has_bf16_arithmetic():
                self.amp = "off"
            elif images is not None:
                self.amp = "off"
                exact = self._run(images)
                self._take("bf16")
                share = (self._run(images) == exact)[:-1].float().mean().item()
                if share < AGREEMENT:
                    self._take("off")

    def _take(self, amp: str) -> None:
        """Changes the precision, with networks to be made anew."""
        self.amp = amp
        self._network = self._border_network = self._compiled = None

    def _maps(self, images: Tensor) -> tuple[list[Tensor], list[bool]]:
        """The small score maps of all scales, each of the images and with flip of their mirror images."""
        maps, flipped = [], []
        for scale in self.scales:
            x = self._input(images, scale, self.flip)
            size, inside = (x.shape[2], x.shape[3]), None
            if min(size) < MIN_SIZE:
                x, inside = pad_centred(x, (MIN_SIZE, MIN_SIZE))
            scores = self._scores(x)
            if inside is not None:
                scores = resize(at_least_float32(scores), x.shape[2:])[inside]
            halves = scores.split(len(images))
            maps += halves
            flipped += [False, True][: len(halves)]
        return maps, flipped

    def _scaled_size(self, size: Sequence[int], scale: float) -> tuple[int, int]:
        height, width = (max(round(scale * side), min(MIN_SIZE, side)) for side in size)
        return height, width

    def _input(self, images: Tensor, scale: float, flip: bool = False) -> Tensor:
        """The scaled images, normalised, ``[B, 3, h, w]``, with ``flip`` their mirror images as a second half."""
        size = self._scaled_size(images.shape[1:3], scale)
        return resize_normalize(images, size, IMAGENET_MEAN, IMAGENET_STD, flip=flip, dtype=self.network.dtype)

    def _scores(self, x: Tensor) -> Tensor:
        """Stride-4 scores of normalised images ``[B, 3, h, w]``; half as many at a time where memory ends."""
        network = self.network
        if self.compile and self._compiled is None:
            options = inductor_options(freezing=x.device.type == "cpu")
            self._compiled = torch.compile(network.scores, options=options)
        try:
            return self._compiled(x) if self.compile else network.scores(x)
        except RuntimeError as error:
            if len(x) == 1 or not out_of_memory(error) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                raise
        return torch.cat([self._scores(half) for half in x.chunk(2)])

    def _bands(self, image: Tensor) -> Iterator[Tensor]:
        """Sums over scales of uint8 ``[1, H, W, 3]``, from the top, ``[K, rows, W]`` at a time: with ``"mean"``
        probabilities, with ``"torchseg"`` what it adds up."""
        size = (image.shape[1], image.shape[2])
        sources = [
            self._torchseg(image, s) if self.preset == "torchseg" else self._windowed(image, s) for s in self.scales
        ]
        rows = max(BAND_BYTES // (4 * self.network.num_classes * size[1] * (2 if self.flip else 1)), 1)
        for begin in range(0, size[0], rows):
            end = min(begin + rows, size[0])
            total: Tensor | None = None
            for source in sources:
                x = resized_rows(
                    source.rows, source.size, begin, end, size, align_corners=source.align_corners, like=source.like
                )
                x = x[0] if self.preset == "torchseg" else torch.softmax(x, dim=1).mean(0) / len(sources)
                total = x if total is None else total + x
            assert total is not None
            yield total

    def _windowed(self, image: Tensor, scale: float) -> WholeScores | WindowScores | Cropped:
        return self._source(self._input(image, scale), self._scores, self.flip)

    def _source(self, x: Tensor, network: Any, flip: bool) -> WholeScores | WindowScores | Cropped:
        """The scores of a scaled image ``[1, 3, h, w]``, in windows where it does not fit into one."""
        inside = None
        if min(x.shape[2:]) < MIN_SIZE:
            x, inside = pad_centred(x, (MIN_SIZE, MIN_SIZE))
        window = tuple(min(a, b) for a, b in zip(self.window or x.shape[2:], x.shape[2:], strict=True))
        height, width = (max(side, MIN_SIZE) for side in window)
        if (height, width) == x.shape[2:]:
            scores = network(torch.cat([x, x.flip(3)]) if flip else x)
            scores = torch.stack([scores[0], scores[1].flip(-1)]) if flip else scores
            if inside is None:
                return WholeScores(scores)
            return WholeScores(resize(at_least_float32(scores), x.shape[2:])[inside])
        source = WindowScores(
            network,
            x,
            (height, width),
            self.overlap,
            flip=flip,
            batch=self._tiles_at_once(x, (height, width)),
            weight=self.window_weight,
        )
        return source if inside is None else Cropped(source, inside)

    def _torchseg(self, image: Tensor, scale: float) -> Cropped:
        """The authors' rule at one scale; the image by factor, not by size: another grid where a side was rounded."""
        assert self.window is not None
        scaled = image[0].cpu().numpy()
        if min(round(scale * side) for side in scaled.shape[:2]) > 0:
            scaled = cv2.resize(scaled, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        x = normalize(torch.tensor(scaled, device=image.device).permute(2, 0, 1)[None], self.network.dtype)
        fits = x.shape[2] <= self.window[0] and x.shape[3] <= self.window[1]
        black = None if fits else normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=x.device), x.dtype)
        x, inside = pad_centred(x, self.window, black)
        batch = self._tiles_at_once(x, self.window)
        source = WindowScores(self._scores, x, self.window, self.overlap, flip=self.flip, batch=batch, product=True)
        return Cropped(source, inside)

    def _tiles_at_once(self, x: Tensor, window: tuple[int, int]) -> int:
        """How many tiles a run of the network takes: as given, or as free memory allows after a run with one."""
        if self.batch is not None or x.device.type != "cuda":
            return self.batch or 1
        if window not in self._tile_bytes:
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            self._scores(x[:, :, : window[0], : window[1]])
            self._tile_bytes[window] = max(torch.cuda.max_memory_allocated(x.device) - before, 1)
        kept = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        free = torch.cuda.mem_get_info(x.device)[0] + kept
        each = self._tile_bytes[window] * (2 if self.flip else 1)
        return min(max(int(0.7 * free / each), 1), MOST_AT_ONCE)


NOT_FINITE = "the network's scores are not finite: the checkpoint is damaged, or try --amp off"


def check_image(image: np.ndarray | Tensor) -> None:
    """Raises ValueError for anything but ``[H, W, 3]`` of uint8, not empty."""
    if image.ndim != 3 or image.shape[2] != 3 or str(image.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got an empty one, {list(image.shape)}")


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextlib.contextmanager
def memory_advice(size: Sequence[int]) -> Iterator[None]:
    """Turns an out-of-memory error for an image of ``size`` (height, width) into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"an image of {size[1]}x{size[0]} does not fit into memory; use --window 512, smaller "
            "--scales or --amp bf16"
        ) from error
