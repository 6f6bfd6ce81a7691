"""The figures of every result row: the spread of its times, and its shares of the machine's peaks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import machine, measure
from benchmarks.harness.counting import Machine, Network, floor, total_bytes, total_flops


@dataclass(frozen=True)
class Work:
    """The least that one call must do, counted."""

    bytes: int
    flops: int  # a multiplication and an addition count two
    dtype: torch.dtype  # of the arithmetic
    floor: float | None = None  # seconds, layer by layer; None: the larger of the two totals' times
    images: int = 0

    @classmethod
    def of_networks(
        cls, run: Sequence[Network], least: Sequence[Network], dtype: torch.dtype, training: bool = False
    ) -> "Work":
        """One pass through each network of ``run``; the floor is that of ``least``, the same with every saving, so that
        all implementations are compared with one floor."""
        size = dtype.itemsize
        roof = Machine(machine.matrix_product(dtype), machine.copy_bandwidth())
        return cls(
            bytes=sum(total_bytes(network, size, training) for network in run),
            flops=sum(total_flops(network, training) for network in run),
            dtype=dtype,
            floor=sum(floor(network, roof, training, size) for network in least),
        )


def figures(seconds: Sequence[float], work: Work) -> dict[str, Any]:
    """The figures of a row from the times of its calls."""
    median = measure.percentile(seconds, 0.5)
    bytes_s, flops_s = work.bytes / median, work.flops / median
    roof = machine.copy_bandwidth(), machine.matrix_product(work.dtype)
    floor = max(work.bytes / roof[0], work.flops / roof[1]) if work.floor is None else work.floor
    found: dict[str, Any] = {
        **spread(seconds),
        "bytes_moved": work.bytes,
        "flops": work.flops,
        "gb_per_s": bytes_s / 1e9,
        "tflop_per_s": flops_s / 1e12,
        "share_of_copy": bytes_s / roof[0],
        "share_of_product": flops_s / roof[1],
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / median,
    }
    return found | ({"images_per_s": work.images / median} if work.images else {})


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds of the median call, and the 20th and 80th percentiles."""
    shares = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8}
    return {name: measure.percentile(seconds, share) * 1e3 for name, share in shares.items()}


@dataclass
class Turns:
    """The implementations of one group, each with the work that it does and the row that it fills.

    Each is added once its result has been checked; :meth:`time` then times all of them in turns and fills their rows.
    """

    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, call: Callable[[], Any], work: Work, row: dict[str, Any]) -> None:
        """``row`` is filled in later: the dictionary of the benchmark's own record."""
        self.calls[name], self.works[name], self.rows[name] = call, work, row

    def time(self, a_call: float, budget: float = 5.0, least: int = 5, most: int = 30) -> None:
        """Times all in turns, the last one added for about ``budget`` seconds; one call of it takes ``a_call``. Its row
        also gets its speed-up over each other. On a GPU each row gets the power that it draws."""
        *others, ours = self.calls
        seconds = measure.alternate(self.calls, max(least, min(most, int(budget / a_call))))
        for name, row in self.rows.items():
            row.update(figures(seconds[name], self.works[name]))
            drawn = machine.power(self.calls[name])
            if drawn and self.works[name].images:
                drawn["joules_per_image"] = drawn.pop("joules_per_call") / self.works[name].images
            row.update(drawn)
        for name in others:
            self.rows[ours][f"speed_up_over_{name}"] = 1 / measure.median_ratio(seconds[ours], seconds[name])
