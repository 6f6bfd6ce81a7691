"""Training batches: order and augmentation depend only on the seed, whatever the number of workers."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dfn_fast.data.base import SegmentationDataset
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import ConfigError, DataError, UserError
from dfn_fast.runtime.machine import shared_memory_bytes
from dfn_fast.runtime.processes import processes_here
from dfn_fast.runtime.time_limit import within


class Batch(NamedTuple):
    """The input of one training step."""

    images: Tensor  # [B, 3, H, W] RGB uint8, channels_last
    labels: Tensor  # [B, H, W] uint8, 255 = ignore
    borders: Tensor  # [B, H, W] uint8 in {0, 1, 255}
    names: list[str]


class TrainLoader:
    """Batches of augmented samples, reshuffled for each epoch.

    Epoch ``e`` has ``len(dataset) // batch_size`` batches; the samples left over differ from epoch to epoch. Its
    order depends on ``(seed, e)``, and a sample's augmentation on ``(seed, e, index)``. Workers live from the first
    epoch to the end; with 0 ``workers`` the main process loads. Only one epoch can be read at a time.
    ``share``: the samples of each batch to load, if several processes share it.

    If a worker dies, or a batch takes more than ``timeout`` seconds (0: no limit), a :class:`DataError` names the
    samples that were being loaded. All workers are then killed, and the next epoch starts new ones. Without workers
    a thread of the main process loads, and a file that hangs keeps it until the process ends.

    Raises:
        ConfigError: the data set is smaller than a batch, the seed is negative, or the system's shared memory is too
            small for the batches of the workers.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: TrainTransform,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        timeout: float = 300,
        pin_memory: bool = False,
        share: slice = slice(None),
    ):
        if batch_size < 1:
            raise ConfigError(f"batch size: expected 1 or more, got {batch_size}")
        if batch_size > len(dataset):
            raise ConfigError(
                f"batch size {batch_size} is more than the {len(dataset)} images of split {dataset.split!r} of "
                f"data set {dataset.name!r}: no batch would be full; lower it to at most {len(dataset)} or add images"
            )
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        self.size, self.batch_size, self.seed, self.share = len(dataset), batch_size, seed, share
        self._keys: list[list[SampleKey]] = []  # of the current epoch; the DataLoader reads it at each start
        self._dataset, self._timeout, self._pin_memory, self._worker_count = dataset, timeout, pin_memory, workers
        self._hung: str | None = None  # the error after a timeout
        self._progress = torch.zeros(workers or 1, 3, dtype=torch.float64).share_memory_()
        self._samples = AugmentedSamples(dataset, transform, seed, self._progress)
        self._require_shared_memory()
        self._loader = self._new_loader()

    def _require_shared_memory(self) -> None:
        """Raises :class:`ConfigError` if the batches that wait for training do not fit into the system's shared memory.

        A process that writes past its end would be killed, or wait for good.
        """
        height, width = self._samples.transform.crop
        each = len(range(self.batch_size)[self.share]) * height * width * 5  # image, label and border target
        # Each worker prepares two in advance; one is in use, and one on its way.
        needed = (2 * self._worker_count + 2) * each * processes_here()
        free = shared_memory_bytes()
        if self._worker_count and free is not None and needed > free:
            raise ConfigError(
                f"--workers {self._worker_count} needs up to {needed / 1e6:.1f} MB in /dev/shm, for the batches that "
                f"wait, but {free / 1e6:.1f} MB are free; make it larger (docker run "
                f"--shm-size={needed // 2**30 + 1}g), lower --workers, --batch-size or --crop, or use --workers 0"
            )

    def _new_loader(self) -> DataLoader:
        self._started = False
        return DataLoader(
            self._samples,
            batch_sampler=self._keys,
            num_workers=self._worker_count,
            collate_fn=collate,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(start_worker, progress=self._progress),
            persistent_workers=self._worker_count > 0,
            generator=torch.Generator(),  # each start draws a number, which must not come from torch's global state
        )

    def __len__(self) -> int:
        """Batches in an epoch; the last partial one is dropped."""
        return self.size // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on.

        An error in a data set's file is raised here unchanged, whichever process found it.
        """
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).permutation(self.size)
        batches = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)[start:, self.share]
        self._keys[:] = [[SampleKey(epoch, index) for index in batch] for batch in batches.tolist()]
        with self.watched():
            for batch in self._in_time():
                if isinstance(batch, UserError):
                    try:
                        raise batch
                    finally:
                        del batch  # it and this frame would hold each other, and the workers would outlive their loader
                yield batch

    def _in_time(self) -> Iterator[Batch | UserError]:
        """The loader's batches. If one takes longer than the limit, all workers are killed, which ends the wait.

        PyTorch's own ``timeout`` waits without a limit if a worker hangs between sending a batch and handing over
        its memory.
        """
        # The first call forks, which is better done without a thread of ours.
        with self._time_limit() if self._started else _signals_held_back():
            batches = iter(self._loader)
        self._started = True
        while True:
            with self._time_limit():
                batch = self._next(batches)
            if batch is None:
                return
            yield batch

    def _next(self, batches: Iterator[Batch | UserError]) -> Batch | UserError | None:
        if self._worker_count:
            return next(batches, None)
        silent = _Silent()
        try:
            return within(self._timeout, lambda: next(batches, None), silent)
        except _Silent:
            raise DataError(self._silence("the main process")) from None

    @contextlib.contextmanager
    def _time_limit(self) -> Iterator[None]:
        timer = threading.Timer(self._timeout, self._kill_silent)
        timer.daemon = True
        watching = bool(self._timeout and self._worker_count)
        if watching:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if watching:
                timer.join()  # its thread must not be the last to hold the loader, or it ends the workers beside ours

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a worker's death or timeout into a :class:`DataError`, and ends all workers.

        PyTorch reports a death from a signal handler, wherever the main thread is, so a loop over batches belongs in
        this context too.
        """
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            with _ignored_child_signals():
                text = self._hung or self._death(error)
                if text is None:
                    raise
                self._end_workers()
            raise DataError(text) from None

    def _death(self, error: Exception) -> str | None:
        """The message if a worker's death caused ``error``, else None."""
        reason = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, RuntimeError):
            if not re.match(r"DataLoader worker \(pid|Pin memory thread exited", reason):
                return None
        else:
            time.sleep(0.5)  # a worker's connections break before it has ended
        alive = {process.pid for process in multiprocessing.active_children()}
        dead = [row for row in self._progress.tolist() if row[0] and row[0] not in alive]
        if not dead and not isinstance(error, RuntimeError):
            return None
        return (
            f"a loading process has died ({reason.rstrip('. ')}). It was at:{self._samples_text(dead)}\nCheck these "
            "files and the memory: a system that runs out of it kills processes, and fewer --workers need less. "
            "--workers 0 loads in the main process and shows its error"
        )

    def _kill_silent(self) -> None:
        self._hung = self._silence("the loading processes")
        for worker in self._workers():
            worker.kill()

    def _silence(self, loading: str) -> str:
        """The message if no batch came in time."""
        return (
            f"no batch came from {loading} for {self._timeout:g} s (--loader-timeout). At work:"
            f"{self._samples_text(self._progress.tolist())}\nIs a file damaged, or its file system gone? "
            "A slow one needs a higher --loader-timeout, or more --workers"
        )

    def _samples_text(self, rows: list[list[float]]) -> str:
        """The samples that the workers of these rows of ``_progress`` are loading, one per line."""
        lines = [
            f"{sample_text(self._dataset, int(number) - 1)}, for {time.time() - start:.0f} s"
            for _, number, start in rows
            if number
        ]
        return "\n  ".join(["", *lines]) if lines else " no sample, or between two"

    def _workers(self) -> list[BaseProcess]:
        pids = {int(pid) for pid, _, _ in self._progress.tolist()}
        return [process for process in multiprocessing.active_children() if process.pid in pids]

    def _end_workers(self) -> None:
        """Kills the workers: one that hangs obeys no other signal. The next epoch starts new ones."""
        workers = self._workers()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(10)  # a process that hangs in the kernel, as after a lost disk, ends only with the machine
        self._hung = None
        self._progress.zero_()
        self._loader = self._new_loader()


