import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dfn_fast.config import recipe
from dfn_fast.errors import ConfigError, OutputError
from dfn_fast.files import replacing, write_text
from dfn_fast.train.folder import RunFolder, default_folder
from dfn_fast.train.pictures import plot_curves


def test_a_folder_that_holds_a_run_is_not_reused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.alone():
        folder.start(recipe("camvid"))
    with pytest.raises(ConfigError, match=r"holds a run already \(config\.json\); add --resume"):
        RunFolder(tmp_path / "run").start(recipe("voc"))
    assert '"recipe": "camvid"' in folder.config_file.read_text()


@pytest.mark.parametrize("name", ["last.pth", "best.pth", "metrics.jsonl", "summary.json", "predictions.png"])
def test_nothing_that_a_run_left_is_overwritten(tmp_path, name):
    (tmp_path / name).symlink_to("elsewhere")  # also not through a link
    with pytest.raises(ConfigError, match=rf"holds a run already \({re.escape(name)}\); add --resume"):
        RunFolder(tmp_path).require_no_run()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").alone():
        pass


def test_resuming_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run \(no config\.json\)"):
        RunFolder(tmp_path).config()


def test_metrics_later_than_the_checkpoint_are_forgotten(tmp_path):
    folder = RunFolder(tmp_path)
    for iteration in (10, 20):
        folder.log({"kind": "train", "epoch": iteration // 10, "iteration": iteration, "loss": float("nan")})
        folder.log({"kind": "val", "epoch": iteration // 10, "iteration": iteration})
    with folder.metrics_file.open("a") as file:
        file.write('{"kind": "tra')  # truncated by a power failure
    with folder.metrics_file.open("ab") as file:
        file.write(b"\xf0\x9f")  # truncated within a character
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = f".last.pth.{socket.gethostname()[:32]}-{int(ended.stdout)}.abcdefgh.tmp"
    for name in (leftover, ".mine.tmp"):
        (tmp_path / name).write_text("half a checkpoint")
    folder.forget_after(20, epochs=1)
    assert [(r["kind"], r["iteration"]) for r in folder.metrics()] == [("train", 10), ("val", 10), ("train", 20)]
    assert folder.metrics()[0]["loss"] is None
    assert [path.name for path in tmp_path.glob(".*")] == [".mine.tmp"]


DAMAGED = [
    "[1]",
    '{"kind": []}',
    '{"kind": "train"}',
    '{"kind": "train", "epoch": 1, "iteration": true}',
    '{"kind": "train", "epoch": 1, "iteration": -1}',
    '{"kind": "train", "epoch": 1, "iteration": 1, "loss": "low"}',
    '{"kind": "train", "epoch": 1, "iteration": 1, "loss": [1]}',
    '{"kind": "train", "epoch": 1, "iteration": 1, "lr": 1' + "0" * 400 + "}",
    '{"kind": "train", "epoch": 1, "iteration": 1' + "0" * 30 + "}",
    '{"kind": "val", "epoch": "x", "iteration": 1}',
    '{"kind": "val", "epoch": 1, "iteration": 1, "mean_iou": {}}',
    '{"kind": "test", "epoch": 1, "iteration": 1}',
    "[" * 100_000,
    "",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_costs_neither_records_nor_curves(tmp_path, line, capsys):
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        folder.log({"kind": "train", "epoch": 1, "iteration": iteration, "loss": 1.5, "lr": 0.1})
        with folder.metrics_file.open("a") as file:
            file.write(f"{line}\n")
    folder.log({"kind": "val", "epoch": 1, "iteration": 2, "mean_iou": None})
    records = folder.metrics()
    assert [(r["kind"], r["iteration"]) for r in records] == [("train", 1), ("train", 2), ("val", 2)]
    assert "metrics.jsonl: left out 2 damaged lines" in capsys.readouterr().err
    plot_curves(records, folder.curves)
    assert folder.curves.stat().st_size > 1000
    folder.forget_after(2, epochs=1)
    assert folder.metrics() == records


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_huge(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)  # without taking space


TEXTS = ["config.json", "metrics.jsonl", "summary.json"]
NAMES = [*TEXTS, "last.pth", "previous.pth", "best.pth", "curves.png", "predictions.png", "trace.json.gz", "run.lock"]
KINDS = ((make_pipe, "pipe"), (make_device, "device"), (Path.mkdir, "folder"))
ODD = [(name, *kind) for name in NAMES for kind in KINDS]
ODD += [(name, make_huge, "has 1099511627776 bytes") for name in TEXTS]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize(("name", "make", "message"), ODD)
def test_a_file_of_a_run_is_looked_at_before_it_is_opened(tmp_path, name, make, message):
    make(tmp_path / name)
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: .*{message}"), folder.alone():
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_metrics_that_became_a_pipe_are_an_error(tmp_path):
    folder = RunFolder(tmp_path)
    os.mkfifo(folder.metrics_file)
    for use in (folder.metrics, lambda: folder.log({"kind": "train"})):
        with pytest.raises(OutputError, match=r"metrics\.jsonl: expected a regular file, got a pipe"):
            use()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000])
def test_the_files_of_a_run_have_the_permissions_that_the_user_gives_new_files(tmp_path, umask):
    folder, before = RunFolder(tmp_path / "run"), os.umask(umask)
    try:
        with folder.alone():
            folder.start(recipe("camvid"))
            for _ in range(2):
                folder.save_last({"a": 1})
            folder.log({"kind": "train", "epoch": 1, "iteration": 1})
            folder.forget_after(1, 0)
            folder.write_summary({})
            plot_curves([], folder.curves)
            assert os.umask(umask) == umask  # reading it must not change it
            files = {path.name: path.stat().st_mode & 0o777 for path in folder.path.iterdir()}
    finally:
        os.umask(before)
    names = ["config.json", "curves.png", "last.pth", "metrics.jsonl", "previous.pth", "run.lock", "summary.json"]
    assert files == dict.fromkeys(names, 0o666 & ~umask)


HOLDER = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX)
os.write(handle, b"process 7 on elsewhere")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
def test_a_folder_is_for_one_process_until_that_is_killed(tmp_path):
    folder = RunFolder(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(folder.lock_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=r"process 7 on elsewhere trains in this folder"), folder.alone():
            pass
        other.kill()
    assert folder.lock_file.exists()
    with folder.alone():
        assert folder.lock_file.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not folder.lock_file.exists()


def test_the_default_folder_is_the_first_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(default_folder("voc", resume=False)) == os.path.join("runs", "voc")
    with pytest.raises(ConfigError, match="no run of recipe 'voc'"):
        default_folder("voc", resume=True)
    for name, age in (("voc", 3), ("voc-2", 9), ("voc-other", 1)):
        checkpoint = tmp_path / "runs" / name / "last.pth"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("")
        os.utime(checkpoint, (1000 - age, 1000 - age))
    assert default_folder("voc", resume=False).name == "voc-3"
    assert default_folder("voc", resume=True).name == "voc"
    (tmp_path / "runs" / "voc-3").write_text("a file")
    assert default_folder("voc", resume=False).name == "voc-4"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half of the n")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    write_text(path, "new")
    assert path.read_text() == "new"
