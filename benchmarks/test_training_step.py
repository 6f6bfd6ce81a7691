"""A training step, forward, backward and optimiser: the plain network against ours, from the same weights.

``pytest benchmarks/test_training_step.py --benchmark-only [-k synthetic] [--benchmark-json FILE]``. ``eager`` is
``ReferenceDFN`` as its users run it (channels_last, and autocast in bf16), ``compile`` the same compiled, ``ours``
``FastDFN`` as ``dfn_fast.train`` runs it; ``float32`` is the reference in eager float32 without channels_last, the 1 of
all ratios. On a GPU DFN-R18, R50 and R101 at 512 x 512, batch 32; on a CPU the default recipe and DFN-R50 at
2 x 128 x 128. Memory is what a step allocates beyond weights and momentum, with its gradients and without.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.figures import Turns, Work
from benchmarks.measure import DEVICE
from benchmarks.roofline import Network
from dfn_fast import FastDFN, ReferenceDFN
from dfn_fast.config import TrainConfig, recipe
from dfn_fast.data.loader import Batch
from dfn_fast.trainer.trainer import Trainer

pytestmark = [pytest.mark.timeout(1800), pytest.mark.training, pytest.mark.usefixtures("cudnn_by_trial")]
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
        self.turns = Turns()
        self.expected: float | None = None
        self.reference = "float32"  # whose first loss is expected

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
            model = network(self.shape.num_classes, alpha=config.border_weight, **config.network_arguments())
            self.trainers[implementation] = Trainer(model, config, 10**6, DEVICE)
        return self.trainers[implementation]

    def run(self, implementation: str) -> torch.Tensor:
        """One step."""
        return self.trainer(implementation).step([self.batch], 0)

    def check(self, implementation: str) -> None:
        """Raises AssertionError unless the first step's loss is that of the reference in float32, or where that does
        not fit into memory, of the next one that does."""
        while self.expected is None:
            try:
                self.expected = self.run(self.reference).item()
            except torch.OutOfMemoryError:
                self.trainers.pop(self.reference, None)
                if self.reference == implementation:
                    raise
                self.reference = IMPLEMENTATIONS[IMPLEMENTATIONS.index(self.reference) + 1]
        loss = self.run(implementation).item() if implementation != self.reference else self.expected
        allowed = TOLERANCE["off" if implementation == "float32" else self.amp] * abs(self.expected)
        assert abs(loss - self.expected) <= allowed, f"{self.name}, {implementation}: {loss}, expected {self.expected}"

    def work(self, implementation: str) -> Work:
        """Forward, backward and update, the last without a count: operations and bytes of the convolutions."""
        config, K = self.shape.config, self.shape.num_classes
        names = ("backbone", "stem", "channels", "border_channels")
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        settings |= {"batch": config.batch_size, "num_classes": K, "border": True, "one_head": False}
        height, width = config.crop
        written, least = (Network(height=height, width=width, **settings, savings=saved) for saved in (False, True))
        dtype = torch.float32 if implementation == "float32" or self.amp == "off" else torch.bfloat16
        run = least if implementation == "ours" else written
        work = Work.of_networks([run], [least], dtype, training=True)
        return dataclasses.replace(work, images=config.batch_size)

    def gradient_bytes(self, implementation: str) -> int:
        return sum(p.nbytes for p in self.trainer(implementation).model.parameters())


def trials() -> Iterator[Any]:
    for shape in shapes():
        for amp in ("off", "bf16") if measure.HAS_BF16 else ("off",):
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
    benchmark.extra_info.update(
        peak_memory_bytes=measure.peak_memory(call, warm=True),
        gradient_bytes=trial.gradient_bytes(implementation),
        held_after_forward_bytes=held_after_forward(trial, implementation),
    )
    trial.turns.add(implementation, call, trial.work(implementation), benchmark.extra_info)
    if implementation == "ours":
        trial.turns.time(benchmark.stats.stats.median, least=9)
        notes.append(line(trial))


def held_after_forward(trial: TrainingTrial, implementation: str) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    trainer = trial.trainer(implementation)

    def forward() -> torch.Tensor:
        trainer.model.train()
        with trainer.autocast():
            return trainer.loss(*trial.batch[:3])

    return measure.held_memory(forward)


def line(trial: TrainingTrial) -> str:
    """The row that the summary shows."""
    rows = trial.turns.rows
    ours, eager = rows["ours"], rows.get("eager", rows["ours"])
    speed_ups = ", ".join(f"{ours[f'speed_up_over_{name}']:.2f} x {name}" for name in rows if name != "ours")
    memory, held = (ours[name] / eager[name] for name in ("peak_memory_bytes", "held_after_forward_bytes"))
    activations, theirs = (row["peak_memory_bytes"] - row["gradient_bytes"] for row in (ours, eager))
    return (
        f"{trial.name}: ours {ours['median_ms']:.1f} ms, {ours['images_per_s']:.1f} images/s, "
        f"{ours['share_of_floor']:.0%} of the floor's speed, {speed_ups or 'alone'}; "
        f"peak memory {memory:.2f} x eager's ({activations / theirs:.2f} x without gradients), "
        f"held after forward {held:.2f} x"
    )
