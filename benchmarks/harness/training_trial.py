"""One training step as each implementation runs it, from the same weights."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness.counting import Network
from benchmarks.harness.figures import Turns, Work
from benchmarks.harness.measure import DEVICE
from dfn_fast import FastDFN, ReferenceDFN
from dfn_fast.config import TrainConfig, recipe
from dfn_fast.data.loader import Batch
from dfn_fast.trainer.trainer import Trainer

IMPLEMENTATIONS = ("float32", "eager", "compile", "ours")
TOLERANCE = {"off": 1e-4, "bf16": 2e-2}  # of the loss, relative


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network to train, and its batch."""

    name: str
    config: TrainConfig
    num_classes: int
    compiles: bool = True
    full: bool = True  # only with --full; a GPU runs all

    def trial_name(self, amp: str) -> str:
        height, width = self.config.crop
        return f"{self.name} {self.config.batch_size}x{height}x{width} {amp.replace('off', 'float32')}"


def shapes() -> Iterator[Shape]:
    if DEVICE.type != "cuda":
        yield from cpu_shapes()
        return
    for depth in ("resnet18", "resnet50", "resnet101"):
        yield Shape(f"DFN-R{depth[6:]}", TrainConfig(backbone=depth), 21)


def cpu_shapes() -> Iterator[Shape]:
    # Small, as a short run has to compile it: the Smooth Network with one head compiles in half the time of the whole.
    small = TrainConfig(backbone="resnet18", stem="conv7", channels=64, crop=(64, 64), batch_size=2)
    small = dataclasses.replace(small, border=False, deep_supervision=False)
    yield Shape("DFN-R18 without border", small, 21, full=False)
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
        """Raises AssertionError unless the first step's loss is that of the reference in float32 or, if that does
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
        """A step's work: operations and bytes of the convolutions, forward and backward. The update is not counted."""
        config, K = self.shape.config, self.shape.num_classes
        names = ("backbone", "stem", "channels", "border_channels")
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        settings |= {"batch": config.batch_size, "num_classes": K}
        settings |= {"border": config.border, "one_head": not config.deep_supervision}
        height, width = config.crop
        written, least = (Network(height=height, width=width, **settings, savings=saved) for saved in (False, True))
        dtype = torch.float32 if implementation == "float32" or self.amp == "off" else torch.bfloat16
        run = least if implementation == "ours" else written
        work = Work.of_networks([run], [least], dtype, training=True)
        return dataclasses.replace(work, images=config.batch_size)

    def gradient_bytes(self, implementation: str) -> int:
        return sum(p.nbytes for p in self.trainer(implementation).model.parameters())
