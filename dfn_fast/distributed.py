"""Training and evaluation in several processes, started by ``torchrun``: one for each GPU, or several on a CPU.

Each process has the whole network and its slice of every batch; gradients are averaged while the backward pass still
runs (DistributedDataParallel), or weights, gradients and momenta are sharded too (FSDP). Batch norms take the
statistics, and losses the means, of the whole batch: N processes compute what one would. One process alone has no
process group, and nothing here costs it anything.
"""

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.reference import ReferenceDFN

T = TypeVar("T")
PREFIX = "dfn_fast/"  # of our keys in the store of torchrun's agent


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees them. Each method but ``share`` and ``device_name`` must be called
    by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that shows and writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Which samples of a batch are this process's. Raises :class:`ConfigError` where they cannot be dealt out."""
        each, left_over = divmod(batch_size, self.size)
        if left_over:
            near = " or ".join(str(n * self.size) for n in (each, each + 1) if n)
            raise ConfigError(
                f"--batch-size {batch_size} is that of the whole run and cannot be dealt out to {self.size} processes "
                f"evenly; use a multiple of {self.size}, such as {near}"
            )
        return slice(self.rank * each, (self.rank + 1) * each)

    def device_name(self, name: str) -> str:
        """The device of this process where ``--device`` is ``name``: each has a GPU of its own, or all share the CPU.

        Raises :class:`ConfigError` where one GPU is named for several processes, or there are too few.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ConfigError(f"--device {name} is one for {self.size} processes; write cuda (a GPU for each) or cpu")
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
        """Whether ``flag`` is set in one process at least."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, one behind the other."""
        lists: list[Any] = [items]
        if self.size > 1:
            lists = [None] * self.size
            dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def from_first(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns in the first process, in all; a :class:`UserError` is raised in all too."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [decide()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


ALONE = World()


@contextlib.contextmanager
def processes() -> Iterator[World]:
    """The world that ``torchrun``'s environment describes: a process group inside where it has more than one process.

    CUDA tensors travel by NCCL, all others by gloo. Standard output is the first process's alone.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    world = World(*(int(os.environ[name]) for name in names))
    agent = agent_store()
    store = None if agent is None else dist.PrefixStore(start_name(agent, world), agent)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    where = {} if store is None else {"store": store, "rank": world.rank, "world_size": world.size}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **where)  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        if not world.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield world
    # Not after an error: the others may wait for this process in the middle of a sum, and would be waited for.
    dist.destroy_process_group()


def agent_store() -> "dist.TCPStore | None":
    """The store of torchrun's agent, which outlives the workers; None where there is no agent, or it lends none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)


def start_name(store: "dist.Store", world: World) -> str:
    """A name for this start of all processes, by the first of them: the store still holds the addresses of those that
    died. The number of restarts would not do, which the agents of several machines count each for itself."""
    if not world.first:
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
            elif store.check([asks]):  # perhaps of one that died: asked again until one has joined
                store.set(f"{PREFIX}answer/{store.get(asks).decode()}", name)
        time.sleep(0.01)
    return name


class Agent:
    """The folder of the run, kept by ``torchrun`` for the processes that it starts in place of those that died.

    It lives in the store of torchrun's agent: what one finds there, this very run began. Without torchrun, or where
    its agent lends no store, nothing is kept.
    """

    KEY = PREFIX + "folder"

    def __init__(self):
        self.store = agent_store()

    def folder(self) -> Path | None:
        """The folder that an earlier start of this run began; None at the first."""
        if self.store is None or not self.store.check([self.KEY]):
            return None
        return Path(self.store.get(self.KEY).decode())

    def keep(self, folder: Path) -> None:
        if self.store is not None:
            self.store.set(self.KEY, str(folder))


class _Sum(torch.autograd.Function):
    """The sum over all processes; each one's gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, each of which has as many values: ``nn.SyncBatchNorm`` in plain
    PyTorch, for CPUs, which that refuses, and for ``torch.compile``, which cannot take that whole.

    ``[B, C, H, W]``; statistics are float32 or better.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"expected [B, C, H, W], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        rank, size = dist.get_rank(), dist.get_world_size()
        features = x if x.dtype == torch.float64 else x.float()
        own_variance, own_mean = torch.var_mean(features, (0, 2, 3), correction=0)
        # A row for each process: no mean of squares, whose difference to the square of the mean would lose digits.
        own = F.pad(torch.stack([own_mean, own_variance])[None], (0, 0, 0, 0, rank, size - 1 - rank))
        means, variances = _Sum.apply(own).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        count = size * x.numel() // x.shape[1]
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], features, scale[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None  # a cumulative average would wait for the device
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked.add_(1)


def norm_layer(world: World, native: bool = False) -> Callable[[int], nn.Module]:
    """The norm layer of a network that trains in ``world``; ``native``: on a GPU, not compiled."""
    if world.size == 1:
        return nn.BatchNorm2d
    return nn.SyncBatchNorm if native else SyncBatchNorm


def valid_shares(world: World, labels: Tensor, targets: Tensor, ignore_index: int = 255) -> Tensor:
    """``[2]`` float32: what this process's means over the valid pixels of ``labels`` and of border ``targets`` must be
    multiplied with, so that the mean over processes is the mean over the valid pixels of all of them."""
    own = torch.stack([(x != ignore_index).sum() for x in (labels, targets)]).double()
    return (own * world.size / world.sum(own.clone()).clamp(min=1)).float()


def unused_parameters(model: ReferenceDFN) -> list[nn.Parameter]:
    """Parameters that no loss depends on. They never get a gradient, so nothing may wait for one."""
    if not model.has_border:
        return []
    whole: list[nn.Module] = [model.border_pre_rrbs, model.border_aft_rrbs, model.border_heads]
    modules = [model.border_aft_rrbs[0]] if model.alpha else whole
    return [parameter for module in modules for parameter in module.parameters()]


def data_parallel(loss: nn.Module, model: ReferenceDFN) -> DistributedDataParallel:
    """``loss``, of ``model``, with gradients that are averaged over all processes while the backward pass runs."""
    unused = {id(parameter) for parameter in unused_parameters(model)}
    ignored = [name for name, parameter in loss.named_parameters() if id(parameter) in unused]
    # Buffers are running statistics of the whole batch, the same everywhere: nobody needs another's.
    ignored += [name for name, _ in loss.named_buffers()]
    # A 1x1 weight that is channels_last has other strides than its gradient, but the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, ignored)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def shard(model: ReferenceDFN) -> None:
    """FSDP, in place: each block of the backbone, and all the rest, is whole only while it is at work.

    The rest is one: FastDFN reads the weights of RRBs and heads outside the ``forward`` of these modules, where nothing
    would gather them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone = model.backbone
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of ``whole``, which all have; itself where ``parameter`` is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor: its shard, or all of it."""
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(value: Any, keep: bool = True) -> Any:
    """``value`` with whole tensors on the CPU in place of shards. All processes must ask; one that does not ``keep``
    them gets None in their place."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    def gather(shard: DTensor) -> Tensor | None:
        whole = shard.full_tensor()
        return whole.cpu() if keep else None

    return tree_map_only(DTensor, gather, value)


def sharded_state(model: nn.Module, everywhere: bool = False) -> dict[str, Any]:
    """The whole state dict of a sharded model. All processes must ask: the first gets it on the CPU and the others
    nothing, or all of them ``everywhere`` on their devices."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))


def load_sharded_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a whole state dict, which all processes have, into a sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
