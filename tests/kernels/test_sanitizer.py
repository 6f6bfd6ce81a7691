"""Memory errors and races that do not show in results: the short parity run under NVIDIA's compute-sanitizer."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from support import sanitizer_run
from support.parity import DEVICE

TESTS = Path(__file__).resolve().parents[1]
FOUND = 86  # exit status where the sanitizer found something, unlike any of Python's


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH, in the CUDA toolkit, or in a wheel of NVIDIA's."""
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    folders = [Path(root) / part for root in toolkits for part in ("bin", "compute-sanitizer")]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"))
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/compute-sanitizer"))
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=places)


def sanitized(tool: str, script: str) -> subprocess.CompletedProcess:
    """A script of tests/support under a tool of compute-sanitizer."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in a CUDA toolkit ($CUDA_HOME) nor in a wheel")
    # Of blocks that PyTorch keeps and hands out in parts, the sanitizer could not tell where an array ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DFN_KERNELS": "triton"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, str(TESTS / "support" / script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_parity_run_is_right(backend, dtype, monkeypatch, capsys):
    """The program itself, without the sanitizer: every operator, and a wrong result is told."""
    if backend == "triton" and DEVICE == "cpu":  # the interpreter takes its time
        monkeypatch.setattr(sanitizer_run, "ODD", [sanitizer_run.Sizes(1, 3, 3, 5, 2, 3)])
    assert sanitizer_run.main(DEVICE, (dtype,)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 * len(sanitizer_run.ODD)
    assert all(line.startswith("right ") for line in lines)


def test_the_parity_run_tells_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr("dfn_kernels.attention.upsample_add.nhwc", lambda x: x.flip(-1))
    assert sanitizer_run.main(DEVICE, (torch.float32,)) == len(sanitizer_run.ODD)
    assert "WRONG upsample_add" in capsys.readouterr().out


def test_the_sanitizer_is_found_in_a_toolkit(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_sanitizer() == str(tool)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    done = sanitized(tool, "sanitizer_run.py")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count("right ") == 8 * len(sanitizer_run.ODD) * len(sanitizer_run.DTYPES)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_the_sanitizer_finds_a_wild_read():
    """It looks into our kernels at all."""
    done = sanitized("memcheck", "wild_read.py")
    assert done.returncode != 0
    assert "_upsample_add_fwd_kernel" in done.stdout + done.stderr
