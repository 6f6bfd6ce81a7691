"""Forward and backward pass as one CUDA graph: the host launches a step with one call instead of thousands."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps that run as usual first: they compile, choose algorithms and allocate
Replay = Callable[[], object]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class SideStream:
    """Runs steps on a side stream, as a capture requires of the steps before it: the default one cannot be captured."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = run()
        current.wait_stream(self.stream)
        return loss


def capture(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Captures ``run`` as a graph without running it; returns the function that replays it and its result's tensor."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: a loader thread pins memory at the same time, which would end a capture that watches all threads.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = run()
    return graph.replay, loss


class GraphedStep:
    """Runs ``run(*inputs) -> loss``, which also leaves gradients: a few times eagerly, then as a graph.

    The first calls are steps like any other, so nothing runs twice. Until the capture, gradients must be None at each
    call. After it (``captured``) they are the graph's own tensors, which each replay overwrites; do not replace them.
    A step that cannot be captured keeps running eagerly, with a warning.
    """

    def __init__(self, run: Callable[..., Tensor], warm_up: Callable[[Callable[[], Tensor]], Tensor], capture: Capture):
        self.run, self.warm_up, self.capture = run, warm_up, capture
        self.steps = 0
        self.failed = False
        self.inputs: list[Tensor] = []
        self.loss: Tensor | None = None
        self.replay: Replay | None = None

    @property
    def captured(self) -> bool:
        return self.replay is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.failed:
            return self.run(*inputs)
        self.steps += 1
        if self.steps <= WARM_UP:
            return self.warm_up(lambda: self.run(*inputs))
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            try:
                self.replay, self.loss = self.capture(lambda: self.run(*self.inputs))
            except Exception as error:
                self.failed = True
                warnings.warn(f"--cuda-graph: the step cannot be captured, so it runs eagerly ({error})", stacklevel=2)
                return self.run(*inputs)
        for own, x in zip(self.inputs, inputs, strict=True):
            if own.shape != x.shape:
                raise ValueError(f"the captured step expected shape {list(own.shape)}, got {list(x.shape)}")
            own.copy_(x, non_blocking=True)
        self.replay()
        assert self.loss is not None
        return self.loss
