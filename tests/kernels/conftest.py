"""Kernel tests run on both back ends: the Triton kernels (in the interpreter without a GPU) and plain PyTorch."""

import pytest


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch) -> str:
    """Forces one back end for the test."""
    monkeypatch.setenv("DFN_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton_backend(monkeypatch) -> None:
    """The Triton kernels alone, for tests of what only they promise."""
    monkeypatch.setenv("DFN_KERNELS", "triton")
