"""``python -m benchmarks.scaling``: measures how time and memory of inference and training grow.

One quantity grows at a time: images of a batch, pixels of an image, classes. The exponent is the slope of the
logarithms: 1 is in proportion, 0 no growth. The rows go to ``benchmarks/results/``.
"""

import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.harness import figures, measure
from benchmarks.harness.measure import DEVICE
from benchmarks.reporting.results import RESULTS, machine_facts, merge, rounded
from dfn_fast import FastDFN, Predictor, cli
from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch
from dfn_fast.trainer.trainer import Trainer

CPU = DEVICE.type == "cpu"
BACKBONE, CHANNELS = ("resnet18", 64) if CPU else ("resnet101", 512)
BASE = {"batch": 2, "side": 128, "classes": 21} if CPU else {"batch": 8, "side": 512, "classes": 21}
VALUES = (
    {"batch": (2, 4, 8, 16), "side": (64, 128, 192, 256), "classes": (2, 21, 64, 150)}
    if CPU
    else {"batch": (2, 8, 16, 32), "side": (256, 512, 768, 1024), "classes": (2, 21, 64, 150)}
)


def inference(batch: int, side: int, classes: int) -> Callable[[], Any]:
    model = FastDFN(classes, backbone=BACKBONE, channels=CHANNELS, border=False).eval()
    predictor = Predictor(model, device=DEVICE, amp="off" if CPU else "bf16", batch=batch)
    predictor.warm_up([(side, side)], batch)
    images = list(np.zeros((batch, side, side, 3), np.uint8))
    return lambda: predictor(images)


def training(batch: int, side: int, classes: int) -> Callable[[], Any]:
    config = TrainConfig(backbone=BACKBONE, channels=CHANNELS, crop=(side, side), batch_size=batch)
    trainer = Trainer(FastDFN(classes, **config.network_arguments()), config, 10**6, DEVICE)
    images, labels = (
        torch.zeros(batch, 3, side, side, dtype=torch.uint8),
        torch.zeros(batch, side, side, dtype=torch.uint8),
    )
    data = Batch(*(x.to(DEVICE) for x in (images, labels, labels)), names=[])
    return lambda: trainer.step([data], 0)


def rows(kind: str, make: Callable[..., Callable[[], Any]]) -> Iterator[dict[str, Any]]:
    """A row for each quantity and value, and one more with the exponents of each quantity."""
    for quantity, values in VALUES.items():
        found = []
        for value in values:
            call = make(**BASE | {quantity: value})
            call()
            seconds = measure.alternate({"call": call}, measure.rounds_for(call, budget=1.0, least=3, most=20))["call"]
            row = {
                "group": f"{kind}, {quantity}",
                "implementation": str(value),
                **{name: rounded(value) for name, value in figures.spread(seconds).items()},
                "peak_memory_bytes": measure.peak_memory(functools.partial(call)),
            }
            found.append(row)
            yield row
        sizes = [value**2 if quantity == "side" else value for value in values]
        yield {
            "group": f"{kind}, {quantity}",
            "implementation": "exponent",
            "of": "pixels" if quantity == "side" else quantity,
            "time_exponent": rounded(exponent(sizes, [row["median_ms"] for row in found])),
            "memory_exponent": rounded(exponent(sizes, [row["peak_memory_bytes"] for row in found])),
        }


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(values) over log(sizes), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.scaling",
        usage="%(prog)s [options]",
        description="Measure time and memory against batch, image size and number of classes.",
    )
    parser.add_argument("--only", choices=("inference", "training"), metavar="NAME", help="inference or training")
    arguments = parser.parse_args(argv)
    suites: dict[str, list[dict[str, Any]]] = {}
    for kind, make in (("inference", inference), ("training", training)):
        if arguments.only in (None, kind):
            suites[f"scaling_{kind}"] = []
            for row in rows(kind, make):
                suites[f"scaling_{kind}"].append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    path = merge(machine_facts(), datetime.date.today().isoformat(), suites)
    print(path.relative_to(RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    cli.run(main)
