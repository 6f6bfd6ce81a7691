"""One inference task, from uint8 images to labels, as each implementation runs it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import measure
from benchmarks.harness.counting import Network
from benchmarks.harness.figures import Turns, Work
from benchmarks.harness.machine import name_of
from benchmarks.harness.measure import DEVICE
from dfn_fast import Predictor, ReferenceDFN
from dfn_fast.data.normalize import normalize
from dfn_fast.inference.windows import window_starts

SCALES = (0.5, 0.75, 1.0, 1.5, 1.75)
NUM_CLASSES = 21
OVERLAP = 1 / 3  # of neighbouring windows
WINDOWS_AT_ONCE = 1 if DEVICE.type == "cpu" else 8
SHORTFALL = 2e-2  # how far a label may fall below the best one, as a share of the log-probabilities' range


@dataclasses.dataclass(frozen=True)
class Shape:
    """Which images, and how they are segmented."""

    batch: int
    height: int
    width: int
    scales: tuple[float, ...] = (1.0,)
    window: int | None = None
    backbone: str = "resnet101"
    full: bool = True  # only with --full; a GPU runs all

    @property
    def name(self) -> str:
        how = f" {len(self.scales)} scales flip" if len(self.scales) > 1 else ""
        how += f" window {self.window}" if self.window else ""
        return f"DFN-R{self.backbone[6:]} {self.batch}x{self.height}x{self.width}{how}"

    @property
    def mirrored(self) -> tuple[bool, ...]:
        """Whether each pass over a scale sees the mirror image."""
        return (False, True) if len(self.scales) > 1 else (False,)

    def windows(self) -> list[tuple[slice, slice]]:
        """Rows and columns of each window; of the whole image if there are none."""
        sides = [
            [slice(start, start + (self.window or n)) for start in window_starts(n, self.window or n, OVERLAP)]
            for n in (self.height, self.width)
        ]
        return list(itertools.product(*sides))

    def networks(self, **how: bool) -> list[Network]:
        """The networks that one call runs."""
        settings: dict[str, Any] = {"backbone": self.backbone, "num_classes": NUM_CLASSES, **how}
        if self.window:
            batch = self.batch * len(self.windows())
            return [Network(batch=batch, height=self.window, width=self.window, **settings)]
        sizes = [(round(scale * self.height), round(scale * self.width)) for scale in self.scales]
        batch = self.batch * len(self.mirrored)
        return [Network(batch=batch, height=height, width=width, **settings) for height, width in sizes]


def shapes() -> Iterator[Shape]:
    if DEVICE.type == "cuda":
        yield from (Shape(1, 512, 512), Shape(16, 512, 512), Shape(1, 1024, 2048))
        yield from (
            Shape(1, 512, 512, SCALES),
            Shape(1, 4096, 4096, window=512),
            Shape(1, 512, 512, backbone="resnet18"),
        )
        return
    yield Shape(1, 128, 128, backbone="resnet18", full=False)
    yield from (Shape(1, 256, 256), Shape(1, 128, 160, SCALES), Shape(1, 256, 256, window=128, backbone="resnet18"))


@functools.lru_cache(maxsize=1)
def network(backbone: str) -> ReferenceDFN:
    """Random weights, with running statistics that fit them, so that scores are neither tiny nor huge."""
    torch.manual_seed(0)
    model = ReferenceDFN(NUM_CLASSES, backbone=backbone, border=False).to(DEVICE)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    nn.init.normal_(model.smooth_heads[3].conv.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        model.train().scores(torch.randn(2, 3, 128, 128, device=DEVICE))
    return model.eval()


class InferenceTrial:
    """One shape and precision; each implementation is made when it is first asked for, and labels uint8 images."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.name = f"{shape.name} {name_of(dtype)}"
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (shape.batch, shape.height // 8, shape.width // 8, 3), np.uint8)
        self.images = [cv2.resize(image, (shape.width, shape.height)) for image in coarse]
        self.functions: dict[str, Callable[[], np.ndarray]] = {}
        self.turns = Turns()
        self.expected: Tensor | None = None

    def function(self, implementation: str) -> Callable[[], np.ndarray]:
        if implementation not in self.functions:
            make = self._ours if implementation == "ours" else self._theirs
            self.functions[implementation] = torch.inference_mode()(make(implementation))
        return self.functions[implementation]

    def _ours(self, implementation: str) -> Callable[[], np.ndarray]:
        amp = {torch.float32: "off", torch.bfloat16: "bf16"}[self.dtype]
        shape = self.shape
        settings: dict[str, Any] = {"scales": shape.scales, "flip": len(shape.mirrored) > 1}
        settings |= {"window": shape.window, "overlap": OVERLAP} if shape.window else {}
        predictor = Predictor(network(shape.backbone), amp=amp, batch=None if shape.window else shape.batch, **settings)
        predictor.warm_up([(shape.height, shape.width)], shape.batch)
        return lambda: np.stack(predictor(self.images))

    def _theirs(self, implementation: str) -> Callable[[], np.ndarray]:
        plain = implementation == "float32"
        dtype = torch.float32 if plain else self.dtype
        model: Any = ReferenceDFN(NUM_CLASSES, backbone=self.shape.backbone, border=False).to(DEVICE).eval()
        model.load_state_dict(network(self.shape.backbone).state_dict())
        layout = torch.contiguous_format if plain else torch.channels_last
        model.to(dtype).to(memory_format=layout)
        if implementation == "compile":
            options: Any = {"freezing": True} if DEVICE.type == "cpu" else None
            torch._dynamo.reset()
            model = torch.compile(model, options=options, mode=measure.COMPILE_MODE, dynamic=False)

        def log_probabilities(images: list[np.ndarray]) -> Tensor:
            x = torch.from_numpy(np.stack(images)).to(DEVICE).permute(0, 3, 1, 2)
            return model(normalize(x).to(dtype, memory_format=layout)).float()

        def of_scales() -> Tensor:
            shape, total = self.shape, torch.zeros((), device=DEVICE)
            for scale in shape.scales:
                size = round(scale * shape.width), round(scale * shape.height)
                scaled = self.images if scale == 1 else [cv2.resize(image, size) for image in self.images]
                for mirrored in shape.mirrored:
                    images = [np.ascontiguousarray(x[:, ::-1]) for x in scaled] if mirrored else scaled
                    p = log_probabilities(images).exp()
                    p = p.flip(3) if mirrored else p
                    full = (shape.height, shape.width)
                    total = total + (p if scale == 1 else F.interpolate(p, full, mode="bilinear", align_corners=True))
            return (total / total.sum(1, keepdim=True)).log()

        def of_windows() -> Tensor:
            shape, windows = self.shape, self.shape.windows()
            total = torch.zeros(shape.batch, NUM_CLASSES, shape.height, shape.width, device=DEVICE)
            count = torch.zeros(shape.height, shape.width, device=DEVICE)
            for first in range(0, len(windows), WINDOWS_AT_ONCE):
                here = windows[first : first + WINDOWS_AT_ONCE]
                scores = log_probabilities([image[place] for place in here for image in self.images])
                for place, of_place in zip(here, scores.split(shape.batch), strict=True):
                    total[:, :, place[0], place[1]] += of_place
                    count[place] += 1
            return total.div_(count).log_softmax(1)

        def labels() -> np.ndarray:
            self.scores = of_windows() if self.shape.window else of_scales()
            return self.scores.argmax(1).to(torch.uint8).cpu().numpy()

        return labels

    def work(self, implementation: str) -> Work:
        """The work of one call, counting only the network. Theirs runs all four heads, of which one is read."""
        dtype = torch.float32 if implementation == "float32" else self.dtype
        least = self.shape.networks(savings=True)
        run = least if implementation == "ours" else self.shape.networks(one_head=False)
        return dataclasses.replace(Work.of_networks(run, least, dtype), images=self.shape.batch)

    def check(self, implementation: str) -> None:
        """Raises AssertionError if the reference scores a label worse than rounding explains."""
        labels = torch.from_numpy(self.function(implementation)().astype(np.int64)).to(DEVICE)
        if self.expected is None:
            self.function("float32")()
            self.expected = self.scores
        chosen = self.expected.gather(1, labels[:, None])[:, 0]
        short = (self.expected.amax(1) - chosen).flatten()
        worse = short[:: max(len(short) >> 22, 1)].quantile(0.99)  # quantile takes at most 2^24 numbers
        allowed = SHORTFALL * (self.expected.max() - self.expected.min())
        assert worse <= allowed, (
            f"{self.name}, {implementation}: labels fall short by {worse:.3g}, allowed {allowed:.3g}"
        )
