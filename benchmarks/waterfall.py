"""``python -m benchmarks.waterfall``: from the plain network to ours, one technique a row.

Each row adds one to the row before it, from ``ReferenceDFN`` in eager float32; rows of torch.compile stand apart, for
comparison. Measures a training step, or inference from normalised images to log-probabilities: milliseconds
(median, the rows in turns), peak memory, and the largest difference of the output, as a share of its range in the first
row. The precision is the one that training takes on this machine by default. The rows go to ``benchmarks/results/``;
``python -m benchmarks.report`` puts them into ``RESULTS.md``.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import figures, machine, measure
from benchmarks.harness.measure import DEVICE
from benchmarks.reporting.results import RESULTS, machine_facts, merge, rounded
from dfn_fast import FastDFN, ReferenceDFN, Savings, cli
from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch
from dfn_fast.runtime.device import HALVES, choose_algorithms
from dfn_fast.runtime.graph_cache import GraphCache
from dfn_fast.trainer.trainer import Trainer

NUM_CLASSES = 21
NONE = Savings.none()
CPU = DEVICE.type == "cpu"
DEFAULTS: dict[str, dict[str, Any]] = {
    # On a CPU the network of the default recipe is trained, and the published one infers.
    "training": {"backbone": "resnet18", "stem": "conv7", "channels": 64, "crop": (96, 96), "batch_size": 16},
    "inference": {"backbone": "resnet101", "crop": (256, 256), "batch_size": 1},
}
if not CPU:
    DEFAULTS["training"] = {"backbone": "resnet101", "crop": (512, 512), "batch_size": 32}
    DEFAULTS["inference"] = {"backbone": "resnet101", "crop": (512, 512), "batch_size": 16}


@dataclasses.dataclass
class Row:
    """A technique: what runs it, and the output that is compared."""

    technique: str
    run: Callable[[], Any]
    output: Callable[[], Tensor]


def with_savings(*names: str) -> Savings:
    """Only the named savings."""
    return dataclasses.replace(NONE, **dict.fromkeys(names, True))


TRAINING_SAVINGS = {  # a row each, added one to the other
    "losses of the small scores, fused": "fused_losses",
    "channel attention fused": "channel_attention",
    "upsample and add fused": "upsample_add",
    "1x1 and 3x3 convolutions composed": "composed_rrb",
    "heads composed": "composed_head",
}


def training_rows(config: TrainConfig, images: int) -> list[Row]:
    """One step: forward, backward, update. The output is the loss of the first step."""
    generator = torch.Generator().manual_seed(0)
    size = (images, *config.crop)
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.randint(NUM_CLASSES, size, dtype=torch.uint8, generator=generator)
    borders = torch.randint(2, size, dtype=torch.uint8, generator=generator)
    batch = Batch(*(x.to(DEVICE) for x in (pixels, labels, borders)), names=[])

    def row(technique: str, network: type[ReferenceDFN], savings: Savings = NONE, **settings: Any) -> Row:
        @functools.cache
        def trainer() -> Trainer:
            torch.manual_seed(0)
            chosen = dataclasses.replace(config, **settings)
            model = network(NUM_CLASSES, **config.network_arguments())
            if isinstance(model, FastDFN):
                model.savings = savings
            return Trainer(model, chosen, 10**6, DEVICE)

        return Row(technique, lambda: trainer().step([batch], 0), lambda: trainer().step([batch], 0).detach()[None])

    plain: dict[str, Any] = {"amp": "off", "channels_last": False, "compile": False}
    half = plain | {"channels_last": True, "amp": config.amp}
    rows = [
        row("ReferenceDFN, eager float32", ReferenceDFN, **plain),
        row("channels_last", ReferenceDFN, **plain | {"channels_last": True}),
    ]
    if config.amp != "off":
        rows.append(row(f"{config.amp} autocast", ReferenceDFN, **half))
    if not CPU:
        rows.append(row("(aside: that, torch.compile)", ReferenceDFN, **half | {"compile": True}))
    names: list[str] = []
    for technique, name in TRAINING_SAVINGS.items():
        names.append(name)
        rows.append(row(technique, FastDFN, with_savings(*names), **half))
    if CPU:
        rows.append(row("Winograd's algorithm", FastDFN, Savings(), **half))
        return rows
    rows.append(row("channels padded for tensor cores", FastDFN, Savings(), **half))
    rows.append(row("torch.compile", FastDFN, Savings(), **half | {"compile": True}))
    rows.append(row("one CUDA graph", FastDFN, Savings(), **half | {"compile": True, "cuda_graph": True}))
    return rows


def inference_rows(config: TrainConfig, images: int) -> list[Row]:
    """From normalised images to log-probabilities, which are the output."""
    torch.manual_seed(0)
    reference = calibrated(ReferenceDFN(NUM_CLASSES, **config.network_arguments()).to(DEVICE))
    data = torch.randn(images, 3, *config.crop, device=DEVICE)
    fast = FastDFN(NUM_CLASSES, **config.network_arguments()).to(DEVICE).eval()
    fast.load_state_dict(reference.state_dict())

    def row(technique: str, make: Callable[[], nn.Module], dtype: torch.dtype, layout: torch.memory_format) -> Row:
        @functools.cache
        def call() -> Callable[[], Tensor]:
            model, x = make(), data.to(dtype, memory_format=layout)
            return torch.inference_mode()(lambda: model(x))

        return Row(technique, lambda: call()(), lambda: call()().float())

    half, last = HALVES.get(config.amp, torch.float32), torch.channels_last

    def copy(of: ReferenceDFN, savings: Savings | None = None, dtype: torch.dtype = half) -> nn.Module:
        model = type(of)(NUM_CLASSES, **config.network_arguments()).to(DEVICE).eval()
        model.load_state_dict(of.state_dict())
        if isinstance(model, FastDFN) and savings is not None:
            model.savings = savings
        return model.to(dtype).to(memory_format=last)  # type: ignore[call-overload]

    def compiled(of: ReferenceDFN) -> nn.Module:
        options: Any = {"freezing": True} if CPU else None
        torch._dynamo.reset()
        return torch.compile(copy(of), options=options, mode=measure.COMPILE_MODE)  # type: ignore[return-value]

    rows = [
        row("ReferenceDFN, eager float32", lambda: reference, torch.float32, torch.contiguous_format),
        row("channels_last", lambda: copy(reference, dtype=torch.float32), torch.float32, last),
        *([row(config.amp, lambda: copy(reference), half, last)] if config.amp != "off" else []),
        row("(aside: that, torch.compile)", lambda: compiled(reference), half, last),
        row("one head", lambda: copy(fast, with_savings("one_head")), half, last),
        row(
            "attention fused, convolutions composed",
            lambda: copy(fast, dataclasses.replace(Savings(), winograd=False)),
            half,
            last,
        ),
        row("batch norm folded", lambda: fast.fuse(dtype=half, plain=True), half, last),
        row("convolution, bias, ReLU in one call", lambda: fast.fuse(dtype=half), half, last),
    ]
    if not CPU:
        graph = Graphed(lambda: GraphCache(fast.fuse(dtype=half), limit_bytes=1 << 33, capture_at=1))
        rows.append(row("one CUDA graph", lambda: graph, half, last))
    return rows


class Graphed(nn.Module):
    """A network behind a cache of CUDA graphs, made when it is first called."""

    def __init__(self, make: Callable[[], GraphCache]):
        super().__init__()
        self.cache = functools.cache(make)

    def forward(self, x: Tensor) -> Tensor:
        return self.cache()(x)


def calibrated(model: ReferenceDFN) -> ReferenceDFN:
    """The model with running statistics that fit the random weights, so that scores are neither tiny nor huge."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        model.train().scores(torch.randn(2, 3, 128, 128, device=DEVICE))
    return model.eval()


