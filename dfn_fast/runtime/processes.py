"""Training and evaluation in several processes, started by ``torchrun``: one for each GPU, or several on a CPU.

Each process has the whole network and its slice of every batch; gradients are averaged while the backward pass still
runs (DistributedDataParallel), or weights, gradients and momenta are sharded too (FSDP). Batch norms take their
statistics, and losses their means, from the whole batch, so N processes compute what one would. A single process has
no process group, and nothing here costs it anything.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dfn_fast.errors import ConfigError, UserError

T = TypeVar("T")
PREFIX = "dfn_fast/"  # of our keys in the store of torchrun's agent


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees them. Except for ``share`` and ``device_name``, each method must be
    called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's slice of a batch. Raises :class:`ConfigError` if the batch does not divide evenly."""
        each, left_over = divmod(batch_size, self.size)
        if left_over:
            near = " or ".join(str(n * self.size) for n in (each, each + 1) if n)
            raise ConfigError(
                f"--batch-size {batch_size} is for the whole run and does not divide evenly among {self.size} "
                f"processes; use a multiple of {self.size}, such as {near}"
            )
        return slice(self.rank * each, (self.rank + 1) * each)

    def device_name(self, name: str) -> str:
        """The device of this process if ``--device`` is ``name``: each has its own GPU, or all share the CPU.

        Raises :class:`ConfigError` if one GPU is named for several processes, or if there are too few.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ConfigError(f"--device {name} is one for {self.size} processes; use cuda (a GPU for each) or cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: more processes than the {torch.cuda.device_count()} CUDA devices of this machine; "
                "lower --nproc_per_node, or use --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x``; overwrites it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of all processes' ``x``; overwrites it."""
        return self.sum(x) / self.size if self.size > 1 else x

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in at least one process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, joined in the order of their ranks."""
        lists: list[Any] = [items]
        if self.size > 1:
            lists = [None] * self.size
            dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def from_first(self, decide: Callable[[], T]) -> T:
        """Calls ``decide`` in the first process and returns its result, or raises its :class:`UserError`, in all."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [decide()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


ALONE = World()


def processes_here() -> int:
    """How many processes ``torchrun`` has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes() -> Iterator[World]:
    """The world that ``torchrun``'s environment describes, with a process group inside if it has several processes.

    CUDA tensors go through NCCL, all others through gloo. Only the first process writes to standard output.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    world = World(*(int(os.environ[name]) for name in names))
    agent = agent_store()
    store = None if agent is None else dist.PrefixStore(_start_name(agent, world), agent)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    where = {} if store is None else {"store": store, "rank": world.rank, "world_size": world.size}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **where)  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        if not world.is_first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield world
    # Not after an error: it would wait for the others, which may be waiting for this process in the middle of a sum.
    dist.destroy_process_group()


def agent_store() -> "dist.TCPStore | None":
    """The store of torchrun's agent, which outlives the workers; None if there is no agent or it does not share it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)


def _start_name(store: "dist.Store", world: World) -> str:
    """A name for this start of all processes, chosen by the first: the store still holds the addresses of those that
    died. The number of restarts would not do, because each machine's agent counts its own."""
    if not world.is_first:
        question = uuid.uuid4().hex
        store.set(f"{PREFIX}asks/{world.rank}", question)
        name = store.get(f"{PREFIX}answer/{question}").decode()  # waits for it
        store.set(f"{PREFIX}joined/{name}/{world.rank}", "")
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world.size))
    while missing:
        for rank in sorted(missing):
            asks = f"{PREFIX}asks/{rank}"
            if store.check([f"{PREFIX}joined/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([asks]):  # perhaps from one that died, so repeat until one has joined
                store.set(f"{PREFIX}answer/{store.get(asks).decode()}", name)
        time.sleep(0.01)
    return name


class Agent:
    """Keeps the run's folder in ``torchrun`` for the processes that it starts to replace dead ones.

    It lives in the store of torchrun's agent, so a folder found there belongs to this very run. Without torchrun, or
    if its agent does not share its store, nothing is kept.
    """

    KEY = PREFIX + "folder"

    def __init__(self):
        self.store = agent_store()

    def folder(self) -> Path | None:
        """The folder that an earlier start of this run kept; None at the first start."""
        if self.store is None or not self.store.check([self.KEY]):
            return None
        return Path(self.store.get(self.KEY).decode())

    def keep(self, folder: Path) -> None:
        if self.store is not None:
            self.store.set(self.KEY, str(folder))
