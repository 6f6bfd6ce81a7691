"""ImageNet weights for the backbone: from a file, or by name from torchvision's and timm's downloads."""

import http.client
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.checkpoint.weights import Mismatch, load_weights, state_dict_of
from dfn_fast.errors import CheckpointError

_TORCHVISION = "https://download.pytorch.org/models/"
_GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"

# The eight digits before the suffix begin the file's SHA-256. Names that end in "s" have the deep stem.
BACKBONE_WEIGHTS: dict[str, str] = {
    "resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "resnet50_v2": _TORCHVISION + "resnet50-11ad3fa6.pth",
    "resnet50s": _GLUON + "gluon_resnet50_v1s-1762acc0.pth",
    "resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "resnet101_v2": _TORCHVISION + "resnet101-cd907fc2.pth",
    "resnet101s": _GLUON + "gluon_resnet101_v1s-60fe0cc1.pth",
    "resnet152": _TORCHVISION + "resnet152-394f9c45.pth",
    "resnet152_v2": _TORCHVISION + "resnet152-f82ba261.pth",
    "resnet152s": _GLUON + "gluon_resnet152_v1s-dcc41b81.pth",
}


def load_backbone(backbone: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True) -> Mismatch:
    """Loads a file, a name in ``BACKBONE_WEIGHTS`` or a state dict into ``backbone`` and returns the mismatch.

    A classifier (``fc``) is skipped; from a whole DFN only the backbone is loaded. A download goes to the folder of
    ``torch.hub`` and must have the published hash. Raises :class:`CheckpointError` as
    :func:`~dfn_fast.checkpoint.weights.load_weights` does, and also if a name does not fit the backbone's ``depth``
    and ``stem`` or a download fails.
    """
    given, source = source, "the given weights" if isinstance(source, Mapping) else str(source)
    if isinstance(given, Mapping):
        content = given
    elif source in BACKBONE_WEIGHTS:
        if source not in names_for(backbone):
            raise CheckpointError(
                f"{source} does not hold the weights of a {backbone.depth} with the {backbone.stem} stem; "
                f"{_choices(backbone)}"
            )
        content = _download(BACKBONE_WEIGHTS[source])
    elif Path(source).suffix == "" and not Path(source).exists():
        raise CheckpointError(f"{source} is neither a file nor the name of ImageNet weights; {_choices(backbone)}")
    else:
        content = read_file(source)
    state = state_dict_of(content, source)
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return load_weights(backbone, state, strict=strict, where=source)


def names_for(backbone: nn.Module) -> list[str]:
    """The names in ``BACKBONE_WEIGHTS`` that fit the backbone's depth and stem."""
    depth = backbone.depth
    fitting = {f"{depth}s"} if backbone.stem == "deep" else {depth, f"{depth}_v2"}
    return [name for name in BACKBONE_WEIGHTS if name in fitting]


def _choices(backbone: nn.Module) -> str:
    names = names_for(backbone)
    fitting = ", ".join(names) if names else "no name"
    other = "conv7" if backbone.stem == "deep" else "deep"
    return f"{fitting} fits {backbone.depth} with the {backbone.stem} stem; give such a name, a file or --stem {other}"


def _download(url: str) -> Mapping[str, Any]:
    kept = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    remedy = "download it yourself and give the file"
    try:
        return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts among them
        raise CheckpointError(f"{url} could not be fetched to {kept} ({error}); {remedy}") from error
    except Exception as error:
        if kept.exists():
            raise CheckpointError(f"{kept}: this copy of {url} is damaged; delete it to fetch it again") from error
        raise CheckpointError(
            f"{url}: the download does not have the published hash; try again, or {remedy}"
        ) from error
