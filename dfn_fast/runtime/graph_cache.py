"""CUDA graphs by image size: each size is captured once, and its later images are one launch each.

All graphs share one memory pool, so together they need about as much as the largest. No two may run at once: each call
waits for the one before it, on the device only, and returns a new tensor.
"""

import contextlib
import threading
import warnings
from collections import Counter, OrderedDict
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
    """The CUDA operations of a :class:`GraphCache`. Each cache has its own, which holds its pool and event."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.side = SideStream(self.device)
        self.event = torch.cuda.Event()
        self.new_pool()

    def new_pool(self) -> None:
        """Makes later captures use a new memory pool. The old one is freed once its graphs are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def pool_bytes(self) -> int:
        """The bytes that the pool has taken from the device, whatever other threads allocate meanwhile."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))

    def free_bytes(self) -> int:
        """The device's free memory, with what PyTorch has reserved and does not use."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """Runs ``run`` eagerly a few times, so that it compiles, chooses algorithms and allocates."""
        with torch.cuda.device(self.device):
            for _ in range(WARM_UP):
                self.side(run)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Captures ``run`` without running it; returns the function that replays it and its result's tensor.

        The replay goes to the current stream. Synchronises the device. Raises ``RuntimeError`` with the reason if the
        capture fails; streams are then as they were.
        """
        graph, reason = torch.cuda.CUDAGraph(), ""
        # The outer stream context restores the caller's stream: torch.cuda.graph does not if its capture fails.
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
        # Always the same stream, as memory is reused only on its own stream; thread_local as in cuda_graph.capture.
        return torch.cuda.graph(graph, pool=pool, stream=self.side.stream, capture_error_mode="thread_local")

    def _clean_up(self) -> None:
        """Ends what a failed capture may leave open: in older versions of torch the pool's recording, and the random
        generator's capture, which would last until the next one that succeeds."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        current = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with contextlib.suppress(RuntimeError), current, self._capturing(torch.cuda.CUDAGraph(), None):
            torch.zeros(1, device=self.device)

    def wait(self) -> None:
        """Makes the current stream wait until the device has passed the last ``record``."""
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def record(self) -> None:
        """Marks this point of the current stream."""
        self.event.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Makes the host wait until the device has passed the last ``record``."""
        self.event.synchronize()


@dataclass
class Graph:
    """A captured ``run``: its input, its output and the function that replays it."""

    images: Tensor
    labels: Tensor
    replay: Replay


class GraphCache:
    """``cache(images)`` is ``run(images)``, replayed from the graph of that shape and dtype or captured first.

    Args:
        run: takes a tensor on the device, ``[B, H, W, 3]`` uint8, and returns one, such as labels, without
            synchronising the host. It runs without gradients. The weights that it reads must stay where they are:
            :meth:`clear` the cache after moving them.
        limit_bytes: for the pool and the graphs' inputs together; the driver's memory for launches is not counted.
            None: a quarter of the device's memory that is free now. The least recently used graph is dropped first. A
            pool shrinks only as a whole: one that has outgrown the limit is dropped with all its graphs, and the newest
            is captured again in a new one. ``ConfigError`` below 1.
        graphs: defaults to those of the current CUDA device.
        capture_at: a shape runs eagerly until it has come this many times: a capture costs several passes, which a
            shape that hardly comes again does not repay.

    If the capture of a shape fails, or its graph by itself is larger than the limit, that shape runs eagerly from then
    on, with one warning. Any thread may call, on any stream. Raises ``ValueError`` for images on another device.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        *,
        limit_bytes: int | None = None,
        graphs: CudaGraphs | None = None,
        capture_at: int = 3,
    ):
        if limit_bytes is not None and limit_bytes < 1:
            raise ConfigError(f"graph_cache_bytes {limit_bytes}: expected a positive number of bytes, such as 2**31")
        self.graphs = CudaGraphs(torch.device("cuda")) if graphs is None else graphs
        self.run, self.capture_at = run, capture_at
        self.limit_bytes = self.graphs.free_bytes() // 4 if limit_bytes is None else limit_bytes
        self.kept: OrderedDict[Key, Graph] = OrderedDict()  # the most recently used last
        self.eager: set[Key] = set()
        self.seen: Counter[Key] = Counter()  # how often a shape without a graph has come
        self.pool_bytes = self.hits = self.captures = self.evictions = self.failures = 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.device != self.graphs.device:
            raise ValueError(f"expected images on {self.graphs.device}, got {images.device}")
        with self.lock:
            graph = self._graph(images, self.capture_at)
            if graph is not None:
                return self._replay(graph, images)
        return self.run(images)

    @torch.no_grad()
    def warm_up(self, shapes: Iterable[Sequence[int]]) -> None:
        """Captures graphs for uint8 images of ``shapes``, each ``[B, H, W, 3]``, the largest ``B * H * W`` first,
        so that the smaller ones find their memory in the pool."""
        for shape in sorted((torch.Size(shape) for shape in shapes), key=lambda s: s.numel(), reverse=True):
            with self.lock:
                if (shape, torch.uint8) not in self.kept:
                    self._graph(torch.zeros(shape, dtype=torch.uint8, device=self.graphs.device), capture_at=1)

    def clear(self) -> None:
        """Drops all graphs, once the device has finished with them. Shapes that run eagerly continue to do so."""
        with self.lock:
            while self.kept:
                self._evict()

    def statistics(self) -> dict[str, int]:
        """``hits``: calls that found their graph; ``captures``; ``evictions``; ``failures``: captures that failed and
        graphs larger than the limit; ``bytes``: those that count towards the limit now."""
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

    def _graph(self, images: Tensor, capture_at: int) -> Graph | None:
        """The graph for these images, captured if their shape has come so often; None if they run eagerly."""
        key = (images.shape, images.dtype)
        if key in self.eager:
            return None
        graph = self.kept.get(key)
        if graph is not None:
            self.hits += 1
            self.kept.move_to_end(key)
            return graph
        self.seen[key] += 1
        if self.seen[key] < capture_at:
            return None
        self.graphs.wait()  # replays use resources of the stream that warms up, such as cuBLAS's workspace
        try:
            graph = self._add(key, images)
        finally:
            self.graphs.record()
        return graph

    def _add(self, key: Key, images: Tensor) -> Graph | None:
        """Captures a new graph and keeps it; None if that is not possible."""
        with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
            own = torch.empty(images.shape, dtype=images.dtype, device=self.graphs.device)
        own.copy_(images)
        self.graphs.warm_up(lambda: self.run(own))  # an error here is the function's own, and the caller's to see
        graph = self._capture_within_limit(key, own)
        if graph is not None:
            self.kept[key] = graph
        return graph

    def _capture_within_limit(self, key: Key, images: Tensor) -> Graph | None:
        """A graph that fits beside those kept, after evictions; None, with a warning, if it does not fit."""
        alone = not self.kept
        graph = self._capture(key, images)
        while graph is not None and self.kept and self._bytes(graph) > self.limit_bytes:
            self._evict()
        if graph is not None and not alone and self._bytes(graph) > self.limit_bytes:
            graph = None  # so that its pool is freed before the next one grows
            graph = self._capture(key, images)
        if graph is not None and self._bytes(graph) > self.limit_bytes:
            self._give_up(
                key,
                f"its graph takes {self._bytes(graph):,} bytes, more than the {self.limit_bytes:,} that "
                "graph_cache_bytes allows",
            )
            graph = None
        return graph

    def _capture(self, key: Key, images: Tensor) -> Graph | None:
        if not self.kept:
            self.graphs.new_pool()  # PyTorch does not capture into a pool whose graphs are all gone
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
        """Drops the least recently used graph. Its memory may be reused at once, so this waits for the device."""
        self.graphs.finish()
        self.kept.popitem(last=False)
        self.evictions += 1

    def _bytes(self, new: Graph | None = None) -> int:
        """The bytes of the kept graphs and of ``new``, which lies in the pool but is not kept yet."""
        graphs = [*self.kept.values(), *([] if new is None else [new])]
        return sum(graph.images.nbytes for graph in graphs) + (self.pool_bytes if graphs else 0)
