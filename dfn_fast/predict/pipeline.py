"""Reads, runs and writes at the same time, with a limited number of images, and of their bytes, in memory.

Images are read ahead in threads. Those of equal size make up a batch, which runs in the caller's thread (a network
belongs to one thread). Results are written in threads. Decoding and encoding release Python's lock, so all three
stages overlap.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import numpy as np

from dfn_fast.errors import UserError

MOST_BYTES = 1 << 31

Job = TypeVar("Job")
Image = TypeVar("Image")
Result = TypeVar("Result")


class NoMoreImages(Exception):
    """Raised by ``read`` at the end of a source such as a video. No job begins after it."""


class Pipeline(Generic[Job, Image, Result]):
    """``pipeline(jobs)`` reads, runs and writes all jobs.

    Args:
        read: ``read(job)`` returns its image; called in ``readers`` threads.
        run: ``run(images)`` returns a list with a result for each of 1 to ``batch_size`` images of equal size; called
            in the thread that calls the pipeline. If ``write`` needs the image, the result must contain it.
        write: ``write(job, result)``; called in ``writers`` threads. A single thread writes in the order of ``run``.
        report: ``report(job, error)``; called once for each job, with None after it has been written, else with its
            UserError, in the thread that calls the pipeline. Its exceptions end the run.
        size: ``size(image)`` is equal for all images of a batch.
        weigh: ``weigh(job)`` returns the bytes that reading the job takes; called in the caller's thread before it is
            read.

    Batches follow the order of ``jobs``, except for images that wait for others of their size. At most ``capacity``
    images are in memory at once, and no job is read before it fits into ``most_bytes`` with those that are, or is
    alone. If all sizes differ, or there is no room for more, batches are smaller.

    If a stage raises a UserError, its job has failed and the others go on. If a batch fails with one, its images run
    again one by one. Any other exception ends the run and is raised. The results so far are still written, except
    after an OSError (a full disk would fail for each of them). No thread outlives the call.
    """

    def __init__(
        self,
        read: Callable[[Job], Image],
        run: Callable[[list[Image]], list[Result]],
        write: Callable[[Job, Result], None],
        report: Callable[[Job, UserError | None], None],
        *,
        batch_size: int = 1,
        readers: int = 2,
        writers: int = 2,
        size: Callable[[Any], Hashable] = np.shape,
        weigh: Callable[[Job], int] = lambda job: 0,
        most_bytes: int = MOST_BYTES,
    ):
        self.read, self.run, self.write, self.report = read, run, write, report
        self.batch_size, self.readers, self.writers, self.size = batch_size, readers, writers, size
        self.weigh, self.most_bytes = weigh, most_bytes
        self.ahead = 2 * batch_size + readers  # being read, or waiting for a batch
        self.behind = batch_size + writers  # being written, or waiting for a thread
        self.capacity = self.ahead + batch_size + self.behind
        self._reading: deque[tuple[Job, Future[Image]]] = deque()
        self._waiting: list[tuple[Job, Image]] = []
        self._writing: deque[tuple[Job, Future[None]]] = deque()
        self._next: tuple[Job, int] | None = None  # has no room yet
        self._held: dict[Job, int] = {}  # bytes of the jobs between reading and writing

    def __call__(self, jobs: Iterable[Job]) -> None:
        self._read_threads = ThreadPoolExecutor(self.readers, "read")
        self._write_threads = ThreadPoolExecutor(self.writers, "write")
        cannot_write = False
        try:
            self._overlap(iter(jobs))
        except OSError:
            cannot_write = True
            raise
        finally:
            self._read_threads.shutdown(cancel_futures=True)
            self._write_threads.shutdown(cancel_futures=cannot_write)
            for queue in (self._reading, self._waiting, self._writing):
                queue.clear()
            self._held.clear()
            self._next = None

    def _overlap(self, jobs: Iterator[Job]) -> None:
        self._ended = False
        while True:
            self._read_ahead(jobs)
            self._take_read()
            self._take_written(self.behind)
            batch = self._next_batch()
            if batch:
                self._read_ahead(jobs)  # fills the places that the batch leaves while it runs
                self._run(batch)
            elif self._reading:
                wait([self._reading[0][1]])
            elif self._next is not None and self._writing:
                self._take_written(len(self._writing) - 1)  # makes room
            elif self._ended:
                break
        self._take_written(0)

    def _read_ahead(self, jobs: Iterator[Job]) -> None:
        while not self._ended and len(self._reading) + len(self._waiting) < self.ahead:
            if self._next is None:
                try:
                    job = next(jobs)
                except StopIteration:
                    self._ended = True
                    return
                try:
                    self._next = job, self.weigh(job)
                except UserError as error:
                    self.report(job, error)
                    continue
            job, held = self._next
            if self._held and sum(self._held.values()) + held > self.most_bytes:
                return
            self._next = None
            self._held[job] = held
            self._reading.append((job, self._read_threads.submit(self.read, job)))

    def _take_read(self) -> None:
        """Moves images that have been read to the list that waits for a batch, in the order of the jobs."""
        while self._reading and self._reading[0][1].done():
            job, future = self._reading.popleft()
            try:
                self._waiting.append((job, future.result()))
            except NoMoreImages:
                self._ended = True
            except UserError as error:
                self._end(job, error)

    def _next_batch(self) -> list[tuple[Job, Image]]:
        """The first full batch. If none can become full, the oldest image with the others of its size."""
        groups: dict[Hashable, list[tuple[Job, Image]]] = {}
        for entry in self._waiting:
            groups.setdefault(self.size(entry[1]), []).append(entry)
        full = [group for group in groups.values() if len(group) >= self.batch_size]
        if not full and not self._reading:  # all has been read, or there is no room to read more
            full = list(groups.values())
        if not full:
            return []
        batch = full[0][: self.batch_size]
        chosen = {id(entry) for entry in batch}
        self._waiting = [entry for entry in self._waiting if id(entry) not in chosen]
        return batch

    def _run(self, batch: list[tuple[Job, Image]]) -> None:
        try:
            results = self.run([image for _, image in batch])
        except UserError as error:
            if len(batch) == 1:
                self._end(batch[0][0], error)
                return
            results = None
        if results is None:
            for entry in batch:
                self._run([entry])
            return
        for (job, _), result in zip(batch, results, strict=True):
            self._writing.append((job, self._write_threads.submit(self.write, job, result)))

    def _take_written(self, most: int) -> None:
        """Reports the written results, and waits while more than ``most`` are not written yet."""
        while self._writing and (len(self._writing) > most or self._writing[0][1].done()):
            job, future = self._writing.popleft()
            try:
                future.result()
            except UserError as error:
                self._end(job, error)
            else:
                self._end(job, None)

    def _end(self, job: Job, error: UserError | None) -> None:
        del self._held[job]
        self.report(job, error)
