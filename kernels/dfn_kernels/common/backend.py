"""Which implementation serves a call: the Triton kernels, or the same mathematics in plain PyTorch.

``DFN_KERNELS`` is ``auto`` (the default), ``torch`` or ``triton``. ``auto``: Triton for CUDA and HIP tensors, plain
PyTorch for all others; with ``TRITON_INTERPRET=1`` the Triton kernels for CPU tensors too. Forcing an
implementation that is missing is an error. PyTorch serves an empty batch, so no kernel is launched for nothing.

``DFN_KERNELS_DEBUG=1`` is the debug mode of every operator, see :func:`named_errors`; the losses check labels in it.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfn_kernels.common.triton_or_stub import MISSING

CHOICES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# On others, such as meta, asking whether it is on raises. Listed here, as not every torch.compile can trace the call.
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve a call on ``x``; never if it is empty. Raises RuntimeError if they are forced
    but missing."""
    choice = os.environ.get("DFN_KERNELS", "auto")
    if choice not in CHOICES:
        raise RuntimeError(f"DFN_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        return False
    runs_here = x.is_cuda or (x.device.type == "cpu" and interpreting())
    if choice == "auto":
        return runs_here and MISSING is None and x.numel() > 0
    if MISSING is not None:
        raise RuntimeError(f"DFN_KERNELS=triton, but Triton cannot be imported ({MISSING}); pip install triton")
    if not runs_here:
        raise RuntimeError(
            f"DFN_KERNELS=triton, but Triton has no kernels for {x.device.type} tensors; "
            "use CUDA tensors, or TRITON_INTERPRET=1 for its interpreter on the CPU"
        )
    return x.numel() > 0


def debugging() -> bool:
    """Whether values are checked too (``DFN_KERNELS_DEBUG=1``), which waits for the device. False while compiling a
    graph: its operators ask when they run."""
    return not torch.compiler.is_compiling() and os.environ.get("DFN_KERNELS_DEBUG") == "1"


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as ``dfn_kernels::name``, with :func:`named_errors`."""

    def register(run: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"dfn_kernels::{name}", named_errors(name)(run), mutates_args=())

    return register


def named_errors(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In debug mode, makes the function wait for the device, and an error of CUDA or Triton name the operator.

    A device runs behind its host, so a kernel's fault is raised by whatever the host does next. Under
    ``DFN_KERNELS_DEBUG=1`` the host waits before the function and after it. The RuntimeError names the operator and the
    shapes of its arguments, and says so if the fault is an earlier operation's. A ValueError already names its
    operator. Nothing can wait while a CUDA graph is captured. Outside debug mode this costs one look at the
    environment.
    """

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def named(*arguments: Any, **options: Any) -> Any:
            if not debugging():
                return run(*arguments, **options)
            given = inspect.signature(run).bind(*arguments, **options).arguments
            call = ", ".join([name, *(f"{key} {_described(value)}" for key, value in given.items())])
            devices = {x.device for value in given.values() for x in _tensors(value)}
            with _errors_of(f"an operation before {call}"):
                for device in devices:
                    synchronize(device)
            with _errors_of(call):
                result = run(*arguments, **options)
                for device in devices:
                    synchronize(device)
            return result

        return named

    return wrap


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device, which raises its pending errors. Does nothing while a graph is captured."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _errors_of(call: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, torch.OutOfMemoryError):  # the first names its operator, the second is no fault of it
        raise
    except Exception as error:
        raise RuntimeError(f"{call}: {error}") from error


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]


def _described(value: Any) -> str:
    """A tensor's shape, dtype and device; anything else as it is."""
    found = [f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}" for x in _tensors(value)]
    return " and ".join(found) if found else repr(value)


def nhwc(x: Tensor) -> Tensor:
    """``x`` in channels_last: itself if it already is, else a copy. The one place where a layout is converted."""
    return x.contiguous(memory_format=torch.channels_last)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off, which would run resizes and matrix products in half precision."""
    known = device.type in AUTOCAST_DEVICES
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and weights: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_features(operator: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all are ``[B, C, H, W]`` of one supported dtype, on one device; B may be 0."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{operator} expects {name} [B, C, H, W], all but B at least 1, got shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{operator} expects {name} in float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{operator} expects {name} like {first_name} ({first.dtype} on {first.device}), "
                f"got {x.dtype} on {x.device}"
            )
