"""First contact: the import, the commands and their help."""

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["train", "evaluate", "predict", "export", "data"]


def run(program, **settings):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, **settings
    )


def test_importing_is_quick_and_silent_and_writes_nothing(tmp_path):
    program = """
        import time
        import torch
        start = time.perf_counter()
        import dfn_fast
        seconds = time.perf_counter() - start
        assert seconds < 2, seconds
        assert not torch.cuda.is_initialized()
        assert dfn_fast.ReferenceDFN.__name__ == "ReferenceDFN"
    """
    done = run(program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def is_help(text, command):
    return text.startswith(f"usage: python -m dfn_fast.{command}") and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"dfn_fast.{command}.__main__").main(["--help"])
    assert left.value.code in (None, 0)
    assert is_help(capsys.readouterr().out, command)


@pytest.mark.slow  # each process imports PyTorch
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_by_its_name(command, tmp_path):
    words = [sys.executable, "-m", f"dfn_fast.{command}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert is_help(done.stdout, command)


def test_the_commands_of_the_readme_are_there():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python -m dfn_fast.train" in lines
    assert 'pip install -e ".[test]" && pytest -n auto --dist loadfile' in lines


def test_supported_versions_are_the_same_everywhere():
    tomllib = pytest.importorskip("tomllib")
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dfn-fast"]["supported"]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert f'python_requires=">={supported["python"][0]}"' in setup
    assert re.findall(r"Programming Language :: Python :: (\S+)\"", setup) == supported["python"]
    assert f'"torch>={supported["torch"]}"' in setup
    assert f"| Python | {', '.join(supported['python'])} |" in page
    assert f"| PyTorch | {supported['torch']} and newer |" in page
    assert f"| Triton | {supported['triton']} and newer, on Linux;" in page
