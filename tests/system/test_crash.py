"""Killed runs, and runs whose folder fails: their files stay whole, and a resumed run ends the same."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dfn_fast import cli
from dfn_fast.checkpoint.archive import read_file
from dfn_fast.train import __main__ as train
from dfn_fast.train import report as run_report
from dfn_fast.train.folder import RunFolder, default_folder
from dfn_fast.trainer.trainer import Trainer
from support.runs import SMALL_RUN, differences, small_runs, timeless_metrics

SUPPORT = Path(__file__).resolve().parents[1] / "support"


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts its threads in /proc")


def kill(kills, folder):
    """Runs kill_chain.py, which asserts that no bit changes. Returns its counts."""
    command = [sys.executable, SUPPORT / "kill_chain.py", folder, str(kills), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@on_linux
def test_ten_kills_change_no_bit(tmp_path):
    assert kill(10, tmp_path)["kills"] >= 10


@pytest.mark.slow  # a second for each kill
@on_linux
@pytest.mark.timeout(1200)
def test_a_hundred_kills_change_no_bit(tmp_path):
    """Also checks that enough kills hit the critical moments."""
    found = kill(100, tmp_path)
    assert found["kills"] >= 100
    assert min(found[f"{kind} kills"] for kind in ("time", "file", "call")) >= 20
    assert found["in a write"] >= 20
    assert found["between two names"] >= 1
    assert found["chains"] >= 3


@pytest.fixture
def small(tmp_path):
    """Trains into a folder below tmp_path by the command line: small("run", "--stop-after", "2"). Exit code 0."""

    def run(name, *words, code=0):
        folder = tmp_path / name
        options = [] if "--resume" in words else SMALL_RUN.split()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: train.main([*options, "--output-dir", str(folder), *words]))
        assert left.value.code == code
        return RunFolder(folder)

    with small_runs():
        yield run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run of two epochs."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "straight")
    with small_runs():
        assert train.main([*SMALL_RUN.split(), "--epochs", "2", "--output-dir", str(run.path)]) == 0
    return run


def damage(path):
    """Flips one bit of the largest tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# The checkpoint before the last


def damaged_run(small, capsys):
    run = small("run", "--epochs", "2", "--stop-after", "4")
    positions = [read_file(path)["position"]["iteration"] for path in (run.previous, run.last)]
    assert positions == [3, 4]
    capsys.readouterr()
    return run


