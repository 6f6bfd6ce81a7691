"""Fixtures of the suite. Without a GPU, kernels run in Triton's interpreter; uninitialised memory reads as NaN."""

import os
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # set before torch is imported: `pytest -n` workers share the cores
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take the cores from other workers
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

from support.skips import fail_if_more_than_known, known_skips, tier_of

# Set before any kernel module is imported: Triton decides at decoration whether to interpret.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DFN_KERNELS", "torch")  # the kernel tests choose their own

ROOT = Path(__file__).resolve().parents[1]
ALL_CASES = pytest.StashKey[dict[str, bool]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Records every case before -m and -k deselect some."""
    config.stash[ALL_CASES] = {item.nodeid: item.get_closest_marker("gpu") is not None for item in items}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if "DFN_COUNT_SKIPS" in os.environ:
        fail_if_more_than_known(terminalreporter, known_skips(tier_of(config.option.markexpr)))


@pytest.fixture(scope="session")
def all_cases(pytestconfig: pytest.Config) -> dict[str, bool]:
    """Whether each collected case, selected or not, needs a GPU, by name."""
    return pytestconfig.stash[ALL_CASES]


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Fills uninitialised memory with NaN, so that an element that was never written fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """The folder of the real CamVid images. Skips the test if they are not there."""
    root = Path(os.environ.get("DFN_CAMVID", ROOT.parent / "shared" / "data" / "camvid"))
    if not (root / "train.txt").exists():
        pytest.skip(f"CamVid is not at {root}; name its folder in DFN_CAMVID")
    return root
