"""CUDA graphs by image size: each size is captured once, its next images are one launch.

All graphs share one memory pool, so what they need together is about what the largest needs, and no two may run at
once: a call waits, on the device alone, for the call before it. What a call returns is its own.
"""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfn_fast.errors import ConfigError
from dfn_fast.runtime.cuda_graph import WARM_UP, Replay, SideStream

Key = tuple[torch.Size, torch.dtype]
CAPTURING = threading.Lock()  # a process captures one graph at a time, whatever the number of caches


class CudaGraphs:
    """What a :class:`GraphCache` asks of a CUDA device. One for each cache: it holds the cache's pool and event."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.side = SideStream(self.device)
        self.event = torch.cuda.Event()
        self.new_pool()

    def new_pool(self) -> None:
        """Later captures take their memory from a new pool. The old one is freed once its graphs are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def pool_bytes(self) -> int:
        """What the pool has taken from the device, whatever other threads allocate meanwhile."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """``run`` as usual, a few times: it compiles, chooses algorithms and allocates."""
        with torch.cuda.device(self.device):
            for _ in range(WARM_UP):
                self.side(run)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """``run`` as a graph, not run yet: what replays it on the current stream, and the tensor of its result.

        Synchronises the device. ``RuntimeError`` with the reason where it fails; streams are then as they were.
        """
        graph, reason = torch.cuda.CUDAGraph(), ""
        # The outer stream context puts the caller's stream back: torch.cuda.graph does not if its capture fails.
        with CAPTURING, torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with self._capturing(graph, self.pool):
                    try:
                        labels = run()
                    except Exception as error:
                        reason = str(error) or repr(error)  # ending the capture fails as well, and would hide it
                        raise
            except Exception as error:
                self._clean_up()
                raise RuntimeError(reason or str(error)) from None
        return graph.replay, labels

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # Always one stream, as memory is reused on its own stream alone; thread_local as in cuda_graph.capture.
        return torch.cuda.graph(graph, pool=pool, stream=self.side.stream, capture_error_mode="thread_local")

    def _clean_up(self) -> None:
        """Ends what a failed capture may leave begun: in older versions of torch the pool's recording, and for the
        random generator the capture, until the next one that succeeds."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        current = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with contextlib.suppress(RuntimeError), current, self._capturing(torch.cuda.CUDAGraph(), None):
            torch.zeros(1, device=self.device)

    def wait(self) -> None:
        """The current stream goes on once the device has passed the last ``record``."""
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def record(self) -> None:
        """Marks this point of the current stream."""
        self.event.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """The host waits until the device has passed the last ``record``."""
        self.event.synchronize()


@dataclass
class Graph:
    """A captured ``run``: its own input, its own output and what goes from one to the other."""

    images: Tensor
    labels: Tensor
    replay: Replay


