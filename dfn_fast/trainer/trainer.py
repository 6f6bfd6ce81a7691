"""Trainer: network, optimiser, scaler and schedule, one optimiser step as a call, and the state to continue from."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch
from dfn_fast.errors import ConfigError, listed
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.cuda_graph import GraphedStep, SideStream, capture
from dfn_fast.runtime.device import choose_amp
from dfn_fast.runtime.processes import ALONE, World
from dfn_fast.runtime.random_state import random_state, set_random_state
from dfn_fast.runtime.regions import region
from dfn_fast.trainer.build import TrainingLoss, compile_loss, compiles, parameter_groups, poly, require_possible
from dfn_fast.trainer.finite import Gradients, NonFiniteLoss, broken_names
from dfn_fast.trainer.parallel import (
    data_parallel,
    gathered,
    load_sharded_state,
    local,
    shard,
    shard_like,
    sharded_state,
    valid_shares,
)


class Trainer:
    """Network, optimiser and scaler on a device, and one optimiser step as a call.

    ``step(batches)`` averages the gradients of ``config.accumulate`` batches and returns their mean loss, a scalar on
    the device, which the caller may read later. Nothing in a step waits for the device. ``gradients`` tells which
    gradients of the last step were finite.

    In a ``world`` of several processes each gets its slice of every batch, and the loss of a step is the mean of the
    losses that they return.
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
            shard(self.model)  # FSDP needs weights in the plain memory format
        elif config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = TrainingLoss(self.model, device, self.amp or torch.float32)
        self.loss: nn.Module = compile_loss(loss) if self.compiled else loss
        if world.size > 1 and not config.fsdp:
            self.loss = data_parallel(self.loss, self.model)
        # Fused: one pass over weights, gradients and momenta, and no wait for the scaler's verdict in fp16.
        fused = device.type in ("cuda", "cpu") and not config.fsdp  # fused SGD does not support it
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
        """Takes one optimiser step, number ``iteration`` (from 0) of the run, and returns its loss."""
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
        """Which gradients are finite, by their norms: one nan or infinite element makes the whole norm so."""
        named = [(name, local(p.grad)) for name, p in self.named_parameters if p.grad is not None]
        norms = torch._foreach_norm([gradient for _, gradient in named])
        return Gradients([name for name, _ in named], torch.isfinite(torch.stack(norms)))

    def start_momenta(self) -> None:
        """Sets the momenta to 0, which does not change the first step.

        The fused update would allocate them uninitialised, leave them so if that step is skipped, and use them in the
        next.
        """
        if self.config.momentum:
            for _, p in self.named_parameters:
                if p.grad is not None:
                    self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def forward_backward(self, images: Tensor, labels: Tensor, borders: Tensor) -> Tensor:
        """Returns the loss of a batch, and computes its share of the step's gradients."""
        with self.autocast():
            loss = self.loss(images, labels, borders, *self.shares(labels, borders))
        with region("backward"):
            self.scaler.scale(loss / self.config.accumulate).backward()
        return loss.detach()

    def shares(self, labels: Tensor, borders: Tensor) -> tuple[Tensor, ...]:
        """The factors of this process's losses in those of the batch; nothing if there is only one process."""
        if self.world.size == 1:
            return ()
        shares = valid_shares(self.world, labels, borders)
        if self.config.focal == "torchseg":
            shares[1] = 1.0  # a mean over all pixels, as many in every process
        return (shares,)

    def averaging(self, last: bool) -> contextlib.AbstractContextManager:
        """Averages gradients over the processes in the ``last`` pass of a step; earlier passes only add them up."""
        parallel = isinstance(self.loss, DistributedDataParallel)
        return self.loss.no_sync() if parallel and not last else contextlib.nullcontext()  # type: ignore[operator]

    def execution(self) -> dict[str, Any]:
        """How the steps run, with all automatic choices made, for summary.json."""
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
        """:meth:`execution` as a readable line."""
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
        """Sets the learning rate of every group by the poly policy."""
        for group in self.optimizer.param_groups:
            factor = poly(iteration, self.iterations, self.config.power)
            group["lr"] = self.config.lr * group["lr_factor"] * factor

    @property
    def lr(self) -> float:
        """The backbone's learning rate in the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def require_finite_weights(self, iteration: int) -> None:
        """Raises :class:`NonFiniteLoss`, in all processes, if a weight or a statistic of a norm layer is not finite.

        Such a network is never saved.
        """
        tensors = {name: local(x) for name, x in self.model.state_dict().items() if x.is_floating_point()}
        finite = torch.isfinite(torch.stack(torch._foreach_norm(list(tensors.values()))))
        broken = list(dict.fromkeys(self.world.gather(broken_names(tensors, finite))))
        if broken:
            raise NonFiniteLoss(
                f"the weights are no longer finite after iteration {iteration}: {listed(broken)} "
                f"({len(broken)} of {len(tensors)}); "
                f"{self.advice()}"
            )

    def network(self, state: dict[str, Tensor] | None = None) -> ReferenceDFN:
        """The whole network, for inference, with the weights ``state`` or else its current ones.

        All processes must call it together for the current weights of a sharded network.
        """
        if not self.config.fsdp:
            if state is not None:
                self.model.load_state_dict(state)
            return self.model
        network = copy.deepcopy(self.bare)
        network.load_state_dict(sharded_state(self.model, everywhere=True) if state is None else state, assign=True)
        return network.to(self.device)

    def advice(self) -> str:
        """The learning rate and loss scale in use, and what to change if the loss is not finite."""
        scale = f", the scale of the loss {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        wider = {torch.float16: ", or use --amp bf16", torch.bfloat16: ", or use --amp off", None: ""}[self.amp]
        return f"the learning rate was {self.lr:.2e}{scale}: lower --lr{wider}"

    def state(self) -> dict[str, Any]:
        """The trainer's part of a checkpoint, the same with FSDP, where all processes must call it together."""
        model = sharded_state(self.model) if self.config.fsdp else self.model.state_dict()
        return {
            "model": {name: tensor.contiguous() for name, tensor in model.items()},
            "optimizer": gathered(self.optimizer.state_dict(), self.world.is_first),
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
            group.update({"fused": None, "foreach": None, **self.update})  # the file has the old run's settings
        for parameter, kept in self.optimizer.state.items():
            momentum = kept.get("momentum_buffer")
            if momentum is not None:  # a fused update assumes the same order in memory for both
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(shard_like(momentum, parameter))
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