class _Silent(Exception):
    """No batch came in time."""


def sample_text(dataset: SegmentationDataset, number: int) -> str:
    """The files of a sample, or its name if it has none. A user's own data set may have neither."""
    pairs, names = getattr(dataset, "pairs", None), getattr(dataset, "names", None)
    if pairs:
        return f"{pairs[number].image} with {pairs[number].label}"
    return f"sample {repr(names()[number]) if names else number} of split {dataset.split!r}"


class SampleKey(NamedTuple):
    """Names one augmented sample; sent to the process that makes it."""

    epoch: int
    number: int  # in the data set


@dataclass
class AugmentedSamples(Dataset):
    """``samples[key]``: image, label, border target and name, or the error that prevented them.

    Errors are returned, because torch would wrap a raised one in a worker's traceback.
    """

    dataset: SegmentationDataset
    transform: TrainTransform
    seed: int
    # [workers, or 1 for the main process, 3], in memory that all share: pid, number in the data set + 1, start time
    progress: Tensor

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, np.ndarray, np.ndarray, str] | UserError:
        worker = get_worker_info()
        row = 0 if worker is None else worker.id
        self.progress[row, 1:] = torch.tensor([key.number + 1, time.time()], dtype=torch.float64)
        try:
            return self.make(key)
        finally:
            self.progress[row, 1] = 0

    def make(self, key: SampleKey) -> tuple[np.ndarray, np.ndarray, np.ndarray, str] | UserError:
        try:
            image, label, name = self.dataset[key.number]
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
            return *self.transform(image, label, rng), name
        except UserError as error:
            return error
        except (MemoryError, cv2.error) as error:
            return DataError(
                f"{sample_text(self.dataset, key.number)}: this sample cannot be scaled and cropped ({error}); is the "
                "image too large for --scales, or is there too little memory for --workers?"
            )


def collate(samples: list) -> Batch | UserError:
    """The samples as one batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, labels, borders, names = zip(*samples, strict=True)
    stacked = [torch.from_numpy(np.stack(arrays)) for arrays in (images, labels, borders)]
    return Batch(stacked[0].permute(0, 3, 1, 2), stacked[1], stacked[2], list(names))


def start_worker(worker: int, progress: Tensor) -> None:
    """Records the worker's process id, limits OpenCV to one thread, and leaves signals to the main process.

    Torch's loader itself limits torch to one thread. Ctrl-C and a cluster's SIGTERM reach every process of the run.
    The main one saves and then ends its workers; a worker that exited by itself would break the saving.
    """
    progress[worker, 0] = os.getpid()
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """Waits for a SIGTERM from ``parent`` and exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM inside, also in the processes started there, until those can ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _ignored_child_signals() -> Iterator[None]:
    """Disables PyTorch's handler, which would raise for a worker that we end ourselves until it is waited for."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
