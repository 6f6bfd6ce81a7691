"""The machine: its facts, its measured ceilings, and on a GPU the power that a call draws."""

import functools
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.measure import DEVICE, HAS_BF16, alternate, percentile, synchronize

CUDA = DEVICE.type == "cuda"
COPY_BYTES = 1 << (30 if CUDA else 27)
PRODUCT_SIDE = 8192 if CUDA else 1536
DTYPES = [torch.float32, *([torch.bfloat16] if HAS_BF16 else []), *([torch.float16] if CUDA else [])]


@functools.lru_cache(maxsize=1)
def copy_bandwidth() -> float:
    """Bytes per second of a large copy on this machine, reads and writes counted."""
    source = torch.ones(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, 12)["copy"][2:]
    return 2 * source.nbytes / statistics.median(seconds)


@functools.lru_cache(maxsize=4)
def matrix_product(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product in ``dtype`` on this machine."""
    a, b = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=DEVICE).to(dtype) for _ in range(2))
    seconds = alternate({"product": lambda: a @ b}, 8)["product"][2:]
    return 2 * PRODUCT_SIDE**3 / statistics.median(seconds)


def ceilings() -> dict[str, float]:
    """The roofs that the rows of a run are compared with, measured in that run."""
    roofs = {f"product_{name_of(dtype)}_tflop_per_s": matrix_product(dtype) / 1e12 for dtype in DTYPES}
    return {"copy_gb_per_s": copy_bandwidth() / 1e9, **roofs}


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def environment() -> dict[str, Any]:
    """The facts that a result depends on: device, driver, power limit, versions, threads."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": os.environ.get("DFN_KERNELS", "auto"),
    }
    return facts | _gpu_facts()


def _gpu() -> tuple[Any, Any] | None:
    """NVIDIA's management library and its handle of the GPU in use; None without one."""
    if not CUDA:
        return None
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}")


def _gpu_facts() -> dict[str, Any]:
    found = _gpu()
    if found is None:
        return {}
    nvml, handle = found
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "sm_clock_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
    }


def power(call: Callable[[], Any], least: float = 1.0) -> dict[str, float]:
    """Joules of a call, mean watts and the median clock of the SMs, over calls that fill ``least`` seconds, as the
    GPU's energy counter moves only some ten times a second. Empty without a GPU or without such a counter."""
    found = _gpu()
    if found is None:
        return {}
    nvml, handle = found
    clocks: list[float] = []
    synchronize()
    try:
        before, start = nvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter()
        while time.perf_counter() - start < least:
            call()
            clocks.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            synchronize()
        millijoules, seconds = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before, time.perf_counter() - start
    except nvml.NVMLError:
        return {}
    return {
        "joules_per_call": millijoules / 1e3 / len(clocks),
        "watts": millijoules / 1e3 / seconds,
        "sm_clock_mhz": percentile(clocks, 0.5),
    }
