"""Thousands of broken files: each is read, or refused by a named error, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.broken_files import KINDS, MEMORY, mutated

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="the limits on time and memory are POSIX")
# The short range has both outcomes of each kind. For safetensors that is rare.
@pytest.mark.parametrize("cases", [range(1200, 1600), pytest.param(range(3000), marks=pytest.mark.slow)], ids=len)
def test_every_broken_file_is_read_or_refused_by_name(cases):
    command = [sys.executable, ROOT / "tests" / "support" / "broken_files.py", "all", f"{cases.start}:{cases.stop}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith("FAILED")]
    assert lines[-1].startswith("{"), f"crashed or hung at {lines[-1]}:\n{done.stderr[-3000:]}"
    summary = json.loads(lines[-1])
    assert done.returncode == 0, "\n".join([f"{len(failures)} cases failed", done.stdout[:5000]])
    counts = summary["counts"]
    assert sum(sum(count.values()) for count in counts.values()) == len(cases)
    # Both outcomes occur: the changes are neither so wild that all fail nor so mild that none does.
    assert {kind for kind, count in counts.items() if not count["refused"]} == set()
    assert {kind for kind, count in counts.items() if not count["read"]} == {"code", "network"}
    assert summary["grown"] <= MEMORY


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_the_same_whenever_it_is_made(kind):
    first = [mutated(kind, number) for number in range(4)]
    assert [mutated(kind, number) for number in range(4)] == first
    assert len(set(first)) > 1
