"""The parts of a training run: optimiser, schedule, step, and the state that a run continues from, bit by bit."""

import contextlib
import importlib.util
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfn_fast.checkpoint import load_weights
from dfn_fast.config import TrainConfig
from dfn_fast.cuda_graph import GraphedStep, SideStream, capture
from dfn_fast.data.loader import Batch
from dfn_fast.data.transforms import normalize, scale_and_shift
from dfn_fast.errors import ConfigError, UserError
from dfn_fast.losses import SigmoidFocalLoss
from dfn_fast.memory import set_memory
from dfn_fast.model import FastDFN
from dfn_fast.reference import ReferenceDFN
from dfn_fast.regions import region

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(UserError):
    """The loss is nan or infinite; the text names the iteration and the images."""


def choose_device(name: str) -> torch.device:
    """``"auto"``: CUDA where there is one, else the CPU; a device that is not there is an error."""
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


def build_model(config: TrainConfig, num_classes: int) -> ReferenceDFN:
    """The network of ``config``, with ImageNet or DFN weights where it asks for them."""
    focal = SigmoidFocalLoss(config.focal_alpha, config.focal_gamma, torchseg=config.focal == "torchseg")
    network = FastDFN if config.model == "fast" else ReferenceDFN
    model = network(
        num_classes,
        aux_criterion=focal,
        alpha=config.border_weight,
        pretrained_model=config.pretrained,
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


class TrainingLoss(nn.Module):
    """The forward pass of a step as one function, which ``torch.compile`` makes one graph of.

    uint8 images ``[B, 3, H, W]``, labels and border targets ``[B, H, W]`` -> the loss, a scalar. ``dtype`` is that of
    the normalised images; what autocast would make of them anyway is best made at once.
    """

    def __init__(self, model: ReferenceDFN, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        # Inputs of the compiled graph: built inside it they would be copied to the device, waiting, at every step.
        self.constants = scale_and_shift(device, torch.float64 if dtype == torch.float64 else torch.float32)

    def forward(self, images: Tensor, labels: Tensor, borders: Tensor) -> Tensor:
        return self.model(normalize(images, self.dtype, self.constants), labels, borders)


def compile_loss(loss: TrainingLoss) -> nn.Module:
    """``loss`` compiled for one shape of batch, as a single graph: a break in it would be an error."""
    return torch.compile(loss, fullgraph=True, dynamic=False, options=inductor_options())  # type: ignore[return-value]


def inductor_options() -> dict[str, Any]:
    """Without this one Inductor leaves channels_last where any 3x3 convolution has half as many outputs as inputs or
    fewer, as the composed convolution of a head does."""
    import torch._inductor  # not at the top: it takes a second, and most runs on a CPU never need it

    wanted = "force_layout_optimization"
    return {wanted: True} if wanted in torch._inductor.list_options() else {}


class Trainer:
    """Network, optimiser and scaler on a device, and one optimiser step as a call.

    ``step(batches)`` averages the gradients of ``config.accumulate`` batches and returns their mean loss, a scalar on
    the device: reading it is the caller's choice. Nothing in a step waits for the device.
    """

    def __init__(self, model: ReferenceDFN, config: TrainConfig, iterations: int, device: torch.device):
        self.config, self.iterations, self.device = config, iterations, device
        self.amp = choose_amp(config.amp, device)
        self.model = model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compiled = choose_compile(config.compile, device)
        loss = TrainingLoss(self.model, device, self.amp or torch.float32)
        self.loss: nn.Module = compile_loss(loss) if self.compiled else loss
        # Fused: one pass over weights, gradients and momenta, and no waiting for the scaler's verdict in fp16.
        self.update = {"fused": True} if device.type in ("cuda", "cpu") else {"foreach": True}
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config),
            lr=config.lr,
            momentum=config.momentum,
            **self.update,  # type: ignore[arg-type]
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.graph: GraphedStep | None = None
        if config.cuda_graph:
            if device.type != "cuda":
                raise ConfigError(f"--cuda-graph needs a CUDA device, but this run is on {device}; leave it out")
            self.graph = GraphedStep(self.forward_backward, SideStream(device), capture)

    def step(self, batches: Iterable[Batch], iteration: int) -> Tensor:
        """One optimiser step, number ``iteration`` (from 0) of the run."""
        self.model.train()
        self.set_lr(iteration)
        run = self.graph or self.forward_backward
        losses = [run(*(x.to(self.device, non_blocking=True) for x in batch[:3])) for batch in batches]
        with region("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not (self.graph and self.graph.captured):
                self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    def forward_backward(self, images: Tensor, labels: Tensor, borders: Tensor) -> Tensor:
        """The loss of a batch, and its share of the step's gradients."""
        with self.autocast():
            loss = self.loss(images, labels, borders)
        with region("backward"):
            self.scaler.scale(loss / self.config.accumulate).backward()
        return loss.detach()

    def execution(self) -> dict[str, Any]:
        """How the steps run, all choices made: for the record."""
        return {
            "model": type(self.model).__name__,
            "amp": {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[self.amp],
            "channels_last": self.config.channels_last,
            "compile": self.compiled,
            "memory": self.config.memory,
            "cuda_graph": self.config.cuda_graph,
        }

    def description(self) -> str:
        """:meth:`execution` as a line for people."""
        chosen = self.execution()
        parts = [f"{chosen['model']} on {self.device}", "float32" if self.amp is None else f"{chosen['amp']} autocast"]
        parts += [name for name in ("channels_last", "cuda_graph") if chosen[name]]
        parts += ["compiled" if self.compiled else "not compiled"]
        parts += [f"recomputing {chosen['memory']}"] if chosen["memory"] != "off" else []
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
        """Raises :class:`NonFiniteLoss` where a weight is nan or infinite: such a network is never saved."""
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if not torch.isfinite(torch.stack(norms)).all():
            raise NonFiniteLoss(
                f"the weights are no longer finite after iteration {iteration}; lower --lr or use --amp off"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer."""
        return {
            "model": {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update({"fused": None, "foreach": None, **self.update})  # the file says how it was updated before
        for parameter, kept in self.optimizer.state.items():
            momentum = kept.get("momentum_buffer")
            if momentum is not None:  # a fused update takes both for memory of the same order
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds PyTorch, NumPy and Python; ``deterministic`` asks for deterministic algorithms, and warns where none is."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
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


class LossWatch:
    """Losses that stay on the device until they are read, with the images that each came from.

    Reading waits for the device, so it is done every few iterations there; a loss that is not finite is found then.
    """

    def __init__(self):
        self.pending: list[tuple[int, Tensor, list[str]]] = []

    def add(self, iteration: int, loss: Tensor, names: list[str]) -> None:
        self.pending.append((iteration, loss, names))

    def read(self) -> list[float]:
        """The losses since the last call. Raises :class:`NonFiniteLoss` with iteration and images."""
        if not self.pending:
            return []
        losses = torch.stack([loss for _, loss, _ in self.pending]).tolist()
        for value, (iteration, _, names) in zip(losses, self.pending, strict=True):
            if not np.isfinite(value):
                raise NonFiniteLoss(
                    f"the loss is {value} at iteration {iteration + 1}; the images were {', '.join(names)}. "
                    "Lower --lr, use --amp off or bf16, or look at these images and labels"
                )
        self.pending.clear()
        return losses