class GraphCache:
    """``cache(images)`` is ``run(images)`` from the graph of that shape and dtype, captured where there is none yet.

    Args:
        run: a function without host synchronisation of a tensor, ``[B, H, W, 3]`` uint8, on the device, that returns
            one, ``[B, H, W]`` uint8. It runs without gradients. Weights that it reads must stay where they are:
            :meth:`clear` the cache after moving them.
        limit_bytes: of the pool and the graphs' inputs together; what the driver keeps for launches is not counted.
            The graph used longest ago goes first. A pool shrinks only as a whole: one that has outgrown the limit is
            given up with all its graphs, and the newest captured again in a fresh one. ``ConfigError`` below 1.
        graphs: None: those of the current CUDA device.

    A shape whose capture fails, or whose graph alone is larger than the limit, runs as it is from then on, with one
    warning. Any thread may call, on any stream. ``ValueError`` for images of another device.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *, limit_bytes: int, graphs: CudaGraphs | None = None):
        if limit_bytes < 1:
            raise ConfigError(f"graph_cache_bytes {limit_bytes}: expected a positive number of bytes, such as 2**31")
        self.run, self.limit_bytes = run, limit_bytes
        self.graphs = CudaGraphs(torch.device("cuda")) if graphs is None else graphs
        self.kept: OrderedDict[Key, Graph] = OrderedDict()  # the one used last is last
        self.eager: set[Key] = set()
        self.pool_bytes = self.hits = self.captures = self.evictions = self.failures = 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.device != self.graphs.device:
            raise ValueError(f"expected images on {self.graphs.device}, got {images.device}")
        with self.lock:
            graph = self._graph(images)
            if graph is not None:
                return self._replay(graph, images)
        return self.run(images)

    @torch.no_grad()
    def warm_up(self, shapes: Iterable[Sequence[int]]) -> None:
        """Captures graphs for uint8 images of ``shapes``, each ``[B, H, W, 3]``, the largest ``B * H * W`` first:
        the smaller ones then find the memory that they need in the pool."""
        for shape in sorted((torch.Size(shape) for shape in shapes), key=lambda s: s.numel(), reverse=True):
            with self.lock:
                if (shape, torch.uint8) not in self.kept:
                    self._graph(torch.zeros(shape, dtype=torch.uint8, device=self.graphs.device))

    def clear(self) -> None:
        """Drops all graphs, once the device has finished with them. Shapes that run without one go on so."""
        with self.lock:
            while self.kept:
                self._evict()

    def statistics(self) -> dict[str, int]:
        """``hits``: calls that found their graph; ``captures``; ``evictions``; ``failures``: captures that failed and
        graphs larger than the limit; ``bytes``: what counts towards the limit now."""
        with self.lock:
            names = ("hits", "captures", "evictions", "failures")
            return {**{name: getattr(self, name) for name in names}, "bytes": self._bytes()}

    def _replay(self, graph: Graph, images: Tensor) -> Tensor:
        self.graphs.wait()
        try:
            graph.images.copy_(images, non_blocking=True)
            graph.replay()
            return graph.labels.clone()  # before the next replay, of any graph: they share their memory
        finally:
            self.graphs.record()

    def _graph(self, images: Tensor) -> Graph | None:
        """The graph for these images, perhaps new; None: they run without."""
        key = (images.shape, images.dtype)
        if key in self.eager:
            return None
        graph = self.kept.get(key)
        if graph is not None:
            self.hits += 1
            self.kept.move_to_end(key)
            return graph
        self.graphs.wait()  # replays use what belongs to the stream that warms up, such as cuBLAS's workspace
        try:
            graph = self._add(key, images)
        finally:
            self.graphs.record()
        return graph

    def _add(self, key: Key, images: Tensor) -> Graph | None:
        """A new graph, kept, or None: there can be none."""
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            own = torch.empty(images.shape, dtype=images.dtype, device=self.graphs.device)
        own.copy_(images)
        self.graphs.warm_up(lambda: self.run(own))  # an error here is the function's own, and the caller's to see
        graph = self._capture_within_limit(key, own)
        if graph is not None:
            self.kept[key] = graph
        return graph

    def _capture_within_limit(self, key: Key, images: Tensor) -> Graph | None:
        """A graph that fits beside those kept, after evictions; None, with a warning, where there can be none."""
        alone = not self.kept
        graph = self._capture(key, images)
        while graph is not None and self.kept and self._bytes(graph) > self.limit_bytes:
            self._evict()
        if graph is not None and not alone and self._bytes(graph) > self.limit_bytes:
            graph = None  # so that its pool goes before the next one grows
            graph = self._capture(key, images)
        if graph is not None and self._bytes(graph) > self.limit_bytes:
            self._give_up(
                key,
                f"its graph takes {self._bytes(graph):,} bytes, more than graph_cache_bytes allows, "
                f"{self.limit_bytes:,}",
            )
            graph = None
        return graph

    def _capture(self, key: Key, images: Tensor) -> Graph | None:
        if not self.kept:
            self.graphs.new_pool()  # PyTorch takes no capture into a pool whose graphs are all gone
        try:
            replay, labels = self.graphs.capture(lambda: self.run(images))
        except Exception as error:
            self._give_up(key, f"it cannot be captured ({(str(error) or repr(error)).splitlines()[0]})")
            return None
        finally:
            self.pool_bytes = self.graphs.pool_bytes()
        self.captures += 1
        return Graph(images, labels, replay)

    def _give_up(self, key: Key, reason: str) -> None:
        self.eager.add(key)
        self.failures += 1
        warnings.warn(f"images {list(key[0])} run without a CUDA graph: {reason}", stacklevel=2)

    def _evict(self) -> None:
        """Drops the graph used longest ago. Its memory may be written to at once, so the device is done with it."""
        self.graphs.finish()
        self.kept.popitem(last=False)
        self.evictions += 1

    def _bytes(self, new: Graph | None = None) -> int:
        """What the kept graphs take, and ``new``, which lies in the pool but is not kept yet."""
        graphs = [*self.kept.values(), *([] if new is None else [new])]
        return sum(graph.images.nbytes for graph in graphs) + (self.pool_bytes if graphs else 0)
