"""Inference from uint8 images to labels: the plain network against ours, from the same weights.

``pytest benchmarks/test_inference.py --benchmark-only [-k scales] [--benchmark-json FILE]``. ``float32`` is
``ReferenceDFN`` in eager float32, the 1 of all ratios; ``eager`` the same in channels_last and the precision of the
row; ``compile`` that compiled (``max-autotune`` on a GPU, frozen weights on a CPU); ``ours`` the ``Predictor``. With
several scales ``eager`` is the direct loop: ``cv2.resize``, the network and a resize for each scale and mirror image.
On a GPU DFN-R101 at 512 x 512 with batch 1 and 16 and at 1024 x 2048; on a CPU at 256 x 256, batch 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import DEVICE
from dfn_fast import Predictor, ReferenceDFN
from dfn_fast.data.transforms import normalize

pytestmark = [pytest.mark.timeout(1800), pytest.mark.inference]
IMPLEMENTATIONS = ("float32", "eager", "compile", "ours")
SCALES = (0.5, 0.75, 1.0, 1.5, 1.75)
NUM_CLASSES = 21
SHORTFALL = 2e-2  # of the range of the log-probabilities: what a label may be worse than the best one


@dataclasses.dataclass(frozen=True)
class Shape:
    """Which images, and how they are segmented."""

    batch: int
    height: int
    width: int
    scales: tuple[float, ...] = (1.0,)
    window: int | None = None
    backbone: str = "resnet101"

    @property
    def name(self) -> str:
        how = f" {len(self.scales)} scales flip" if len(self.scales) > 1 else ""
        how += f" window {self.window}" if self.window else ""
        return f"DFN-R{self.backbone[6:]} {self.batch}x{self.height}x{self.width}{how}"


def shapes() -> Iterator[Shape]:
    if DEVICE.type == "cuda":
        yield from (Shape(1, 512, 512), Shape(16, 512, 512), Shape(1, 1024, 2048))
        yield from (
            Shape(1, 512, 512, SCALES),
            Shape(1, 4096, 4096, window=512),
            Shape(1, 512, 512, backbone="resnet18"),
        )
        return
    yield from (Shape(1, 256, 256), Shape(1, 360, 480, SCALES), Shape(1, 512, 512, window=256, backbone="resnet18"))


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
        self.name = f"{shape.name} {str(dtype).removeprefix('torch.')}"
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (shape.batch, shape.height // 8, shape.width // 8, 3), np.uint8)
        self.images = [cv2.resize(image, (shape.width, shape.height)) for image in coarse]
        self.functions: dict[str, Callable[[], np.ndarray]] = {}
        self.expected: Tensor | None = None

    def function(self, implementation: str) -> Callable[[], np.ndarray]:
        if implementation not in self.functions:
            make = self._ours if implementation == "ours" else self._theirs
            self.functions[implementation] = torch.inference_mode()(make(implementation))
        return self.functions[implementation]

    def _ours(self, implementation: str) -> Callable[[], np.ndarray]:
        amp = {torch.float32: "off", torch.bfloat16: "bf16"}[self.dtype]
        shape = self.shape
        settings: dict[str, Any] = {"scales": shape.scales, "flip": len(shape.scales) > 1, "window": shape.window}
        predictor = Predictor(network(shape.backbone), amp=amp, batch=None if shape.window else shape.batch, **settings)
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
            mode = None if DEVICE.type == "cpu" else "max-autotune"
            model = torch.compile(model, options=options, mode=mode, dynamic=False)

        def probabilities(images: list[np.ndarray]) -> Tensor:
            x = torch.from_numpy(np.stack(images)).to(DEVICE).permute(0, 3, 1, 2)
            return model(normalize(x).to(dtype, memory_format=layout)).float().exp()

        def labels() -> np.ndarray:
            total = torch.zeros((), device=DEVICE)
            for scale in self.shape.scales:
                size = round(scale * self.shape.width), round(scale * self.shape.height)
                scaled = self.images if scale == 1 else [cv2.resize(image, size) for image in self.images]
                for mirrored in (False, True)[: 2 if len(self.shape.scales) > 1 else 1]:
                    p = probabilities([np.ascontiguousarray(x[:, ::-1]) for x in scaled] if mirrored else scaled)
                    p = p.flip(3) if mirrored else p
                    full = (self.shape.height, self.shape.width)
                    total = total + (p if scale == 1 else F.interpolate(p, full, mode="bilinear", align_corners=True))
            self.probabilities = total
            return total.argmax(1).to(torch.uint8).cpu().numpy()

        return labels

    def check(self, implementation: str) -> None:
        """Raises AssertionError where a label is worse, in the reference's eyes, than rounding explains."""
        labels = torch.from_numpy(self.function(implementation)().astype(np.int64)).to(DEVICE)
        if self.expected is None:
            self.function("float32")()
            self.expected = (self.probabilities / self.probabilities.sum(1, keepdim=True)).log()
        chosen = self.expected.gather(1, labels[:, None])[:, 0]
        short = (self.expected.amax(1) - chosen).flatten()
        worse = short[:: max(len(short) >> 22, 1)].quantile(0.99)  # which takes 2^24 numbers at the most
        allowed = SHORTFALL * (self.expected.max() - self.expected.min())
        assert worse <= allowed, (
            f"{self.name}, {implementation}: labels fall short by {worse:.3g}, allowed {allowed:.3g}"
        )


