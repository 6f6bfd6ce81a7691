"""Measures what a call allocates, as PyTorch's allocator reports it, including tensors made inside operators."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """Bytes allocated by a call: the ``peak`` of live memory, and the ``largest`` block."""

    def __init__(self, fn: Callable[[], object]):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with profile(activities=activities, profile_memory=True) as profiler:
            kept = fn()  # kept alive to the end, so the result counts
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        self.peak = live = self.largest = 0
        for event in events:
            live += event.nbytes()
            self.peak, self.largest = max(self.peak, live), max(self.largest, event.nbytes())
        assert self.largest > 0, "the profiler saw no allocation"
        del kept
