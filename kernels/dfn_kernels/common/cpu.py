"""What this CPU computes in hardware. Nothing else in the project asks PyTorch about it."""

import functools

import torch


def _supported(name: str) -> bool:
    """The answer of a function of ``torch.cpu``; False in versions of PyTorch that do not have it."""
    return bool(getattr(torch.cpu, name, lambda: False)())


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware: several times as fast as float32."""
    return _supported("_is_amx_tile_supported")


@functools.cache
def has_bf16_arithmetic() -> bool:
    """Whether this CPU computes in bf16, with or without matrix units, and does not only store it."""
    return has_amx() or _supported("_is_avx512_bf16_supported")


@functools.cache
def onednn_takes_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here. It refuses on CPUs without AVX-512, where PyTorch's own convolution works
    number by number: float32 arithmetic, rounded once, is many times as fast and no less exact."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
