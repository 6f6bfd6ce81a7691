"""The device's name, the peak memory, and the versions of the packages."""

import platform
import sys

import cv2
import numpy as np
import torch

from dfn_fast.version import __version__


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    return {
        "dfn_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak of PyTorch's allocations on a GPU, of the process's resident memory on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