def those_that_fit(rows: list[Row]) -> tuple[list[Row], list[Tensor]]:
    """The rows that fit into memory, and their outputs, taken only once because a step changes the weights."""
    fit, outputs = [], []
    for row in rows:
        try:
            outputs.append(row.output())
            fit.append(row)
        except torch.OutOfMemoryError as error:
            print(f"{row.technique}: left out, it needs more memory than this GPU has ({str(error).splitlines()[0]})")
    return fit, outputs


def measured(rows: list[Row], group: str, images: int, rounds: int) -> list[dict[str, Any]]:
    """Each row's figures, in order."""
    rows, outputs = those_that_fit(rows)
    first = outputs[0]
    scale = (first.max() - first.min()).item() if first.numel() > 1 else abs(first.item())
    differences = [(output - first).abs().max().item() / scale for output in outputs]
    seconds = measure.alternate({row.technique: row.run for row in rows}, rounds)
    found = []
    for row, difference in zip(rows, differences, strict=True):
        drawn = machine.power(row.run)
        if drawn:
            drawn["joules_per_image"] = drawn.pop("joules_per_call") / images
        own = seconds[row.technique]
        row_figures = {
            **figures.spread(own),
            "images_per_s": images / measure.percentile(own, 0.5),
            "speed_up": measure.median_ratio(seconds[rows[0].technique], own),
            "peak_memory_bytes": measure.peak_memory(row.run, warm=True),
            "difference": difference,
            **drawn,
        }
        names = {"group": group, "implementation": row.technique}
        found.append(names | {name: rounded(value) for name, value in row_figures.items()})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.waterfall",
        usage="%(prog)s [options]",
        description="Measure what each technique gives, in training and in inference.",
    )
    add = parser.add_argument
    add("--only", choices=("training", "inference"), metavar="NAME", help="training or inference (default: both)")
    add("--backbone", metavar="NAME", help="backbone of the network")
    add("--size", type=cli.size, metavar="SIZE", help="image size, HxW")
    add("--batch", type=int, metavar="N", help="batch size")
    add("--amp", choices=("off", *HALVES), metavar="NAME", help="off, bf16 or fp16 (default: as in training)")
    add("--compile-mode", choices=measure.COMPILE_MODES, metavar="NAME", help="mode of torch.compile, on a GPU")
    add("--rounds", type=int, default=7 if CPU else 20, metavar="N", help="how often each row is timed")
    arguments = parser.parse_args(argv)
    amp = arguments.amp or measure.default_amp()
    given = {"backbone": arguments.backbone, "crop": arguments.size, "batch_size": arguments.batch, "amp": amp}
    if arguments.compile_mode and not CPU:
        measure.COMPILE_MODE = arguments.compile_mode
    suites = {}
    for kind, make in (("training", training_rows), ("inference", inference_rows)):
        if arguments.only in (None, kind):
            settings = DEFAULTS[kind] | {name: value for name, value in given.items() if value is not None}
            images, (height, width) = settings["batch_size"], settings["crop"]
            config = TrainConfig(**settings | {"batch_size": max(images, 2)})
            group = f"DFN-R{config.backbone[6:]} {images}x{height}x{width}"
            group += f" {arguments.amp}" if arguments.amp else ""
            if kind == "training":
                choose_algorithms(deterministic=False)  # as `dfn_fast.train` does
            else:
                torch.backends.cudnn.benchmark = False
            suites[f"waterfall_{kind}"] = measured(make(config, images), group, images, arguments.rounds)
            print(shown(suites[f"waterfall_{kind}"]))
    path = merge(machine_facts(), datetime.date.today().isoformat(), suites)
    print(path.relative_to(RESULTS.parent.parent))
    return 0


def shown(rows: list[dict[str, Any]]) -> str:
    lines = [f"{rows[0]['group']:42} {'ms':>9} {'speed-up':>9} {'images/s':>9} {'MB':>8} {'difference':>11}"]
    for row in rows:
        lines.append(
            f"{row['implementation']:42} {row['median_ms']:9.1f} {row['speed_up']:9.2f} {row['images_per_s']:9.2f} "
            f"{row['peak_memory_bytes'] / 1e6:8.0f} {row['difference']:11.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
