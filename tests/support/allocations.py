"""What a call allocates, as PyTorch's own allocator reports it: tensors made inside operators are counted too."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """Bytes allocated by a call: ``peak`` live at once, and the ``largest`` block."""

    def __init__(self, fn: Callable[[], object]):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        with profile(activities=activities, profile_memory=True) as profiler:
            kept = fn()  # alive to the end: what is returned counts
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        self.peak = live = self.largest = 0
        for event in events:
            live += event.nbytes()
            self.peak, self.largest = max(self.peak, live), max(self.largest, event.nbytes())
        assert self.largest > 0, "the profiler saw no allocation"
        del kept
