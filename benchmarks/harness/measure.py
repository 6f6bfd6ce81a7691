"""How operators are measured: one case, three implementations (eager, compile, ours), the same inputs, in turns.

Times: on CUDA the device's own (events around the call, the L2 cache emptied before, the host far enough ahead that
launches are hidden), on a CPU the wall clock. Peak memory: what the call allocates beyond its inputs, counted by
PyTorch's allocators; on a CPU that is every tensor, inside operators too, but not the scratch of oneDNN or OpenMP.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfn_fast.runtime.device import HALVES, choose_amp
from dfn_kernels.common.cpu import onednn_takes_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Without it a CPU multiplies bfloat16 numbers one by one, hundreds of times as slowly as float32.
HAS_BF16 = DEVICE.type == "cuda" or onednn_takes_bf16()
IMPLEMENTATIONS = ("eager", "compile", "ours")
COMPILE_MODES = ("max-autotune", "default")
# The mode of torch.compile, which ours is compared with, on a GPU; `--compile-mode` changes it. A CPU has no modes.
COMPILE_MODE = COMPILE_MODES[0] if DEVICE.type == "cuda" else None
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One operator at one shape. Bytes are the least that any implementation must move (the operators' docstrings)."""

    operator: str
    shape: str
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: Callable[[], Sequence[Any]]
    forward_bytes: Callable[..., int]
    forward_flops: Callable[..., int]  # backward, if there is one, counts twice as many
    backward_bytes: Callable[..., int] | None = None  # None: the operator has no gradient
    training: bool = False
    memory_limit: float | None = None  # promised share of eager's peak memory, on a CPU


def default_amp() -> str:
    """The precision that ``--amp auto`` takes in training on this machine: ``"off"``, float32, or a half."""
    chosen = choose_amp("auto", DEVICE)
    return next((name for name, dtype in HALVES.items() if dtype == chosen), "off")


def tensors(values: Any) -> list[Tensor]:
    """The tensors in a value, lists and tuples searched."""
    if isinstance(values, Tensor):
        return [values]
    return [x for v in values for x in tensors(v)] if isinstance(values, (list, tuple)) else []


class Trial:
    """A case in one direction: its inputs, made once, and the three implementations as calls without arguments."""

    def __init__(self, case: Case, backward: bool) -> None:
        torch.manual_seed(0)
        self.case, self.backward = case, backward
        self.name = f"{case.operator} {case.shape} {'forward+backward' if backward else 'forward'}"
        with DEVICE:
            self.inputs = case.inputs()
        self.wanted = [x.requires_grad_() for x in tensors(self.inputs) if backward and x.is_floating_point()]
        self._d_out: Tensor | None = None
        torch._dynamo.reset()
        self.functions = {"eager": case.reference, "compile": self._compiled(), "ours": case.ours}
        self.expected: list[Tensor] | None = None

    def _compiled(self) -> Callable[..., Any]:
        mode = "max-autotune-no-cudagraphs" if COMPILE_MODE == "max-autotune" else COMPILE_MODE
        return torch.compile(self.case.reference, dynamic=False, mode=mode)

    def run(self, implementation: str) -> Any:
        """Runs one call. Returns the outputs, then the gradients if the trial goes backward."""
        function = self.functions[implementation]
        if not self.backward:
            with torch.no_grad():
                return function(*self.inputs)
        out = function(*self.inputs)
        if self._d_out is None:
            self._d_out = torch.randn_like(out)
        return out.detach(), *torch.autograd.grad(out, self.wanted, self._d_out)

    def bytes_moved(self) -> int:
        """The least bytes that one call must move."""
        total = self.case.forward_bytes(*self.inputs)
        if self.backward and self.case.backward_bytes is not None:
            total += self.case.backward_bytes(*self.inputs)
        return total

    def flops(self) -> int:
        """Operations of one call, each multiplication, addition and function of a number counted as one."""
        return self.case.forward_flops(*self.inputs) * (3 if self.backward else 1)

    def check(self, implementation: str) -> None:
        """Raises AssertionError unless the implementation agrees with eager: this looks for mistakes, not rounding.

        Labels may differ where two classes tie up to rounding: in at most one pixel of a thousand.
        """
        if self.expected is None:
            self.expected = [x.clone() for x in tensors(self.run("eager"))]
        for i, (got, want) in enumerate(zip(tensors(self.run(implementation)), self.expected, strict=True)):
            name = f"{self.case.operator} {self.case.shape}, {implementation}, result {i}"
            assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, eager has {list(want.shape)}"
            if not want.is_floating_point():
                wrong = (got != want).float().mean().item()
                assert wrong <= 1e-3, f"{name}: {wrong:.2%} of the labels differ from eager's"
                continue
            error = (got.float() - want.float()).abs().max().item()
            scale = want.float().abs().max().item()
            allowed = 1e-3 if want.dtype == torch.float32 else 5e-2
            assert error <= allowed * scale, f"{name}: differs from eager by {error:.1e}, largest value {scale:.1e}"


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@functools.lru_cache(maxsize=1)
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


def flush_cache() -> None:
    """Empties the GPU's L2 cache by overwriting many times its size; returns before the GPU has done so, which gives
    the host time to launch the call to be measured."""
    if DEVICE.type == "cuda":
        for _ in range(2):
            _flush_buffer().zero_()


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by name: the functions take turns, so that drift of the machine meets all of them alike.

    Every second round runs in reverse, so that none always finds the caches as one certain other left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    events: list[tuple[str, Any, Any]] = []
    for i in range(rounds):
        for name, function in list(functions.items())[:: -1 if i % 2 else 1]:
            if DEVICE.type != "cuda":
                start_time = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start_time)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush_cache()
            start.record()
            function()
            end.record()
            events.append((name, start, end))
    synchronize()
    for name, start, end in events:
        seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def rounds_for(function: Callable[[], Any], budget: float = 1.0, least: int = 5, most: int = 100) -> int:
    """How many calls fit into ``budget`` seconds, after one that is not counted."""
    function()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return max(least, min(most, int(budget / (time.perf_counter() - start))))


def peak_memory(function: Callable[[], Any], warm: bool = False) -> int:
    """The most bytes allocated at one time during a call, beyond those before it. An earlier call fills caches, unless
    the function is ``warm``."""
    return _memory(function, warm)[0]


def held_memory(function: Callable[[], Any]) -> int:
    """The bytes that a call leaves allocated while its result lives: what a forward pass keeps for the backward."""
    return _memory(function)[1]


def _memory(function: Callable[[], Any], warm: bool = False) -> tuple[int, int]:
    """The peak of bytes, and those at the end with the result still alive, beyond those before the call."""
    if not warm:
        function()
    if DEVICE.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        synchronize()
        peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return peak, held
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie, by nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of the two times' ratio: each pair was taken in turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
