"""The configuration of a training run: one frozen dataclass, and recipes that change a few of its fields."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfn_fast import cli
from dfn_fast.data.border import MAX_WIDTH
from dfn_fast.data.transforms import MAX_SCALE, MIN_SCALE
from dfn_fast.errors import ConfigError, brief, nearest
from dfn_fast.files import MAX_TEXT, require_regular
from dfn_fast.media.images import IGNORE
from dfn_fast.network.backbone import LAYERS, MIN_SIZE, STEMS

MODELS = ("fast", "reference")
MEMORY = ("off", "norm", "blocks")
LARGEST = 1 << 62  # limit of numbers, within the range of PyTorch's and NumPy's integers
# Each limit is far above what anybody trains with, and below what would exhaust a machine's memory by itself.
MAX_CROP = 1 << 14
MAX_CHANNELS = 1 << 11
MAX_BATCH = 1 << 16
PAPER_SCALES = (0.5, 0.75, 1.0, 1.5, 1.75)


def option(
    default: Any,
    group: str,
    text: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Returns a field with its default, its group in ``--help``, its help text and the values it accepts.

    The limits are of a number, or of each number of a tuple. Without a ``maximum`` it is ``LARGEST``.
    """
    limits = {"minimum": minimum, "maximum": LARGEST if maximum is None else maximum}
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes and where it writes. Sizes are height x width, in pixels."""

    recipe: str = option("synthetic", "", "the recipe that the other fields started from")

    data: str = option("synthetic", "data", "data set: see `python -m dfn_fast.data list`")
    root: str | None = option(None, "data", "folder of the data set")
    train_split: str = option("train", "data", "split to train on; join several with +")
    val_split: str = option("val", "data", "split to validate on")
    num_classes: int | None = option(
        None, "data", "number of classes, for folder and list data without class names", minimum=2, maximum=IGNORE
    )
    classes: str | None = option(None, "data", "file of class names, one per line, for folder, list and coco data")
    ignore_value: int | None = option(
        None, "data", "value in the masks of folder and list data to ignore, besides 255", minimum=0, maximum=IGNORE
    )
    label_offset: int = option(
        0,
        "data",
        "number to add to the values in the masks of folder and list data; -1: classes begin at 1, 0 is no label",
        minimum=-IGNORE,
        maximum=IGNORE,
    )
    crop: tuple[int, int] = option(
        (512, 512), "data", "size of a training crop: 512 or 512x1024 (height x width)", maximum=MAX_CROP
    )
    scales: tuple[float, ...] = option(
        PAPER_SCALES, "data", "random scales of the training images", minimum=MIN_SCALE, maximum=MAX_SCALE
    )
    flip: bool = option(True, "data", "flip half of the training images left to right")
    border_width: int = option(7, "data", "width of the border targets in pixels, odd", minimum=1, maximum=MAX_WIDTH)
    allow_outside_root: bool = option(False, "data", "let lists name files outside --root")
    workers: int = option(
        4, "data", "processes that load images; 0 loads them in the main process", minimum=0, maximum=1024
    )
    loader_timeout: float = option(
        300.0,
        "data",
        "fail, naming the sample, if a batch takes longer than this many seconds; 0 waits forever",
        minimum=0,
        maximum=1e6,
    )

    model: str = option(
        "fast", "network", "FastDFN or the plain ReferenceDFN: same weights, same results up to rounding", MODELS
    )
    backbone: str = option("resnet101", "network", "depth of the ResNet", choices=tuple(LAYERS))
    stem: str = option(
        "deep", "network", "three 3x3 convolutions (published DFN) or one 7x7 (torchvision)", choices=STEMS
    )
    channels: int = option(512, "network", "width of the Smooth Network", minimum=1, maximum=MAX_CHANNELS)
    border_channels: int = option(21, "network", "width of the Border Network", minimum=1, maximum=MAX_CHANNELS)
    global_context: bool = option(True, "network", "global average pooling above the highest stage")
    channel_attention: bool = option(True, "network", "channel attention blocks; off: additions")
    deep_supervision: bool = option(True, "network", "a loss at each of the four stages; off: only at the last")
    border: bool = option(True, "network", "the Border Network")
    pretrained: str | None = option(
        None, "network", "ImageNet weights of the backbone: a file, a name such as resnet101s, or none"
    )
    weights: str | None = option(
        None, "network", "DFN weights to start from: any checkpoint or safetensors file, or none"
    )
    strict: bool = option(True, "network", "require --weights to fit in every tensor")

    border_weight: float = option(0.1, "loss", "lambda of eq. 7: weight of the border losses", minimum=0, maximum=1e6)
    focal_alpha: float = option(0.25, "loss", "alpha of the focal loss, eq. 4", minimum=0, maximum=1)
    focal_gamma: float = option(2.0, "loss", "gamma of the focal loss, eq. 4", minimum=0, maximum=100)
    focal: str = option(
        "retinanet",
        "loss",
        "formula of the focal loss; torchseg: as in its published code",
        ("retinanet", "torchseg"),
    )

    epochs: int = option(40, "optimiser", "passes over the training images", minimum=1, maximum=1e6)
    iterations: int | None = option(
        None, "optimiser", "optimiser steps in all, instead of --epochs", minimum=1, maximum=1e9
    )
    batch_size: int = option(
        32,
        "optimiser",
        "images per forward pass, in all processes together under torchrun",
        minimum=1,
        maximum=MAX_BATCH,
    )
    accumulate: int = option(
        1, "optimiser", "forward passes per step, whose gradients are averaged", minimum=1, maximum=MAX_BATCH
    )
    lr: float = option(4e-3, "optimiser", "initial learning rate of the backbone", minimum=0, maximum=1e6)
    new_layer_lr: float = option(
        1.0, "optimiser", "factor on the learning rate of all layers outside the backbone", minimum=0, maximum=1e6
    )
    power: float = option(
        0.9, "optimiser", "power of the poly policy: lr * (1 - iteration / iterations) ^ power", minimum=0, maximum=100
    )
    momentum: float = option(0.9, "optimiser", "momentum of SGD", minimum=0, maximum=1)
    weight_decay: float = option(1e-4, "optimiser", "weight decay of SGD", minimum=0, maximum=1e3)
    decay_norm_and_bias: bool = option(True, "optimiser", "weight decay for norm layers and biases too")

    device: str = option("auto", "execution", "cuda, cuda:1 or cpu; auto: CUDA if available")
    amp: str = option(
        "auto",
        "execution",
        "mixed precision of training; auto: bf16 on CUDA and on CPUs with AMX, else off (evaluate and predict "
        "decide by themselves)",
        ("auto", "bf16", "fp16", "off"),
    )
    channels_last: bool = option(True, "execution", "channels_last memory format")
    compile: bool | None = option(
        None, "execution", "torch.compile the step (default: only on CUDA; it slows training on a CPU)"
    )
    cuda_graph: bool = option(
        False, "execution", "launch forward and backward as one CUDA graph: less work for the host, more GPU memory"
    )
    memory: str = option(
        "off",
        "execution",
        "what to recompute in the backward pass instead of storing it; norm: normalisation, ReLU and additions of the "
        "backbone, about 0.8 x the activation memory and 1 to 1.2 x the time; blocks: all residual blocks, about "
        "0.4 to 0.55 x and 1.3 to 1.4 x",
        MEMORY,
    )
    fsdp: bool = option(
        False, "execution", "shard weights, gradients and momenta over the processes of torchrun: less memory in each"
    )
    deterministic: bool = option(False, "execution", "use only deterministic algorithms, slower on a GPU")
    seed: int = option(0, "execution", "seed of the weights, the image order and the augmentation", minimum=0)

    output_dir: str | None = option(None, "output", "folder of the run (default: runs/RECIPE, numbered if taken)")
    val_every: int = option(1, "output", "epochs between validations; the last epoch is always validated", minimum=1)
    checkpoint_every: int = option(500, "output", "iterations between checkpoints, besides one per epoch", minimum=1)
    log_every: int = option(10, "output", "iterations between lines of metrics.jsonl", minimum=1)
    tensorboard: bool = option(False, "output", "also write TensorBoard events (extra: tensorboard)")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if isinstance(value, str) and not value.strip():
                raise ConfigError(f"--{cli.dashed(f.name)} must not be empty, got {value!r}")
            if choices and value not in choices:
                raise ConfigError(
                    f"--{cli.dashed(f.name)} must be one of {', '.join(choices)}, got {brief(value)}"
                    + nearest(str(value)[:80], choices)
                )
            if isinstance(value, int | float | tuple) and not isinstance(value, bool):
                cli.require_range(f"--{cli.dashed(f.name)}", value, f.metadata["minimum"], f.metadata["maximum"])
        if min(self.crop) < MIN_SIZE:
            raise ConfigError(
                f"--crop {self.crop[0]}x{self.crop[1]} is too small: "
                f"the network needs {MIN_SIZE} x {MIN_SIZE} pixels or more"
            )
        if not self.scales:
            raise ConfigError("--scales must be one or more numbers, got none")
        if self.border_width % 2 == 0:
            raise ConfigError(f"--border-width must be odd, got {self.border_width}")
        if self.batch_size == 1 and self.global_context:
            raise ConfigError(
                "--batch-size 1 cannot be trained: batch norm after global pooling would see one value per channel. "
                "Use --batch-size 2 or more (with --accumulate for larger steps), or --no-global-context"
            )

        if self.memory != "off" and self.model != "fast":
            raise ConfigError(f"--memory {self.memory} needs --model fast; the reference keeps every activation")
        if self.fsdp and (self.compile or self.cuda_graph):
            raise ConfigError("--fsdp gathers weights during a step; leave out --compile and --cuda-graph")
        if self.fsdp and self.amp == "fp16":
            raise ConfigError("--fsdp --amp fp16: each process would scale and skip steps by its own shard; use bf16")
        if self.cuda_graph and self.accumulate > 1:
            raise ConfigError(
                "--cuda-graph overwrites the gradients in each pass and cannot accumulate them; "
                "leave out --accumulate or --cuda-graph"
            )

    def network_arguments(self) -> dict[str, Any]:
        """The keyword arguments that a checkpoint must hold to rebuild the network, except ``num_classes``."""
        names = ("backbone", "stem", "channels", "border_channels")
        switches = ("global_context", "channel_attention", "deep_supervision", "border")
        return {name: getattr(self, name) for name in names + switches}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "TrainConfig":
        """The inverse of :meth:`to_dict`; ``where`` names the source in errors."""
        types = typing.get_type_hints(cls)
        checked = {}
        for name, value in values.items():
            if name not in types:
                raise ConfigError(f"{where}: unknown field {brief(name)}" + nearest(str(name)[:80], types))
            checked[name] = _convert(value, types[name], f"{where}: field {name!r}")
        try:
            return cls(**checked)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def _convert(value: Any, kind: Any, what: str) -> Any:
    """Returns a value read from JSON in the type of its field. Raises :class:`ConfigError` if the types differ."""
    allowed = typing.get_args(kind) if typing.get_origin(kind) is not tuple else (kind,)
    allowed = allowed or (kind,)
    if value is None and type(None) in allowed:
        return None
    for one in allowed:
        if typing.get_origin(one) is tuple and isinstance(value, list | tuple):
            items, element = list(value), typing.get_args(one)[0]
            right_count = Ellipsis in typing.get_args(one) or len(items) == len(typing.get_args(one))
            if right_count and all(_is(item, element) for item in items):
                return tuple(element(item) for item in items)
        elif typing.get_origin(one) is None and one is not type(None) and _is(value, one):
            return one(value)
    raise ConfigError(f"{what} expects {getattr(kind, '__name__', kind)}, got {brief(value)}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) <= LARGEST
    return isinstance(value, kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ``ValueError`` for a name that it has twice, of which ``json`` would keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{brief(next(name for name in names if names.count(name) > 1))} is given twice")
    return values


def load_config(path: str | Path) -> TrainConfig:
    """The configuration that a run saved as ``config.json``."""
    require_regular(path, ConfigError, "configuration file", MAX_TEXT)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise ConfigError(f"{path}: this configuration file does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a run's config.json ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a run's config.json, an object of fields")
    return TrainConfig.from_dict(values, str(path))


PRESETS = ("paper", "torchseg")


def recipe(name: str, preset: str = "paper") -> TrainConfig:
    """A named recipe. ``preset`` chooses the numbers of the paper or of the authors' code (TorchSeg)."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}" + nearest(name, RECIPES))
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}" + nearest(preset, PRESETS))
    changes = dict(RECIPES[name])
    if preset == "torchseg":
        changes |= {"lr": 8e-4, "new_layer_lr": 10.0, "decay_norm_and_bias": False, "focal": "torchseg"}
    return TrainConfig(recipe=name, data=name, **changes)


# The fields that each recipe changes. The defaults of the dataclass are those of the paper's section 4.1.
RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores, from scratch.
    "synthetic": {
        "backbone": "resnet18",
        "stem": "conv7",
        "channels": 64,
        "crop": (96, 96),
        "scales": (1.0,),
        "border_width": 3,
        "border_weight": 1.0,
        "epochs": 11,
        "batch_size": 16,
        "lr": 0.04,
        "workers": 1,
    },
    # From scratch, 367 images of 360 x 480: the paper does not train on CamVid.
    "camvid": {"crop": (352, 480), "epochs": 200, "batch_size": 8, "lr": 0.01, "border_width": 5},
    # VOC outlines its objects with 5 pixels of 255; the border reaches 3 pixels beyond them on each side.
    "voc": {"train_split": "train_aug", "border_width": 11, "pretrained": "resnet101s", "epochs": 80},
    "cityscapes": {"crop": (800, 800), "pretrained": "resnet101s", "epochs": 240},
}
