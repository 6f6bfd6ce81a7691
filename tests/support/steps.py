"""A training step small enough for a test: the smallest possible ResNet, and one batch for it."""

from unittest.mock import patch

import torch

from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch
from dfn_fast.network.backbone import LAYERS, BasicBlock
from dfn_fast.network.fast import FastDFN
from dfn_fast.runtime.processes import ALONE
from dfn_fast.trainer.parallel import norm_layer
from dfn_fast.trainer.trainer import Trainer

CLASSES, COUNT = 5, 3  # no weight has 3 outputs, so shapes tell activations from weights


def tiny_trainer(device="cpu", network=FastDFN, blocks=1, parts=None, world=ALONE, **settings) -> Trainer:
    """A trainer with seeded random weights. ``parts`` are keyword arguments of the network, ``settings`` of the run."""
    torch.manual_seed(0)
    config = TrainConfig(**{"compile": False, "channels": 16, "border_channels": 6, "lr": 0.01, **settings})
    with patch.dict(LAYERS, tiny=(BasicBlock, (blocks,) * 4)):
        settings = {**config.network_arguments(), "alpha": config.border_weight, "norm_layer": norm_layer(world)}
        model = network(CLASSES, **{**settings, "backbone": "tiny", **(parts or {})})
    return Trainer(model, config, 100, torch.device(device), world)


def tiny_batch(size=(64, 64), seed=1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    # As the loader returns it: channels innermost.
    images = torch.randint(0, 256, (COUNT, *size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(0, CLASSES, (COUNT, *size), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    borders = torch.randint(0, 2, (COUNT, *size), generator=generator, dtype=torch.uint8)
    borders[labels == 255] = 255
    return Batch(images, labels, borders, [f"image {i}" for i in range(COUNT)])


def with_scaler(trainer: Trainer) -> Trainer:
    """Adds fp16's loss scaler in float32: its behaviour depends only on the gradients."""
    trainer.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=2.0**16)
    return trainer
