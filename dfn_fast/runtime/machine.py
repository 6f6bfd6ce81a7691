"""The device's name, the peak memory, and the versions of the packages."""

import os
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


def memory_bytes() -> int | None:
    """The machine's memory; None if not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def shared_memory_bytes() -> int | None:
    """What is free of the memory in which PyTorch's processes pass tensors; None if it has no limit of its own."""
    try:
        status = os.statvfs("/dev/shm")
    except (AttributeError, OSError):  # not Linux
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # 0 blocks: mounted without a limit


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
