"""Kernel tests run on both back ends: the Triton kernels (in the interpreter without a GPU) and plain PyTorch."""

from collections.abc import Iterator

import pytest

from dfn_kernels.common.triton_or_stub import MISSING
from support.interpreter import skip_needless_work
from support.parity import DEVICE


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Runs the interpreter in less than half the time, with the same results."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu" and MISSING is None:
            skip_needless_work(patch)
        yield


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch) -> str:
    """Forces one back end for the test."""
    monkeypatch.setenv("DFN_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton_backend(monkeypatch) -> None:
    """Forces the Triton kernels, for tests of what only they promise."""
    monkeypatch.setenv("DFN_KERNELS", "triton")
