"""``save_pretrained`` and ``from_pretrained``: a network as a folder of ``model.safetensors`` and ``config.json``.

``config.json`` holds::

    format        1
    class         name of the network's class, for people; FastDFN and ReferenceDFN load each other's folders
    model_config  keyword arguments of the network, num_classes among them
    classes       K names, if given         palette  K times [r, g, b], if given
    sha256        of model.safetensors, so that two files that do not belong together do not load
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dfn_fast.checkpoint.archive import FORMAT, read_file
from dfn_fast.checkpoint.weights import Network, build, load_weights, ready
from dfn_fast.errors import CheckpointError, ConfigError, brief, nearest
from dfn_fast.files import MAX_TEXT, replacing, require_regular

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Check = Callable[[type[nn.Module], Any, Mapping[str, Tensor], str], dict[str, Any]]
REQUIRED = ("format", "class", "model_config", "sha256")
CRITERIA = ("criterion", "aux_criterion")


def save_folder(
    model: nn.Module,
    folder: str | Path,
    arguments: dict[str, Any],
    *,
    classes: Sequence[str] | None = None,
    palette: np.ndarray | None = None,
) -> None:
    """Writes a network to ``folder``, which is created if missing; see this file's docstring.

    ``arguments`` are the keyword arguments that rebuild it, ``num_classes`` among them.

    Weights have the published names and shapes and are contiguous. Criteria with their contents, and a ``norm_layer``
    other than batch norm, are not saved; give them to ``from_pretrained`` again. ``palette`` is ``[K, 3]`` RGB uint8.
    Raises :class:`ConfigError` if there are not ``num_classes`` names or colours, and :class:`CheckpointError` if the
    folder cannot be written.
    """
    folder = Path(folder)
    for name, given in (("classes", classes), ("palette", palette)):
        if given is not None and len(given) != arguments["num_classes"]:
            raise ConfigError(
                f"{name}: expected one for each of the network's {arguments['num_classes']} classes, got {len(given)}"
            )
    weights, config = _contents(model, arguments)
    if classes is not None:
        config["classes"] = list(classes)
    if palette is not None:
        config["palette"] = np.asarray(palette).tolist()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Weights first: if the process dies in between, the old config.json does not have their checksum.
        for name, content in ((WEIGHTS, weights), (CONFIG, (json.dumps(config, indent=2) + "\n").encode())):
            with replacing(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: could not be written ({error}); free some space, or choose a folder that can be written, and "
            "save again"
        ) from error


def _contents(model: nn.Module, arguments: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the weights file, and the required entries of the configuration."""
    state = {
        name: tensor.detach().cpu().contiguous()  # safetensors refuses channels_last tensors
        for name, tensor in model.state_dict().items()
        if name.split(".")[0] not in CRITERIA
    }
    weights = safetensors.torch.save(state)
    return weights, {
        "format": FORMAT,
        "class": type(model).__name__,
        "model_config": arguments,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def read_folder(folder: str | Path) -> dict[str, Any]:
    """Reads a folder into the form of our checkpoints: ``format``, ``model``, ``model_config`` (not checked here) and,
    if they were saved, ``classes`` and ``palette``.

    Raises :class:`CheckpointError` if a file is missing or damaged, or if the two do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = folder / WEIGHTS
    state = read_file(weights)
    with weights.open("rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
    if checksum != config["sha256"]:
        raise CheckpointError(
            f"{folder}: {WEIGHTS} and {CONFIG} do not belong together (the checksums differ). One was replaced or "
            "damaged, or saving was interrupted; copy or save both again"
        )
    content = {"format": FORMAT, "model": state, "model_config": config["model_config"]}
    return content | {name: config[name] for name in ("classes", "palette") if name in config}


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        state = (
            "this is a file; dfn_fast.inference.loading.load_model reads it" if folder.exists() else "it does not exist"
        )
        raise CheckpointError(f"{folder}: expected a folder that save_pretrained wrote, but {state}")
    path = folder / CONFIG
    require_regular(path, CheckpointError, "configuration", MAX_TEXT)
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a folder that save_pretrained wrote") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or save the folder again") from error
    found = config.get("format") if isinstance(config, dict) else config
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, got {brief(found)}; use the version of dfn_fast that wrote it"
        )
    _check_keys(config, path)
    return config


def _check_keys(config: dict[str, Any], path: Path) -> None:
    for name in REQUIRED:
        if name not in config:
            raise CheckpointError(f"{path}: {name!r} is missing; copy or save the folder again")
    known = (*REQUIRED, "classes", "palette")
    for name in config:
        if name not in known:
            raise CheckpointError(f"{path}: unknown key {brief(name)}{nearest(name[:80], known)}")


def load_folder(
    cls: type[Network],
    path: str | Path,
    check: Check,
    *,
    device: str | torch.device = "cpu",
    channels_last: bool = True,
    **overrides: Any,
) -> Network:
    """Loads the network in a folder that :func:`save_folder` wrote, in float32 and eval mode.

    ``check(cls, model_config, state, where)`` returns the arguments that the file gives, or raises
    :class:`CheckpointError`; see :func:`dfn_fast.network.arguments.checked_arguments`.

    ``overrides`` are keyword arguments of the network: criteria, which are not saved, or replacements for saved ones.
    Raises :class:`CheckpointError` if the folder is missing or damaged or does not fit, and :class:`ConfigError` if
    the network has no such argument.
    """
    known = inspect.signature(cls).parameters
    for name in overrides:
        if name not in known:
            raise ConfigError(f"from_pretrained: {cls.__name__} has no argument {name!r}{nearest(name, known)}")
    content = read_folder(path)
    content["model_config"] = check(cls, content["model_config"], content["model"], str(path))
    _check_class_count(content, path, overrides)
    # Set after loading: no file holds a criterion's contents, such as class weights.
    criteria = {name: overrides.pop(name) for name in CRITERIA if name in overrides}
    config = {**content["model_config"], **overrides}
    try:
        model = build(cls, config, random=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model_config {config} does not build a network ({error})") from error
    load_weights(model, content["model"], where=str(path))
    for name, criterion in criteria.items():
        if criterion is not None:
            setattr(model, name, criterion)
    ready(model, device, channels_last)
    return model


def _check_class_count(content: dict[str, Any], path: str | Path, overrides: dict[str, Any]) -> None:
    num_classes = content["model_config"]["num_classes"]
    needed = overrides.get("num_classes", num_classes)
    if needed != num_classes:
        raise CheckpointError(
            f"{path}: this network has {num_classes} classes, but {needed} are needed; choose another folder, or load "
            "the rest with dfn_fast.checkpoint.weights.load_weights(model, FOLDER/model.safetensors, strict=False)"
        )
    for name in ("classes", "palette"):
        given = content.get(name, [None] * num_classes)
        if not isinstance(given, list) or len(given) != num_classes:
            count = len(given) if isinstance(given, list) else brief(given)
            raise CheckpointError(
                f"{path}: expected {name} of {num_classes} classes, got {count}; save the folder again"
            )
