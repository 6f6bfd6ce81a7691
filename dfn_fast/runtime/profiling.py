"""Where the time of a training step goes: a trace for a browser, and tables of shares.

Shares are of device time on CUDA, of the main thread's CPU time elsewhere. Forward time counts for the region (see
:mod:`dfn_fast.runtime.regions`) in which it was spent, backward time for the region of the forward operation that it
differentiates. A compiled or captured step has no regions: its time is shown by kind of operation only.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dfn_fast.runtime.regions import PREFIX, named_regions

WARM_UP = 5  # steps before profiling: they compile, capture and choose algorithms
STEPS = 3
BACKWARD = "autograd::engine::evaluate_function: "
GENERATED = ("Torch-Compiled Region", "CompiledFunction", "CompiledFxGraph")
# Kinds of operation by parts of their names, PyTorch's operators and then kernels. The first match counts.
KINDS = {
    "convolutions": ("convolution", "dgrad", "wgrad", "fprop", "implicit_gemm"),
    "generated code": ("triton_", "cpp_fused"),
    "normalisation": ("batch_norm", "bn_fw", "bn_bw"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "gemm", "nvjet", "cutlass"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "Memcpy", "Memset"),
}


class StepProfiler:
    """Profiles a few steps of a run: call :meth:`before` and :meth:`after` each step, and :meth:`close` at the end.

    ``regions``: whether the step has them, that is, runs neither compiled nor captured.
    """

    def __init__(self, folder: Path, device: torch.device, regions: bool, write: Callable[[str], None] = print):
        self.folder, self.device, self.regions, self.write = folder, device, regions, write
        self.seen = self.taken = 0
        self.seconds = 0.0
        self.profiler: profile | None = None
        self.stack = ExitStack()
        self.done = False

    def before(self, steps_left: int, epoch_steps: int) -> None:
        """Starts profiling once warm, in one epoch if possible: ``steps_left`` of its ``epoch_steps`` are to come."""
        fits = self.seen >= WARM_UP and steps_left >= min(STEPS, epoch_steps)
        if fits and self.profiler is None and not self.done:
            self.wait()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.stack.enter_context(named_regions())
            self.profiler = self.stack.enter_context(profile(activities=activities))
        self.start = time.perf_counter()

    def after(self, last_of_epoch: bool) -> None:
        self.seen += 1
        if self.profiler is None or self.done:
            return
        self.wait()
        self.seconds += time.perf_counter() - self.start
        self.taken += 1
        if self.taken == STEPS or last_of_epoch:
            self.finish()

    def finish(self) -> None:
        """Ends profiling, writes the trace and shows the tables."""
        assert self.profiler is not None
        self.done = True
        self.stack.close()
        file = self.folder / "trace.json.gz"
        self.profiler.export_chrome_trace(str(file))
        self.write(report(self.profiler.events(), self.taken, self.seconds, self.device.type, self.regions))
        self.write(f"trace: {file} (open it at https://ui.perfetto.dev or chrome://tracing)")

    def close(self) -> None:
        """Reports if the run was too short to profile."""
        if not self.done:
            self.done = True
            self.stack.close()
            self.write(f"--profile: the run ended after {self.seen} steps; profiling begins after {WARM_UP}")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def report(events: Iterable[Any], steps: int, seconds: float, device: str, regions: bool) -> str:
    """The tables of ``steps`` steps that took ``seconds``, as text."""
    events = list(events)
    times = _own_times(events, device == "cuda")
    what = "device time" if device == "cuda" else "CPU time"
    lines = [f"profile of {steps} steps, {1e3 * seconds / steps:.1f} ms each (profiling slows them); {what} per step:"]
    unlinked = _unlinked_kernels(events)
    if regions:
        shares = _by_region(events, times)
        if unlinked:
            shares["kernels that no operation launched"] = [sum(unlinked.values()), 0.0]
        lines += table("region", shares, steps, seconds)
    else:
        lines += ["a compiled or captured step has no regions; --no-compile without --cuda-graph shows them"]
    lines += table("kind", _by_kind(events, times, unlinked), steps, seconds)
    return "\n".join(lines)


def _own_times(events: list[Any], on_device: bool) -> dict[int, float]:
    """Microseconds of each operation, without those inside it, by ``id``."""
    hosts = (e for e in events if e.device_type == DeviceType.CPU)
    return {id(e): e.self_device_time_total if on_device else e.self_cpu_time_total for e in hosts}


def around(event: Any) -> Iterator[Any]:
    """The operation and those that enclose it, the innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


