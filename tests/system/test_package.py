import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def test_every_command_has_help(tmp_path):
    for command in ("train", "evaluate", "predict", "export", "data"):
        done = subprocess.run(
            [sys.executable, "-m", f"dfn_fast.{command}", "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: python -m dfn_fast.{command}")
        assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_commands_of_the_readme_are_there():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python -m dfn_fast.train" in lines
    assert 'pip install -e ".[test]" && pytest -n auto --dist loadfile' in lines