def trials() -> Iterator[Any]:
    for shape in shapes():
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape.name} {str(dtype).removeprefix('torch.')}".replace(" ", "-")
            yield pytest.param((shape, dtype), id=name)


@pytest.fixture(scope="module", params=trials())
def trial(request: pytest.FixtureRequest) -> InferenceTrial:
    return InferenceTrial(*request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inference(trial, implementation, benchmark, notes):
    several = len(trial.shape.scales) > 1
    if trial.shape.window is not None and implementation in ("eager", "compile"):
        pytest.skip("nothing plain cuts images into windows; the whole image is the float32 row")
    if implementation == "compile" and several:
        pytest.skip("compiles for minutes, once for each size")
    trial.check(implementation)
    call = trial.function(implementation)
    benchmark.group = trial.name
    benchmark.pedantic(lambda: (call(), measure.synchronize()), rounds=1 if several else 3, iterations=1)
    info: dict[str, Any] = {} if several else {"peak_memory_bytes": measure.peak_memory(call)}
    if implementation == "ours":
        info |= compare(trial)
        ratios = ", ".join(f"{info[f'speed_up_over_{n}']:.2f} x {n}" for n in trial.functions if n != "ours")
        line = f"{trial.name}: ours {info['ours_ms']:.1f} ms, {info['images_per_s']:.2f} images/s, {ratios}"
        if not several:
            line += f"; peak memory {info['peak_memory_bytes'] / info['float32_memory']:.2f} x float32's"
        notes.append(line)
    benchmark.extra_info.update(info)


def compare(trial: InferenceTrial) -> dict[str, Any]:
    """All implementations in turns: medians, and ratios of ours to each."""
    functions = {name: trial.function(name) for name in trial.functions}
    found: dict[str, Any] = {}
    if len(trial.shape.scales) > 1:  # half a minute a call on a CPU
        seconds = measure.alternate(functions, 2 if DEVICE.type == "cpu" else 10)
    else:
        seconds = measure.alternate(functions, measure.rounds_for(functions["ours"], budget=5.0, least=3, most=30))
        found["float32_memory"] = measure.peak_memory(functions["float32"])
    for name in functions:
        found[f"{name}_ms"] = measure.percentile(seconds[name], 0.5) * 1e3
        found[f"{name}_p20_ms"] = measure.percentile(seconds[name], 0.2) * 1e3
        found[f"{name}_p80_ms"] = measure.percentile(seconds[name], 0.8) * 1e3
        if name != "ours":
            found[f"speed_up_over_{name}"] = 1 / measure.median_ratio(seconds["ours"], seconds[name])
    found["images_per_s"] = trial.shape.batch / found["ours_ms"] * 1e3
    return found
