"""The parts of a training run: optimiser, schedule, step, and the state that a run continues from, bit by bit."""

import contextlib
import copy
import importlib.util
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfn_fast.checkpoint import SHOWN, load_weights
from dfn_fast.config import TrainConfig
from dfn_fast.cuda_graph import GraphedStep, SideStream, capture
from dfn_fast.data.loader import Batch
from dfn_fast.data.transforms import normalize, scale_and_shift
from dfn_fast.distributed import (
    ALONE,
    DistributedDataParallel,
    World,
    data_parallel,
    gathered,
    load_sharded_state,
    local,
    norm_layer,
    shard,
    shard_like,
    sharded_state,
    valid_shares,
)
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.losses import SigmoidFocalLoss
from dfn_fast.memory import set_memory
from dfn_fast.model import FastDFN
from dfn_fast.reference import ReferenceDFN
from dfn_fast.regions import region

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED = 20  # fp16 steps in a row: each halves the scale of the loss, from 65536 down to 1/16


class NonFiniteLoss(UserError):
    """A loss, gradient or weight is nan or infinite; the text says which, since which iteration, and what to try."""


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """``"auto"``: CUDA where there is one, else the CPU; a device that is not there is an error."""
    name = world.device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device; write cuda, cuda:1, cpu or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use cpu or auto"
        )
    return device


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" or has_bf16_units() else "off"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    return AMP_DTYPES.get(name)


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX): several times as fast as float32 then."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def choose_compile(choice: bool | None, device: torch.device) -> bool:
    """None: on CUDA where there is a Triton to compile with; never on a CPU, where it slows training."""
    if choice is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return choice


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps are compiled; those of FSDP, which gathers weights in their midst, are not."""
    return choose_compile(config.compile, device) and not config.fsdp


def build_model(config: TrainConfig, num_classes: int, world: World = ALONE) -> ReferenceDFN:
    """The network of ``config``, with ImageNet or DFN weights where it asks for them."""
    focal = SigmoidFocalLoss(config.focal_alpha, config.focal_gamma, torchseg=config.focal == "torchseg")
    network = FastDFN if config.model == "fast" else ReferenceDFN
    device = choose_device(config.device, world)
    native = device.type == "cuda" and not compiles(config, device)
    model = network(
        num_classes,
        aux_criterion=focal,
        alpha=config.border_weight,
        pretrained_model=config.pretrained,
        norm_layer=norm_layer(world, native),
        **config.model_settings(),
    )
    if config.memory != "off":
        set_memory(model, config.memory)
    if config.weights is not None:
        mismatch = load_weights(model, config.weights, strict=config.strict)
        if mismatch:
            print(f"{config.weights}: loaded what fits; {mismatch}", file=sys.stderr)
    return model


def parameter_groups(model: ReferenceDFN, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for SGD: backbone and new layers, each with its weights apart from its norm layers and biases."""
    groups = []
    for modules, factor in (([model.backbone], 1.0), (model.business_layer, config.new_layer_lr)):
        weights: list[Tensor] = []
        others: list[Tensor] = []
        for module in (m for top in modules for m in top.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                plain = isinstance(module, _BatchNorm) or name == "bias"
                (others if plain else weights).append(parameter)
        groups.append({"params": weights, "lr_factor": factor, "weight_decay": config.weight_decay})
        decay = config.weight_decay if config.decay_norm_and_bias else 0.0
        groups.append({"params": others, "lr_factor": factor, "weight_decay": decay})
    return groups


def poly(iteration: int, iterations: int, power: float) -> float:
    """The poly policy's factor of the learning rate at ``iteration`` (from 0)."""
    return (1 - iteration / iterations) ** power


def require_possible(config: TrainConfig, world: World) -> None:
    """Raises :class:`ConfigError` where an option does not go with the number of processes."""
    if config.fsdp and world.size == 1:
        raise ConfigError(
            "--fsdp deals weights out to several processes, and this is one; start it with torchrun, or add --no-fsdp"
        )
    if config.cuda_graph and world.size > 1:
        raise ConfigError("--cuda-graph records the work of one process alone; leave it out with several")


@dataclass
class Position:
    """How far a run is: what a checkpoint keeps besides the trainer's state."""

    epoch: int = 0
    step: int = 0  # optimiser steps done in this epoch
    iteration: int = 0  # optimiser steps done in the run
    loss_sum: float = 0.0  # over this epoch's steps
    seconds: float = 0.0  # of training, without validation
    best_mean_iou: float = -1.0
    last_mean_iou: float = -1.0
    per_class_iou: list[float] = field(default_factory=list)
    skipped_steps: int = 0  # in the run, as their gradients overflowed fp16
    skipped_in_a_row: int = 0  # up to now


class Gradients(NamedTuple):
    """What is kept of a step's gradients."""

    names: list[str]  # of the parameters that have one
    finite: Tensor  # [P] bool, on the device


class TrainingLoss(nn.Module):
    """The forward pass of a step as one function, which ``torch.compile`` makes one graph of.

    uint8 images ``[B, 3, H, W]``, labels and border targets ``[B, H, W]`` -> the loss, a scalar; ``shares``: see
    :func:`dfn_fast.losses.dfn_loss`. ``dtype`` is that of the normalised images; what autocast would make of them
    anyway is best made at once.
    """

    def __init__(self, model: ReferenceDFN, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        # Inputs of the compiled graph: built inside it they would be copied to the device, waiting, at every step.
        self.constants = scale_and_shift(device, torch.float64 if dtype == torch.float64 else torch.float32)

    def forward(self, images: Tensor, labels: Tensor, borders: Tensor, shares: Tensor | None = None) -> Tensor:
        return self.model(normalize(images, self.dtype, self.constants), labels, borders, shares)


def compile_loss(loss: TrainingLoss) -> nn.Module:
    """``loss`` compiled for one shape of batch, as a single graph: a break in it would be an error."""
    return torch.compile(loss, fullgraph=True, dynamic=False, options=inductor_options())  # type: ignore[return-value]


def inductor_options() -> dict[str, Any]:
    """Without the first, Inductor leaves channels_last where any 3x3 convolution has half as many outputs as inputs or
    fewer, as the composed convolution of a head does."""
    import torch._inductor  # not at the top: it takes a second, and most runs on a CPU never need it

    wanted = {"force_layout_optimization": True}
    if torch.are_deterministic_algorithms_enabled():
        wanted["deterministic"] = True  # or it would choose among kernels by timing them
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


class Trainer:
    """Network, optimiser and scaler on a device, and one optimiser step as a call.

    ``step(batches)`` averages the gradients of ``config.accumulate`` batches and returns their mean loss, a scalar on
    the device: reading it is the caller's choice. Nothing in a step waits for the device. ``gradients`` tells which of
    the last step's were finite.

    In a ``world`` of several processes each has its slice of every batch, and the loss of a step is the mean of what
    they return.
    """

    def __init__(
        self,
        model: ReferenceDFN,
        config: TrainConfig,
        iterations: int,
        device: torch.device,
        world: World = ALONE,
    ):
        self.config, self.iterations, self.device, self.world = config, iterations, device, world
        require_possible(config, world)
        self.amp = choose_amp(config.amp, device)
        self.network_name = type(model).__name__
        self.model = model.to(device)
        self.compiled = compiles(config, device)
        if config.fsdp:
            self.bare = copy.deepcopy(self.model).to("meta")  # the network without its weights
            shard(self.model)  # which wants weights in their plain memory format
        elif config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = TrainingLoss(self.model, device, self.amp or torch.float32)
        self.loss: nn.Module = compile_loss(loss) if self.compiled else loss
        if world.size > 1 and not config.fsdp:
            self.loss = data_parallel(self.loss, self.model)
        # Fused: one pass over weights, gradients and momenta, and no waiting for the scaler's verdict in fp16.
        fused = device.type in ("cuda", "cpu") and not config.fsdp  # which fused SGD does not know
        self.update = {"fused": True} if fused else {"foreach": True}
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config),
            lr=config.lr,
            momentum=config.momentum,
            **self.update,  # type: ignore[arg-type]
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.named_parameters = list(self.model.named_parameters())
        self.gradients: Gradients | None = None
        self.graph: GraphedStep | None = None
        if config.cuda_graph:
            if device.type != "cuda":
                raise ConfigError(f"--cuda-graph needs a CUDA device, but this run is on {device}; leave it out")
            self.graph = GraphedStep(self.forward_backward, SideStream(device), capture)

    def step(self, batches: Sequence[Batch], iteration: int) -> Tensor:
        """One optimiser step, number ``iteration`` (from 0) of the run."""
        self.model.train()
        self.set_lr(iteration)
        run = self.graph or self.forward_backward
        losses = []
        for number, batch in enumerate(batches, 1):
            with self.averaging(number == len(batches)):
                losses.append(run(*(x.to(self.device, non_blocking=True) for x in batch[:3])))
        with region("optimizer"):
            self.gradients = self.look_at_gradients()
            if self.scaler.is_enabled() and not self.optimizer.state:
                self.start_momenta()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not (self.graph and self.graph.captured):
                self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    def look_at_gradients(self) -> Gradients:
        """Which gradients are finite, by their norms: a sum over all elements that keeps what is not."""
        named = [(name, local(p.grad)) for name, p in self.named_parameters if p.grad is not None]
        norms = torch._foreach_norm([gradient for _, gradient in named])
        return Gradients([name for name, _ in named], torch.isfinite(torch.stack(norms)))

    def start_momenta(self) -> None:
        """Momenta of 0, which make the first step what it is without. The fused update would allocate them, leave them
        as they are where that step is skipped, and take them for the step's momenta in the next.
        """
        if self.config.momentum:
            for _, p in self.named_parameters:
                if p.grad is not None:
                    self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def forward_backward(self, images: Tensor, labels: Tensor, borders: Tensor) -> Tensor:
        """The loss of a batch, and its share of the step's gradients."""
        with self.autocast():
            loss = self.loss(images, labels, borders, *self.shares(labels, borders))
        with region("backward"):
            self.scaler.scale(loss / self.config.accumulate).backward()
        return loss.detach()

    def shares(self, labels: Tensor, borders: Tensor) -> tuple[Tensor, ...]:
        """What the losses of this process's slice count in those of the batch; nothing where it is the batch."""
        if self.world.size == 1:
            return ()
        shares = valid_shares(self.world, labels, borders)
        if self.config.focal == "torchseg":
            shares[1] = 1.0  # a mean over all pixels, of which every process has as many
        return (shares,)

    def averaging(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients of several passes are added up first, and averaged over the processes in the ``last`` one."""
        parallel = isinstance(self.loss, DistributedDataParallel)
        return self.loss.no_sync() if parallel and not last else contextlib.nullcontext()  # type: ignore[operator]

    def execution(self) -> dict[str, Any]:
        """How the steps run, all choices made: for the record."""
        return {
            "model": self.network_name,
            "amp": {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[self.amp],
            "channels_last": self.config.channels_last,
            "compile": self.compiled,
            "memory": self.config.memory,
            "cuda_graph": self.config.cuda_graph,
            "processes": self.world.size,
            "fsdp": self.config.fsdp,
        }

    def description(self) -> str:
        """:meth:`execution` as a line for people."""
        chosen = self.execution()
        parts = [f"{chosen['model']} on {self.device}", "float32" if self.amp is None else f"{chosen['amp']} autocast"]
        parts += [name for name in ("channels_last", "cuda_graph") if chosen[name]]
        parts += ["compiled" if self.compiled else "not compiled"]
        parts += [f"recomputing {chosen['memory']}"] if chosen["memory"] != "off" else []
        parts += [f"{self.world.size} processes" + ", sharded" * chosen["fsdp"]] if self.world.size > 1 else []
        return ", ".join(parts)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def set_lr(self, iteration: int) -> None:
        """The poly policy, for every group."""
        for group in self.optimizer.param_groups:
            factor = poly(iteration, self.iterations, self.config.power)
            group["lr"] = self.config.lr * group["lr_factor"] * factor

    @property
    def lr(self) -> float:
        """The backbone's learning rate in the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def require_finite_weights(self, iteration: int) -> None:
        """Raises :class:`NonFiniteLoss`, in all processes alike, where a weight, or a statistic of a norm layer, is nan
        or infinite: such a network is never saved.
        """
        tensors = {name: local(x) for name, x in self.model.state_dict().items() if x.is_floating_point()}
        finite = torch.isfinite(torch.stack(torch._foreach_norm(list(tensors.values()))))
        broken = self.world.gather(broken_names(tensors, finite))
        if broken:
            raise NonFiniteLoss(
                f"the weights are no longer finite after iteration {iteration}: {some(broken, len(tensors))}; "
                f"{self.advice()}"
            )

    def network(self, state: dict[str, Tensor] | None = None) -> ReferenceDFN:
        """The whole network, for inference: with the weights ``state``, or as it stands, for which all processes of a
        sharded one must ask."""
        if not self.config.fsdp:
            if state is not None:
                self.model.load_state_dict(state)
            return self.model
        network = copy.deepcopy(self.bare)
        network.load_state_dict(sharded_state(self.model, everywhere=True) if state is None else state, assign=True)
        return network.to(self.device)

    def advice(self) -> str:
        """What the steps were made with, and what to change where they end in nan or infinity."""
        scale = f", the scale of the loss {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        wider = {torch.float16: ", or use --amp bf16", torch.bfloat16: ", or use --amp off", None: ""}[self.amp]
        return f"the learning rate was {self.lr:.2e}{scale}: lower --lr{wider}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer: the same with FSDP, whose shards all processes gather together."""
        model = sharded_state(self.model) if self.config.fsdp else self.model.state_dict()
        return {
            "model": {name: tensor.contiguous() for name, tensor in model.items()},
            "optimizer": gathered(self.optimizer.state_dict(), self.world.first),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        if self.config.fsdp:
            load_sharded_state(self.model, state["model"])
        else:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update({"fused": None, "foreach": None, **self.update})  # the file says how it was updated before
        for parameter, kept in self.optimizer.state.items():
            momentum = kept.get("momentum_buffer")
            if momentum is not None:  # a fused update takes both for memory of the same order
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(shard_like(momentum, parameter))
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds PyTorch, NumPy and Python; ``deterministic``: see :func:`choose_algorithms`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    choose_algorithms(deterministic)


def choose_algorithms(deterministic: bool) -> None:
    """Asks for deterministic algorithms, with a warning where there is none, or for the fastest ones.

    To be called before the first product of matrices on a GPU: cuBLAS looks at its workspace's size then.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def random_state() -> dict[str, Any]:
    """The state of every random generator in the process, as tensors and plain values that ``weights_only`` loads."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`; generators of other devices than today's are left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def broken_names(names: Iterable[str], finite: Tensor) -> list[str]:
    return [name for name, good in zip(names, finite.tolist(), strict=True) if not good]


def some(broken: list[str], count: int) -> str:
    """The first few of some names, which may be there twice, and how many of ``count`` they are."""
    broken = list(dict.fromkeys(broken))
    return f"{', '.join(broken[:SHOWN])}{', ...' if len(broken) > SHOWN else ''} ({len(broken)} of {count})"


class Pending(NamedTuple):
    iteration: int  # from 0
    loss: Tensor  # scalar, on the device
    names: list[str]  # of the images
    gradients: Gradients | None


class LossWatch:
    """Losses that stay on the device until they are read, with the images that each came from and its gradients.

    Reading waits for the device, so it is done every few iterations there; what is not finite is found then. In fp16
    the scaler has skipped a step whose gradients overflowed: ``position`` counts it. A loss that is not finite is an
    error in every precision: what made it so is in the statistics of the norm layers for good.
    """

    def __init__(self, trainer: Trainer | None = None, position: Position | None = None):
        self.trainer, self.position = trainer, position or Position()
        self.world = trainer.world if trainer else ALONE
        self.pending: list[Pending] = []

    def add(self, iteration: int, loss: Tensor, names: list[str]) -> None:
        """The last step's."""
        self.pending.append(Pending(iteration, loss, names, self.trainer.gradients if self.trainer else None))

    def read(self) -> list[float]:
        """The losses since the last call, of whole batches. Raises :class:`NonFiniteLoss` with iteration, images and
        parameters, in all processes alike."""
        if not self.pending:
            return []
        values = self.world.mean(torch.stack([self._verdict(step) for step in self.pending])).tolist()
        for (loss, finite), step in zip(values, self.pending, strict=True):
            if not np.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss is {loss} at iteration {step.iteration + 1}; the images were {self._images(step)}. "
                    f"Look at these images and labels; {self._advice()}"
                )
            self._judge_gradients(step, loss, finite == 1)
        self.pending.clear()
        return [loss for loss, _ in values]

    @staticmethod
    def _verdict(step: Pending) -> Tensor:
        """``[2]``: the loss, and 1 where all gradients are finite."""
        finite = torch.ones_like(step.loss) if step.gradients is None else step.gradients.finite.all()
        return torch.stack((step.loss, finite.to(step.loss.dtype)))

    def _judge_gradients(self, step: Pending, loss: float, finite: bool) -> None:
        position = self.position
        if finite:
            position.skipped_in_a_row = 0
            return
        if self.trainer is None or not self.trainer.scaler.is_enabled():
            raise NonFiniteLoss(
                f"the loss is {loss:.4g} but gradients are not finite at iteration {step.iteration + 1}; "
                f"the images were {self._images(step)}, the parameters {self._parameters(step)}. "
                "Look at these images and labels; "
                f"{self._advice()}"
            )
        position.skipped_steps += 1
        position.skipped_in_a_row += 1
        if position.skipped_in_a_row >= MAX_SKIPPED:
            first = step.iteration + 2 - position.skipped_in_a_row
            raise NonFiniteLoss(
                f"the {position.skipped_in_a_row} steps since iteration {first} were all skipped: "
                f"the loss is {loss:.4g} but gradients overflowed, at iteration {step.iteration + 1} those of "
                f"{self._parameters(step)}. The weights are those of before these steps; {self._advice()}"
            )

    def _images(self, step: Pending) -> str:
        return ", ".join(self.world.gather(step.names))

    def _parameters(self, step: Pending) -> str:
        assert step.gradients is not None
        return some(self.world.gather(broken_names(*step.gradients)), len(step.gradients.names))

    def _advice(self) -> str:
        return self.trainer.advice() if self.trainer else "lower --lr, or use --amp off or bf16"
