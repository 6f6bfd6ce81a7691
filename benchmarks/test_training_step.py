"""A training step, forward, backward and optimiser: the plain network against ours, from the same weights.

``pytest benchmarks/test_training_step.py --benchmark-only [-k synthetic] [--benchmark-json FILE]``. ``eager`` is
``ReferenceDFN`` as its users run it (channels_last, and autocast in bf16), ``compile`` the same compiled, ``ours``
``FastDFN`` as ``dfn_fast.train`` runs it; ``float32`` is the reference in eager float32 without channels_last, the 1 of
all ratios. On a GPU DFN-R18, R50 and R101 at 512 x 512, batch 32; on a CPU the default recipe and DFN-R50 at
2 x 128 x 128. Memory is what a step allocates beyond weights and momentum, with its gradients and without.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import DEVICE
from dfn_fast import FastDFN, ReferenceDFN
from dfn_fast.config import TrainConfig, recipe
from dfn_fast.data.loader import Batch
from dfn_fast.training import Trainer

pytestmark = [pytest.mark.timeout(1800), pytest.mark.training]
IMPLEMENTATIONS = ("float32", "eager", "compile", "ours")
TOLERANCE = {"off": 1e-4, "bf16": 2e-2}  # of the loss, relative


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained: a network and its batch."""

    name: str
    config: TrainConfig
    num_classes: int
    compiles: bool = True

    def trial_name(self, amp: str) -> str:
        height, width = self.config.crop
        return f"{self.name} {self.config.batch_size}x{height}x{width} {amp.replace('off', 'float32')}"


def shapes() -> Iterator[Shape]:
    if DEVICE.type == "cuda":
        for depth in ("resnet18", "resnet50", "resnet101"):
            yield Shape(f"DFN-R{depth[6:]}", TrainConfig(backbone=depth), 21)
        return
    yield Shape("synthetic recipe", recipe("synthetic"), 8)
    r50 = TrainConfig(backbone="resnet50", crop=(128, 128), batch_size=2)
    yield Shape("DFN-R50", r50, 21, compiles=False)  # minutes to compile, and slower then than eager


class TrainingTrial:
    """One network, batch and precision; trainers are made when they are first asked for."""

    def __init__(self, shape: Shape, amp: str):
        self.shape, self.amp, self.name = shape, amp, shape.trial_name(amp)
        config = shape.config
        generator = torch.Generator().manual_seed(0)
        size = (config.batch_size, *config.crop)
        images = torch.randint(256, (size[0], *config.crop, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(shape.num_classes, size, dtype=torch.uint8, generator=generator)
        borders = torch.randint(2, size, dtype=torch.uint8, generator=generator)
        tensors = (images.permute(0, 3, 1, 2), labels, borders)
        self.batch = Batch(*(x.to(DEVICE) for x in tensors), names=[])
        self.trainers: dict[str, Trainer] = {}
        self.expected: float | None = None

    def trainer(self, implementation: str) -> Trainer:
        if implementation not in self.trainers:
            plain = implementation == "float32"
            config = dataclasses.replace(
                self.shape.config,
                amp="off" if plain else self.amp,
                channels_last=not plain,
                compile={"float32": False, "eager": False, "compile": True, "ours": None}[implementation],
            )
            torch.manual_seed(0)
            network = FastDFN if implementation == "ours" else ReferenceDFN
            model = network(self.shape.num_classes, alpha=config.border_weight, **config.model_settings())
            self.trainers[implementation] = Trainer(model, config, 10**6, DEVICE)
        return self.trainers[implementation]

    def run(self, implementation: str) -> torch.Tensor:
        """One step."""
        return self.trainer(implementation).step([self.batch], 0)

    def check(self, implementation: str) -> None:
        """Raises AssertionError unless the first step's loss is that of the reference in float32."""
        if self.expected is None:
            self.expected = self.run("float32").item()
        loss = (
            self.trainer(implementation).step([self.batch], 0).item() if implementation != "float32" else self.expected
        )
        allowed = TOLERANCE["off" if implementation == "float32" else self.amp] * abs(self.expected)
        assert abs(loss - self.expected) <= allowed, f"{self.name}, {implementation}: {loss}, expected {self.expected}"

    def gradient_bytes(self, implementation: str) -> int:
        return sum(p.nbytes for p in self.trainer(implementation).model.parameters())


def trials() -> Iterator[Any]:
    for shape in shapes():
        for amp in ("off", "bf16"):
            yield pytest.param((shape, amp), id=shape.trial_name(amp).replace(" ", "-"))


@pytest.fixture(scope="module", params=trials())
def trial(request: pytest.FixtureRequest) -> TrainingTrial:
    """One network at one precision, kept while its implementations run."""
    return TrainingTrial(*request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_step(trial, implementation, benchmark, notes):
    if implementation == "compile" and not trial.shape.compiles:
        pytest.skip("takes minutes to compile on a CPU, and trains slower than eager there")
    trial.check(implementation)
    call = functools.partial(trial.run, implementation)
    benchmark.group = trial.name
    benchmark.pedantic(lambda: (call(), measure.synchronize()), rounds=3, iterations=1, warmup_rounds=1)
    memory = measure.peak_memory(call)
    info: dict[str, Any] = {
        "peak_memory_bytes": memory,
        "gradient_bytes": trial.gradient_bytes(implementation),
        "held_after_forward_bytes": held_after_forward(trial, implementation),
    }
    if implementation == "ours":
        info |= compare(trial)
        notes.append(line(trial, info))
    benchmark.extra_info.update(info)


def held_after_forward(trial: TrainingTrial, implementation: str) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    trainer = trial.trainer(implementation)

    def forward() -> torch.Tensor:
        trainer.model.train()
        with trainer.autocast():
            return trainer.loss(*trial.batch[:3])

    return measure.held_memory(forward)


def compare(trial: TrainingTrial) -> dict[str, Any]:
    """All implementations in turns: medians, and ratios of ours to each."""
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(trial.run, name) for name in trial.trainers}
    seconds = measure.alternate(calls, measure.rounds_for(calls["ours"], budget=5.0, least=9, most=30))
    found: dict[str, Any] = {}
    for name in trial.trainers:
        found[f"{name}_ms"] = measure.percentile(seconds[name], 0.5) * 1e3
        found[f"{name}_p20_ms"] = measure.percentile(seconds[name], 0.2) * 1e3
        found[f"{name}_p80_ms"] = measure.percentile(seconds[name], 0.8) * 1e3
        found[f"{name}_memory"] = measure.peak_memory(calls[name])
        found[f"{name}_held"] = held_after_forward(trial, name)
        if name != "ours":
            found[f"speed_up_over_{name}"] = 1 / measure.median_ratio(seconds["ours"], seconds[name])
    found["images_per_s"] = trial.shape.config.batch_size / found["ours_ms"] * 1e3
    return found


def line(trial: TrainingTrial, info: dict[str, Any]) -> str:
    """The row that the summary shows."""
    speed_ups = ", ".join(f"{info[f'speed_up_over_{n}']:.2f} x {n}" for n in trial.trainers if n != "ours")
    memory, held = (info[f"ours_{what}"] / info[f"eager_{what}"] for what in ("memory", "held"))
    gradients = info["gradient_bytes"]
    activations = (info["ours_memory"] - gradients) / (info["eager_memory"] - gradients)
    return (
        f"{trial.name}: ours {info['ours_ms']:.1f} ms, {info['images_per_s']:.1f} images/s, {speed_ups}; peak memory "
        f"{memory:.2f} x eager's ({activations:.2f} x without gradients), held after forward {held:.2f} x"
    )
