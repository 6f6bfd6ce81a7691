"""From images to labels: several scales, mirror images, windows; as one graph on a GPU.

The layers from top to bottom: ``settings`` defines the result and its arguments; ``Predictor`` uploads the image and
chooses precision and graphs; ``combine`` scales it, cuts it into windows and combines the scores; ``engine`` runs
the fused network (:class:`~dfn_fast.network.fused.FusedDFN`). Whole images take one upload of uint8, one
:func:`~dfn_kernels.multiscale_argmax` over all scales and one download of labels.
"""

import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfn_fast.data.normalize import IMAGENET_MEAN, IMAGENET_STD
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference.combine import bands, small_maps, source
from dfn_fast.inference.engine import AMPS, MOST_AT_ONCE, Engine, memory_advice
from dfn_fast.inference.padding import bucketed, pad_corner
from dfn_fast.inference.settings import MAX_BATCH, Settings, require_choice, require_positive
from dfn_fast.inference.windows import resized_rows
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.forks import first_call, use_one_thread_in_a_child
from dfn_fast.runtime.graph_cache import CudaGraphs, GraphCache
from dfn_kernels import multiscale_argmax, resize_normalize
from dfn_kernels.common.cpu import has_bf16_arithmetic

Picture = np.ndarray | Image.Image  # RGB uint8 [H, W, 3], or of mode RGB
MAX_GRAPH_CACHE = 1 << 50  # bytes
AGREEMENT = 0.999  # share of the first image's labels that must be the same in bf16, for "auto" on a CPU
NOT_FINITE = "the network's scores are not finite: the checkpoint is damaged, or try --amp off"


