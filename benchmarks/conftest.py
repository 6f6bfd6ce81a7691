"""Adds to every benchmark run the machine's facts, in the JSON, and a summary with the promises at the end.

On a CPU a run takes only a few minutes: cases marked ``full`` need ``--full``. A GPU runs all of them.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import figures, machine, measure
from benchmarks.harness.cases import FEATURES
from benchmarks.harness.figures import Work
from benchmarks.harness.measure import DEVICE, Trial
from dfn_fast.runtime.device import choose_algorithms

CPU_TIME_LIMIT = 1.1  # ours / eager, promised on a CPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        default=DEVICE.type == "cuda",
        help="run every case, not only those that take a few minutes; always on with a GPU",
    )
    parser.addoption(
        "--compile-mode",
        choices=measure.COMPILE_MODES,
        default=measure.COMPILE_MODES[0],
        help="mode of torch.compile, which ours is compared with, on a GPU; the first takes minutes for each network",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: times of Triton's interpreter mean nothing; unset it")
    if DEVICE.type == "cuda":
        measure.COMPILE_MODE = config.getoption("--compile-mode")
    config.addinivalue_line("markers", "full: a case of --full, which a short run leaves out")
    config.stash[REPORT] = Report()
    config.stash[NOTES] = []
    config.stash[LEFT_OUT] = 0


@pytest.hookimpl(trylast=True)  # of what -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the cases marked ``full`` unless ``--full`` is given."""
    left_out = [] if config.getoption("--full") else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.stash[LEFT_OUT] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    left_out = config.stash[LEFT_OUT]
    return (
        f"a short run: {left_out} of {left_out + len(items)} cases are left out; --full runs them" if left_out else ""
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skips a case that does not fit into the GPU's memory, and frees what it allocated."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    torch.cuda.empty_cache()  # outside the handler, because the error keeps the memory alive
    pytest.skip(f"needs more memory than this GPU has: {reason}")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.environment() | machine.ceilings())


class Report:
    """Measurements beside pytest-benchmark's own times: one row a trial, once all its implementations have run."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, str], int] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, trial: Trial, implementation: str) -> dict[str, Any]:
        """Measures memory, then times this implementation; ``ours`` in turns with those that ran before it."""
        self.memory[trial.name, implementation] = measure.peak_memory(functools.partial(trial.run, implementation))
        names = [n for n in measure.IMPLEMENTATIONS if (trial.name, n) in self.memory]
        names = names if implementation == "ours" else [implementation]
        calls: dict[str, Callable[[], Any]] = {name: functools.partial(trial.run, name) for name in names}
        seconds = measure.alternate(calls, measure.rounds_for(calls[implementation]))
        own = seconds[implementation]
        info: dict[str, Any] = {
            **figures.figures(own, Work(trial.bytes_moved(), trial.flops(), FEATURES)),
            "peak_memory_bytes": self.memory[trial.name, implementation],
        }
        if implementation == "compile" and measure.COMPILE_MODE:
            info["compile_mode"] = measure.COMPILE_MODE
        for other in names:
            if other != implementation:
                info[f"ratio_to_{other}"] = measure.median_ratio(own, seconds[other])
        if implementation == "ours":
            times = {f"{name}_ms": measure.percentile(s, 0.5) * 1e3 for name, s in seconds.items()}
            memory = {f"{name}_memory": self.memory[trial.name, name] for name in names}
            self.rows.append({"trial": trial, **info, **times, **memory})
        return info

    def lines(self) -> list[str]:
        """The table, rows slower than torch.compile first, then the promises of the CPU path."""
        header = (
            f"{'trial':72} {'eager ms':>9} {'compile ms':>10} {'ours ms':>9} {'/eager':>6} {'/compile':>8} "
            f"{'GB/s':>7} {'copy':>5} {'MiB ours':>8} {'eager':>7}"
        )
        by_speed = sorted(self.rows, key=lambda row: -row.get("ratio_to_compile", 0))
        return [header, *map(_line, by_speed), *(p for row in self.rows for p in _promises(row))]


@pytest.fixture(scope="module")
def cudnn_by_trial() -> Iterator[None]:
    """Lets cuDNN choose algorithms by timing them, for all implementations alike, as ``dfn_fast.train`` does."""
    choose_algorithms(deterministic=False)
    yield
    torch.backends.cudnn.benchmark = False


REPORT = pytest.StashKey[Report]()
NOTES = pytest.StashKey[list[str]]()
LEFT_OUT = pytest.StashKey[int]()


def _line(row: dict[str, Any]) -> str:
    def number(name: str, digits: int, scale: float = 1.0) -> str:
        return f"{row[name] / scale:.{digits}f}" if name in row else "-"

    return (
        f"{row['trial'].name:72} {number('eager_ms', 3):>9} {number('compile_ms', 3):>10} {number('ours_ms', 3):>9} "
        f"{number('ratio_to_eager', 2):>6} {number('ratio_to_compile', 2):>8} {number('gb_per_s', 1):>7} "
        f"{row['share_of_copy']:5.0%} {number('ours_memory', 1, 2**20):>8} {number('eager_memory', 1, 2**20):>7}"
    )


def _promises(row: dict[str, Any]) -> list[str]:
    if DEVICE.type != "cpu" or "ratio_to_eager" not in row:
        return []
    case, ratio = row["trial"].case, row["ratio_to_eager"]
    verdict = "kept" if ratio <= CPU_TIME_LIMIT else "BROKEN"
    lines = [f"{verdict}: {row['trial'].name}: {ratio:.2f} x eager's time, promised {CPU_TIME_LIMIT:.2f}"]
    if case.memory_limit is not None:
        share = row["ours_memory"] / row["eager_memory"]
        verdict = "kept" if share < case.memory_limit else "BROKEN"
        lines.append(f"{verdict}: {row['trial'].name}: {share:.2f} x eager's memory, promised {case.memory_limit:.2f}")
    return lines


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Collects what the summary shows."""
    return pytestconfig.stash[REPORT]


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the summary."""
    return pytestconfig.stash[NOTES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if report.rows:
        terminalreporter.section("operators: ratios of ours to eager and compile, slower than compile first")
        for line in report.lines():
            terminalreporter.write_line(line)
    if config.stash[NOTES]:
        terminalreporter.section("whole steps")
        for line in config.stash[NOTES]:
            terminalreporter.write_line(line)