@pytest.mark.parametrize("harm", [damage, Path.unlink, lambda path: os.truncate(path, 0)], ids=["bit", "gone", "empty"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_continues(small, straight, capsys, harm):
    run = damaged_run(small, capsys)
    harm(run.last)
    small("run", "--resume", "--stop-after", "4")
    error = capsys.readouterr().err
    assert f"{run.last}: this checkpoint " in error
    assert f"continuing from {run.previous}" in error
    # The damaged file must not replace the one before: a kill between the two renames would leave no whole checkpoint.
    assert [read_file(path)["position"]["iteration"] for path in (run.previous, run.last)] == [3, 4]
    small("run", "--resume")
    assert differences(read_file(straight.last), read_file(run.last)) == []
    assert timeless_metrics(straight) == timeless_metrics(run)
    assert sorted(os.listdir(run.path)) == sorted(os.listdir(straight.path))


def test_two_damaged_checkpoints_are_both_named(small, capsys):
    run = damaged_run(small, capsys)
    damage(run.last)
    damage(run.previous)
    small("run", "--resume", code=2)
    error = capsys.readouterr().err
    assert f"{run.last}: this checkpoint is damaged (the checksum of its record" in error
    assert f"{run.previous}: this checkpoint is damaged" in error


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(small, straight, monkeypatch, tmp_path):
    folder = tmp_path / "runs" / "synthetic"
    with monkeypatch.context() as patch:
        patch.setattr("dfn_fast.train.run.Run.train", lambda self: sys.exit(9))
        small(folder, "--epochs", "2", code=9)
    assert os.listdir(folder) == ["config.json"]
    monkeypatch.chdir(tmp_path)
    assert default_folder("synthetic", resume=True) == Path("runs/synthetic")
    run = small(folder, "--resume")
    assert differences(read_file(straight.last), read_file(run.last)) == []
    assert timeless_metrics(straight) == timeless_metrics(run)


def test_without_hard_links_the_last_checkpoint_is_renamed(small, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    run = small("run", "--stop-after", "2")
    assert [read_file(path)["position"]["iteration"] for path in (run.previous, run.last)] == [0, 2]


# A folder that cannot be written


FILES = ["last.pth", "best.pth", "metrics.jsonl", "summary.json", "config.json"]


@pytest.fixture
def failing(monkeypatch):
    """Makes a file of a run fail when it is written: with the kernel's own ENOSPC, or as in a read-only folder."""

    def fail(name, reason, after=0):
        count = iter(range(10**6))
        mkstemp, opened = tempfile.mkstemp, Path.open

        def hit(candidate):
            return candidate == name and next(count) >= after

        def refuse(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        def make(*args, prefix, **settings):
            if not hit(".".join(prefix.split(".")[1:3])):
                return mkstemp(*args, prefix=prefix, **settings)
            if reason == "read-only":
                refuse(prefix)
            handle, path = mkstemp(*args, prefix=prefix, **settings)
            os.close(handle)
            return os.open("/dev/full", os.O_WRONLY), path

        def open_path(self, mode="r", *args, **settings):
            if mode == "a" and hit(self.name):
                if reason == "read-only":
                    refuse(self)
                return opened(Path("/dev/full"), mode, *args, **settings)
            return opened(self, mode, *args, **settings)

        monkeypatch.setattr(tempfile, "mkstemp", make)
        monkeypatch.setattr(Path, "open", open_path)

    return fail


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
@pytest.mark.parametrize("reason", ["full", "read-only"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_written_is_named_and_the_checkpoint_stays(
    small, straight, failing, monkeypatch, capsys, name, reason
):
    failing(name, reason, after={"last.pth": 2, "metrics.jsonl": 2}.get(name, 0))
    run = small("run", "--epochs", "2", code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(run.path if name == "config.json" else run.path / name) in error
    assert ("No space left on device" if reason == "full" else "Permission denied") in error
    assert "Traceback" not in error
    assert not list(run.path.glob(".*"))
    if name == "config.json":
        assert not list(run.path.iterdir())
        return
    expected = {"last.pth": 2, "metrics.jsonl": 2, "best.pth": 6, "summary.json": 6}
    assert read_file(run.last)["position"]["iteration"] == expected[name]
    monkeypatch.undo()
    with small_runs():
        small("run", "--resume")
    assert differences(read_file(straight.last), read_file(run.last)) == []
    assert timeless_metrics(straight) == timeless_metrics(run)


@pytest.mark.parametrize("name", ["curves.png", "predictions.png"])
def test_a_picture_that_cannot_be_written_is_named(small, failing, capsys, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw", run_report.draw)
        failing(name, "full")
        run = small("run", "--iterations", "1", code=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run.path / name} cannot be written (No space left on device)")
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize("moment", ["between two steps", "within a save"])
def test_a_folder_that_is_removed_during_the_run_is_named(small, monkeypatch, capsys, tmp_path, moment):
    def and_remove(call, after):
        count = iter(range(10**6))

        def run(*args):
            if next(count) == after:
                shutil.rmtree(tmp_path / "run")
            return call(*args)

        return run

    if moment == "between two steps":
        monkeypatch.setattr(Trainer, "step", and_remove(Trainer.step, 2))
    else:
        monkeypatch.setattr(torch, "save", and_remove(torch.save, 1))
    run = small("run", code=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run.metrics_file if moment == 'between two steps' else run.last}")
    assert "No such file or directory" in error
    assert not run.path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on a file's size is POSIX")
def test_a_checkpoint_that_meets_the_limit_midway_leaves_the_one_before(small, capsys):
    import resource

    run = small("run", "--stop-after", "2")
    before = run.last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        small("run", "--resume", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{run.last}: could not be written ([Errno {errno.EFBIG}]" in capsys.readouterr().err
    assert run.last.read_bytes() == before
    assert not list(run.path.glob(".*"))