Times = dict[str, list[float]]  # name -> microseconds of forward and of backward


def _by_region(events: list[Any], times: dict[int, float]) -> Times:
    """Time by region, in the order in which they first appear."""
    made_in: dict[int, tuple[float, str | None]] = {}  # sequence number -> when and where its operation ran last
    for event in events:
        if id(event) in times and event.sequence_nr >= 0 and not _is_backward(event):
            start = event.time_range.start
            # Operations that leave nothing to differentiate carry the number of the next one that does.
            if start >= made_in.get(event.sequence_nr, (-1.0, None))[0] and not any(map(_is_backward, around(event))):
                made_in[event.sequence_nr] = start, _region_of(event)
    result: Times = defaultdict(lambda: [0.0, 0.0])
    for event in sorted((e for e in events if id(e) in times), key=lambda e: e.time_range.start):
        node = next(filter(_is_backward, around(event)), None)
        if node is None:
            name = _region_of(event)
            result[name or "outside any region"][name == "backward"] += times[id(event)]
        else:
            name = made_in.get(node.sequence_nr, (0.0, None))[1]
            result[name or "backward"][1] += times[id(event)]
    return result


def _is_backward(event: Any) -> bool:
    return event.name.startswith(BACKWARD)


def _region_of(event: Any) -> str | None:
    """The innermost region around an operation."""
    return next((e.name.removeprefix(PREFIX) for e in around(event) if e.name.startswith(PREFIX)), None)


def _by_kind(events: list[Any], times: dict[int, float], unlinked: dict[str, float]) -> Times:
    """Time by kind of operation, the longest first; ``unlinked`` kernels count as forward."""
    result: Times = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if id(event) in times:
            chain = list(around(event))
            backward = any(map(_is_backward, chain)) or any("Backward" in e.name for e in chain)
            result[kind_of([e.name for e in chain])][backward] += times[id(event)]
    for name, spent in unlinked.items():
        result[kind_of([name])][0] += spent
    return dict(sorted(result.items(), key=lambda item: -sum(item[1])))


def kind_of(names: list[str]) -> str:
    """The kind of an operation or kernel, from its name and the names of those around it."""
    for name in names:
        if name.startswith("Optimizer.step") or "multi_tensor_apply" in name:
            return "optimizer"
        if "dfn_kernels" in name:
            return "operator " + _operator_of(name)
        if name == PREFIX + "input":
            return "input"
    for name in names:
        for kind, marks in KINDS.items():
            if any(mark in name for mark in marks):
                return kind
    if any(mark in name for name in names for mark in GENERATED):
        return "generated code"
    if names[0].endswith("_kernel"):  # those of dfn_kernels, which eager mode launches without an operator
        return f"kernel {names[0]}"
    return "other operations" if names[0].startswith("aten::") else "host code and the rest"


def _operator_of(name: str) -> str:
    """An operator such as ``dfn_kernels::upsample_add``, from its own name or that of its derivative."""
    own = name[name.index("dfn_kernels") + len("dfn_kernels") :].strip(":_")
    own = own.split("_default")[0]
    for ending in ("_backward", "Backward", "Backward0", "_bwd"):
        own = own.removesuffix(ending)
    return f"dfn_kernels::{own}"


def _unlinked_kernels(events: list[Any]) -> dict[str, float]:
    """Device time of the kernels that no known host operation launched, as in a graph's replay, by name."""
    left: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                left[kernel.name] -= kernel.duration
        elif not getattr(event, "is_user_annotation", False) and not event.name.startswith(PREFIX):
            left[event.name] += event.time_range.elapsed_us()
    return {name: time for name, time in left.items() if time > 1}


def table(title: str, times: Times, steps: int, seconds: float) -> list[str]:
    """Rows of milliseconds per step and shares of the step; time that nothing accounts for is the last."""
    ms = {name: [t / 1e3 / steps for t in pair] for name, pair in times.items()}
    step = 1e3 * seconds / steps
    idle = step - sum(map(sum, ms.values()))
    if idle > 0:
        ms["not attributed"] = [idle, 0.0]
    width = max(map(len, [title, *ms])) + 2
    lines = ["", f"{title:{width}}{'forward':>10}{'backward':>10}{'ms':>10}{'share':>8}"]
    for name, (forward, backward) in ms.items():
        shown = (f"{t:10.1f}" if t >= 0.05 else f"{'':10}" for t in (forward, backward))
        lines.append(f"{name:{width}}{''.join(shown)}{forward + backward:10.1f}{(forward + backward) / step:8.1%}")
    return lines
