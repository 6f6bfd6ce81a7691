"""Fixtures of the suite. Without a GPU kernels run in Triton's interpreter; uninitialised memory reads as NaN."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: the processes of `pytest -n` share the cores
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores from the other processes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

# Before any kernel module is imported: Triton decides at decoration whether it interprets.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DFN_KERNELS", "torch")  # the kernels' own tests choose theirs

ROOT = Path(__file__).resolve().parents[1]
ALL_CASES = pytest.StashKey[dict[str, bool]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Notes every case before -m and -k leave some out."""
    config.stash[ALL_CASES] = {item.nodeid: item.get_closest_marker("gpu") is not None for item in items}


@pytest.fixture(scope="session")
def all_cases(pytestconfig: pytest.Config) -> dict[str, bool]:
    """The name of every collected case, selected or not, and whether it needs a GPU."""
    return pytestconfig.stash[ALL_CASES]


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """An element that nothing wrote cannot pass a test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """The real CamVid images; a test that wants them is skipped where they are not."""
    root = Path(os.environ.get("DFN_CAMVID", ROOT.parent / "shared" / "data" / "camvid"))
    if not (root / "train.txt").exists():
        pytest.skip(f"CamVid is not at {root}; name its folder in DFN_CAMVID")
    return root
