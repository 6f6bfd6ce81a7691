"""Which implementation serves a call: the Triton kernels, or the same mathematics in plain PyTorch.

``DFN_KERNELS`` is ``auto`` (the default), ``torch`` or ``triton``. ``auto``: Triton for CUDA and HIP tensors, plain
PyTorch for all others; with ``TRITON_INTERPRET=1`` the Triton kernels for CPU tensors too. What is forced and missing
is an error.
"""

import contextlib
import os

import torch
from torch import Tensor

from dfn_kernels._triton import MISSING

CHOICES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve a call on ``x``. Raises RuntimeError where they are forced and missing."""
    choice = os.environ.get("DFN_KERNELS", "auto")
    if choice not in CHOICES:
        raise RuntimeError(f"DFN_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        return False
    runs_here = x.is_cuda or (x.device.type == "cpu" and interpreting())
    if choice == "auto":
        return runs_here and MISSING is None
    if MISSING is not None:
        raise RuntimeError(f"DFN_KERNELS=triton, but Triton cannot be imported ({MISSING}); pip install triton")
    if not runs_here:
        raise RuntimeError(
            f"DFN_KERNELS=triton, but Triton has no kernels for {x.device.type} tensors; "
            "use CUDA tensors, or TRITON_INTERPRET=1 for its interpreter on the CPU"
        )
    return True


def debugging() -> bool:
    """Whether values are checked too (``DFN_KERNELS_DEBUG=1``), at the price of waiting for the device."""
    return os.environ.get("DFN_KERNELS_DEBUG") == "1"


def nhwc(x: Tensor) -> Tensor:
    """``x`` in channels_last: itself where it is, else a copy. The one place where a layout is converted."""
    return x.contiguous(memory_format=torch.channels_last)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """No autocast: it would take resizes and matrix products to half precision."""
    # Devices without autocast, such as meta, refuse to have it switched off.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and weights: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_features(operator: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all are non-empty ``[B, C, H, W]`` of one dtype and device, and of a dtype we serve."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.ndim != 4 or x.numel() == 0:
            raise ValueError(f"{operator} expects {name} [B, C, H, W], not empty, got shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{operator} expects {name} in float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{operator} expects {name} like {first_name} ({first.dtype} on {first.device}), "
                f"got {x.dtype} on {x.device}"
            )