class Predictor:
    """Segments images of any size: ``predictor(image)`` is the label map.

    Args:
        model: a ReferenceDFN or FastDFN, which is moved to ``device`` and otherwise left as it is, or a FusedDFN. Later
            changes of the model's weights are seen after :meth:`refresh`.
        scales: factors of the image's size, each side rounded; a side is not made smaller than 32.
        flip: also averages over the mirrored image.
        window: side or (height, width) of the tiles that the scaled image is cut into; None: the image as a whole.
            Tiles cover the image, the last ones flush with its edge; a side longer than the image is cut to it.
        overlap: the least share of a tile that the next one covers too.
        window_weight: ``"count"``: tiles that hold a pixel count alike; ``"gaussian"``: less towards their edges.
        batch: images of one size, or tiles, in one run of the network; None: 1 on a CPU, on CUDA as many as free memory
            allows. If memory still runs out, half as many.
        rule: ``"mean"`` or ``"torchseg"``: how scores of scales and tiles become one, see
            :mod:`dfn_fast.inference.settings`.
        device: defaults to the model's own.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``: the precision of the network, not of what follows it. ``"auto"``: bf16
            on CUDA; on a CPU with bf16 arithmetic too, unless it changes more than one label in a thousand of the first
            image.
        compile: runs the network through torch.compile: half a minute for each size, then faster.
        graphs: on CUDA, runs each size of whole images that comes three times, or was warmed up, as one CUDA graph.
        graph_cache_bytes: the most that the graphs of all sizes may take together; None: a quarter of the device's
            memory that is free when the first one is captured.
        bucket: pads images to multiples of this at the bottom and right, and cuts the labels out again: fewer sizes,
            fewer graphs, slightly other labels.
        preset: an older name of ``rule``.

    An image smaller than 32 is padded all round with the mean colour and its scores cut out again. Raises
    :class:`ConfigError` for an argument that is out of range.
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
        rule: str = "mean",
        device: torch.device | str | None = None,
        amp: str = "auto",
        compile: bool = False,  # noqa: A002  torch's own word for it
        graphs: bool = True,
        graph_cache_bytes: int | None = None,
        bucket: int | None = None,
        preset: str | None = None,
    ):
        if preset is not None:
            if rule not in ("mean", preset):
                raise ConfigError(f"rule {rule!r} and preset {preset!r}: preset is an older name of rule; give one")
            rule = preset
        require_choice("amp", amp, AMPS)
        require_positive("batch", batch, MAX_BATCH)
        require_positive("graph_cache_bytes", graph_cache_bytes, MAX_GRAPH_CACHE)
        sides = (window, window) if isinstance(window, int) else window
        factors = tuple(float(scale) for scale in scales)
        self._settings = Settings(factors, flip, sides, overlap, window_weight, rule, bucket)
        self.model = model if device is None else model.to(device)
        self.batch, self.graphs, self.graph_cache_bytes = batch, graphs, graph_cache_bytes
        self.engine = Engine(self.model, amp, compile, batch)
        self._cache: GraphCache | None = None

    def refresh(self) -> None:
        """Takes the model's weights as they are now."""
        self.engine.refresh()
        self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}  # captured again when needed: graphs belong to their process

    @overload
    def __call__(self, image: Picture) -> np.ndarray: ...
    @overload
    def __call__(self, image: list[Picture]) -> list[np.ndarray]: ...
    @overload
    def __call__(self, image: Tensor) -> Tensor: ...

    @torch.inference_mode()
    def __call__(self, image):
        """RGB uint8 ``[H, W, 3]`` -> class ids uint8 ``[H, W]``; a list of such arrays, of any sizes -> a list.

        A PIL image of mode RGB is taken as its array is, whatever its EXIF orientation says. A tensor ``[H, W, 3]`` or
        ``[B, H, W, 3]`` -> a tensor ``[H, W]`` or ``[B, H, W]`` on the network's device; the host does not wait for it,
        so scores that are not finite are not reported there. Raises :class:`UserError` if the network's scores are not
        finite, or if memory runs out.
        """
        if isinstance(image, Tensor):
            _check_image(image[0] if image.ndim == 4 and len(image) else image)
            batch = image if image.ndim == 4 else image[None]
            with memory_advice(batch.shape[1:3]):
                labels, _ = self._labels(batch.to(self.device))
            return labels if image.ndim == 4 else labels[0]
        images = [_array(x) for x in (image if isinstance(image, list) else [image])]
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
    def probabilities(self, image: Picture) -> Tensor:
        """``[H, W, 3]`` RGB uint8 -> ``[K, H, W]`` float32 on the model's device; they add up to 1 at each pixel.

        Raises :class:`UserError` if the network's scores are not finite, or if memory runs out.
        """
        array = _array(image)
        with memory_advice(array.shape[:2]):
            x = self._upload([array])
            self._decide_precision(x)
            if self._settings.window is None:
                maps, flipped = small_maps(self.engine, self._settings, x)
                total = multiscale_argmax(maps, array.shape[:2], flipped=flipped, return_scores=True)[1][0]
            else:
                total = torch.cat(list(bands(self.engine, self._settings, x)), 1)
                # The sum is a constant for "mean". Products of torchseg's can all be too small for the dtype.
                total /= total.sum(0).clamp(min=torch.finfo(total.dtype).tiny)
        if not torch.isfinite(total).all():
            raise UserError(NOT_FINITE)
        return total.float()

    @torch.inference_mode()
    def border(self, image: Picture) -> np.ndarray:
        """``[H, W, 3]`` RGB uint8 -> ``[H, W]`` float32: probability of a border, at scale 1 and without mirroring."""
        if not getattr(self.model, "has_border", getattr(self.model, "return_border", False)):
            raise ConfigError("this network was built without a Border Network; leave out --border")
        array = _array(image)
        size = array.shape[0], array.shape[1]
        with memory_advice(size):
            x = self._upload([array])
            self._decide_precision(x)
            dtype = self.engine.border_network.dtype
            x = resize_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype=dtype)
            scores = source(self.engine, self._settings, x, self.engine.border_scores, flip=False)
            rows = resized_rows(scores.rows, scores.size, 0, size[0], size, like=scores.like)
        return torch.sigmoid(rows[0, 0]).float().cpu().numpy()

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def amp(self) -> str:
        """The precision of the network; ``"auto"`` until the first image has decided it."""
        return self.engine.amp

    @property
    def network(self) -> FusedDFN:
        """The fused network, made when it is first needed."""
        return self.engine.network

    def settings(self) -> dict[str, Any]:
        """The arguments that decide the result, as plain values for JSON."""
        return {**self._settings.to_dict(), "amp": self.amp}

    def describe(self) -> str:
        """Scales, flip and window in words, to be reported with every number from this predictor."""
        return self._settings.describe(self.amp)

    def warm_up(self, sizes: Sequence[tuple[int, int]], batch: int = 1) -> None:
        """Prepares for images of ``sizes`` (height, width), the largest first, if a size has a graph of its own."""
        bucket = self._settings.bucket
        sizes = [bucketed(size, bucket) if bucket else size for size in sizes]
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
        if self._settings.bucket:
            images = pad_corner(images, bucketed((height, width), self._settings.bucket))
        flat = self._decide_precision(images)
        if flat is None:
            cache = self._graphs()
            flat = self._run(images) if cache is None else cache(images)
        labels = flat[:-1].view(images.shape[:3])
        return labels[:, :height, :width], flat[-1]

    def _run(self, images: Tensor) -> Tensor:
        """Labels as one row of bytes, and behind them 1 if all scores were finite: one tensor to download."""
        if self._settings.window is None:
            maps, flipped = small_maps(self.engine, self._settings, images)
            labels = multiscale_argmax(maps, images.shape[1:3], flipped=flipped)
            finite = torch.stack([x.isfinite().all() for x in maps]).all()
        else:
            rows = (x for image in images for x in bands(self.engine, self._settings, image[None]))
            found = [(x.argmax(0).to(torch.uint8), x.isfinite().all()) for x in rows]
            labels, finite = torch.cat([band for band, _ in found]), torch.stack([good for _, good in found]).all()
        return torch.cat([labels.flatten(), finite[None].to(torch.uint8)])

    def _graphs(self) -> GraphCache | None:
        """The graphs of whole images, if there are to be any."""
        if not self._wants_graphs():
            return None
        with first_call():
            if self._cache is None:
                self._cache = GraphCache(self._run, limit_bytes=self.graph_cache_bytes, graphs=CudaGraphs(self.device))
            return self._cache

    def _wants_graphs(self) -> bool:
        return self.device.type == "cuda" and self.graphs and self._settings.window is None

    def _decide_precision(self, images: Tensor | None = None) -> Tensor | None:
        """Resolves ``amp="auto"``. On a CPU this compares labels, so it waits for the first images.

        Returns what :meth:`_run` gives for ``images`` in the precision chosen, if that was computed to choose it.
        """
        use_one_thread_in_a_child()
        engine = self.engine
        if engine.amp != "auto":
            return None
        with first_call():
            if engine.amp != "auto":  # another thread has decided meanwhile
                return None
            if isinstance(self.model, FusedDFN) or next(self.model.parameters()).dtype != torch.float32:
                engine.amp = "off"
            elif engine.device.type == "cuda":
                engine.use("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off")
            elif not has_bf16_arithmetic():
                engine.amp = "off"
            elif images is not None:
                engine.amp = "off"
                exact = self._run(images)
                engine.use("bf16")
                rounded = self._run(images)
                if (rounded == exact)[:-1].float().mean().item() >= AGREEMENT:
                    return rounded
                engine.use("off")
                return exact
        return None


def _array(image: Picture) -> np.ndarray:
    """The array of a picture. Raises ValueError for anything that is not an RGB image of uint8."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"expected a PIL image of mode RGB, got {image.mode}; convert it: image.convert('RGB')")
        image = np.asarray(image)
    if not isinstance(image, np.ndarray):
        what = type(image).__name__
        if image is None:
            what += "; cv2.imread returns None for a file that it cannot read"
        elif isinstance(image, str | os.PathLike):
            what += f" {str(image)!r}; read the file first"
        elif isinstance(image, tuple):
            what += "; give several images as a list"
        raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got {what}")
    _check_image(image)
    return image


def _check_image(image: np.ndarray | Tensor) -> None:
    """Raises ValueError for anything but ``[H, W, 3]`` of uint8, not empty."""
    if image.ndim != 3 or image.shape[2] != 3 or str(image.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"expected an RGB image [H, W, 3] of uint8, got an empty one, {list(image.shape)}")
