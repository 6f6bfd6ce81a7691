"""Checkpoint files are written completely or not at all."""

import contextlib
import errno
import os
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dfn_fast.checkpoint.archive import read_file, save_atomic
from dfn_fast.errors import CheckpointError


def test_what_is_saved_is_read_back(tmp_path):
    content = {
        "model": OrderedDict(a=torch.randn(3, 4), b=torch.tensor(7)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "random": ["MT19937", (3, None), torch.get_rng_state()],
        "flag": True,
    }
    save_atomic(content, tmp_path / "run.pth")
    back = read_file(tmp_path / "run.pth")
    assert all(torch.equal(back["model"][name], content["model"][name]) for name in "ab")
    assert back["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    assert back["random"][:2] == ["MT19937", (3, None)]
    assert os.listdir(tmp_path) == ["run.pth"]


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.zeros(3), {"deep": [object()]}, torch.nn.Linear(1, 1)],
    ids=["number", "array", "deep", "module"],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    with pytest.raises(CheckpointError, match=r"run\.pth: content\['extra'\].* is a .*could not be read back"):
        save_atomic({"iteration": 2, "extra": value}, path)
    assert read_file(path) == {"iteration": 1}


@contextlib.contextmanager
def files_of_at_most(size):
    """Limits the files of this process to ``size`` bytes in this context, as on a full disk."""
    resource = pytest.importorskip("resource", reason="the limit on a file's size is POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [150_000, 400_500], ids=["in a tensor", "in the last bytes"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, room):
    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    weights = [torch.zeros(500, 50) for _ in range(4)]
    with files_of_at_most(room), pytest.raises(CheckpointError) as error:
        save_atomic({"iteration": 2, "weights": weights}, path)
    assert str(error.value).startswith(f"{path}: could not be written ([Errno {errno.EFBIG}]")
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, moment):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(CheckpointError, match=r"run\.pth: could not be written .*No space left"):
        save_atomic({"iteration": 2}, path)
    monkeypatch.undo()
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half a check")
        raise KeyboardInterrupt

    path = tmp_path / "run.pth"
    save_atomic({"iteration": 1}, path)
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"iteration": 2}, path)
    assert read_file(path) == {"iteration": 1}
    assert os.listdir(tmp_path) == ["run.pth"]


def test_the_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    save_atomic({"iteration": 1}, tmp_path / "run.pth")
    assert calls == ["fsync", "replace", "fsync"]  # the last one syncs the folder


def test_what_had_the_name_before_is_kept(tmp_path):
    for iteration in range(3):
        save_atomic({"iteration": iteration}, tmp_path / "last.pth", tmp_path / "previous.pth")
    assert read_file(tmp_path / "last.pth") == {"iteration": 2}
    assert read_file(tmp_path / "previous.pth") == {"iteration": 1}
    assert sorted(os.listdir(tmp_path)) == ["last.pth", "previous.pth"]


def test_ours_have_checksums_and_others_need_none(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_atomic({"weight": torch.ones(9)}, tmp_path / "ours.pth")
        torch.save({"weight": torch.ones(9)}, tmp_path / "others.pth")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    for name, has in (("ours.pth", True), ("others.pth", False)):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert any(record.CRC for record in archive.infolist()) == has
        assert torch.equal(read_file(tmp_path / name)["weight"], torch.ones(9))


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/run\.pth: could not be written .*No such file or directory"):
        save_atomic({"iteration": 1}, tmp_path / "gone" / "run.pth")
