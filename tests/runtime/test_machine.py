"""What the machine has: memory, and the shared memory of the loading processes."""

import os
import sys
from types import SimpleNamespace

import pytest

from dfn_fast.runtime.machine import memory_bytes, shared_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_memory_is_what_the_system_says():
    with open("/proc/meminfo", encoding="utf-8") as file:
        assert memory_bytes() == int(file.readline().split()[1]) * 1024


@pytest.mark.parametrize(("blocks", "expected"), [(16, 8 * 4096), (0, None)], ids=["limited", "without a limit"])
def test_shared_memory_is_what_is_free(monkeypatch, blocks, expected):
    asked = []
    status = SimpleNamespace(f_blocks=blocks, f_bavail=8 if blocks else 0, f_bfree=9, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or status)
    assert shared_memory_bytes() == expected
    assert asked == ["/dev/shm"]


def test_a_system_without_shared_memory_of_its_own_has_no_limit(monkeypatch):
    monkeypatch.delattr(os, "statvfs", raising=False)
    assert shared_memory_bytes() is None
