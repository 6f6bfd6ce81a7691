"""How work is executed, in training and in inference: device, precision, compilation, deterministic algorithms."""

import importlib.util
import os
import warnings
from typing import Any

import torch

from dfn_fast.errors import ConfigError
from dfn_fast.runtime.processes import ALONE, World
from dfn_kernels.common.cpu import has_amx, onednn_takes_bf16

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """The device ``name``; ``"auto"`` is CUDA if there is a GPU, else the CPU. A missing one is an error."""
    name = world.device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a device; use cuda, cuda:1, cpu or auto") from error
    if device.type not in ("cuda", "cpu"):
        try:
            torch.zeros(1, device=device).item()  # fails on a device that is not there, and on one that keeps no values
        except Exception as error:  # each kind of device has its own
            raise ConfigError(f"--device {name} cannot be used here; use cuda, cuda:1, cpu or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use cpu or auto"
        )
    return device


def out_of_memory(error: Exception) -> bool:
    """Whether the device, or the host, had too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" or has_amx() else "off"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    if name == "bf16" and device.type == "cpu" and not onednn_takes_bf16():
        warnings.warn("this CPU has no bf16 arithmetic, so bf16 is slower than float32; use --amp off", stacklevel=2)
    return HALVES.get(name)


def choose_compile(choice: bool | None, device: torch.device) -> bool:
    """Whether to compile. None means: on CUDA if Triton is installed, never on a CPU, where it slows training."""
    if choice is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return choice


def inductor_options(**wanted: Any) -> dict[str, Any]:
    """The ``options`` for ``torch.compile``: the wanted ones that this version of PyTorch has."""
    import torch._inductor  # not at the top: it takes a second, and most runs on a CPU never need it

    if torch.are_deterministic_algorithms_enabled():
        wanted["deterministic"] = True  # otherwise it would choose among a GPU's kernels by timing them
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


def choose_algorithms(deterministic: bool) -> None:
    """Selects deterministic algorithms, with a warning if an operation has none, or the fastest ones.

    Call this before the first matrix product on a GPU, which is when cuBLAS fixes its workspace size.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
