"""The network, its parameter groups and its loss, from a TrainConfig."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfn_fast.checkpoint.weights import load_weights
from dfn_fast.config import TrainConfig
from dfn_fast.data.normalize import normalize, scale_and_shift
from dfn_fast.errors import ConfigError
from dfn_fast.network.fast import FastDFN
from dfn_fast.network.losses import SigmoidFocalLoss
from dfn_fast.network.recompute import set_recompute
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.device import choose_compile, choose_device, inductor_options
from dfn_fast.runtime.machine import memory_bytes
from dfn_fast.runtime.processes import ALONE, World
from dfn_fast.trainer.parallel import norm_layer


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps are compiled. With FSDP they are not, because it gathers weights during a step."""
    return choose_compile(config.compile, device) and not config.fsdp


def build_model(config: TrainConfig, num_classes: int, world: World = ALONE) -> ReferenceDFN:
    """Builds the network of ``config``, with ImageNet or DFN weights if it names them.

    DFN weights that fit in every tensor leave nothing of ImageNet's, which are then not read.
    """
    focal = SigmoidFocalLoss(config.focal_alpha, config.focal_gamma, torchseg=config.focal == "torchseg")
    network = FastDFN if config.model == "fast" else ReferenceDFN
    device = choose_device(config.device, world)
    native = device.type == "cuda" and not compiles(config, device)
    replaced = config.pretrained is not None and config.weights is not None and config.strict
    if replaced:
        print(f"--pretrained {config.pretrained} is not read: --weights {config.weights} has every tensor")
    model = network(
        num_classes,
        aux_criterion=focal,
        alpha=config.border_weight,
        pretrained_model=None if replaced else config.pretrained,
        norm_layer=norm_layer(world, native),
        **config.network_arguments(),
    )
    if config.memory != "off":
        set_recompute(model, config.memory)
    if config.weights is not None:
        mismatch = load_weights(
            model, config.weights, strict=config.strict, remedy="load the tensors that fit with --no-strict"
        )
        if mismatch:
            print(f"{config.weights}: loaded the tensors that fit; {mismatch}", file=sys.stderr)
    return model


def parameter_groups(model: ReferenceDFN, config: TrainConfig) -> list[dict[str, Any]]:
    """The groups of SGD: weights of the backbone, its norm layers and biases, then the same of the new layers."""
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
    """The poly policy's factor on the learning rate at ``iteration`` (from 0)."""
    return (1 - iteration / iterations) ** power


def require_possible(config: TrainConfig, world: World) -> None:
    """Raises :class:`ConfigError` if an option does not suit the number of processes."""
    if config.fsdp and world.size == 1:
        raise ConfigError(
            "--fsdp shards weights over several processes, but this is one; start it with torchrun, or add --no-fsdp"
        )
    if config.cuda_graph and world.size > 1:
        raise ConfigError("--cuda-graph records the work of one process only; leave it out with several")


# Activations of a training step, at the very least: those of ResNet-18 in bfloat16 with ``memory="blocks"``.
BYTES_PER_PIXEL = 100


def require_memory(config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
    """Raises :class:`ConfigError` if a batch cannot fit into the memory of ``device``, whatever the network."""
    needed = BYTES_PER_PIXEL * config.batch_size // world.size * config.crop[0] * config.crop[1]
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    if memory is not None and needed > memory:
        raise ConfigError(
            f"--batch-size {config.batch_size} with --crop {config.crop[0]}x{config.crop[1]} needs more than "
            f"{needed / 1e9:.0f} GB in each process, but {device} has {memory / 1e9:.0f} GB; lower one of them "
            "(--accumulate makes steps larger again)"
        )


class TrainingLoss(nn.Module):
    """The forward pass of a step as one function, which ``torch.compile`` turns into one graph.

    uint8 images ``[B, 3, H, W]``, labels and border targets ``[B, H, W]`` -> the loss, a scalar; ``shares``: see
    :func:`dfn_fast.network.losses.dfn_loss`. ``dtype`` is that of the normalised images: autocast would convert
    them to it anyway.
    """

    def __init__(self, model: ReferenceDFN, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        # Inputs of the compiled graph. Built inside it, they would be copied to the device, with a wait, at every step.
        self.constants = scale_and_shift(device, torch.float64 if dtype == torch.float64 else torch.float32)

    def forward(self, images: Tensor, labels: Tensor, borders: Tensor, shares: Tensor | None = None) -> Tensor:
        return self.model(normalize(images, self.dtype, self.constants), labels, borders, shares)


def compile_loss(loss: TrainingLoss) -> nn.Module:
    """Compiles ``loss`` for one batch shape as a single graph. A graph break is an error."""
    # Without this, Inductor gives up channels_last if any 3x3 convolution has at most half as many outputs as inputs.
    # The composed convolution of a head does.
    options = inductor_options(force_layout_optimization=True)
    return torch.compile(loss, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]
