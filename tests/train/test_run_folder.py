import os

import pytest

from dfn_fast.config import recipe
from dfn_fast.errors import ConfigError
from dfn_fast.files import replacing, write_text
from dfn_fast.train.folder import RunFolder, default_folder


def test_a_folder_that_holds_a_run_is_not_reused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(recipe("camvid"))
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        RunFolder(tmp_path / "run").start(recipe("voc"))
    assert '"recipe": "camvid"' in folder.config_file.read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").start(recipe("camvid"))


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
    (tmp_path / ".last.pth.1.tmp").write_text("half a checkpoint")
    folder.forget_after(20, epochs=1)
    assert [(r["kind"], r["iteration"]) for r in folder.metrics()] == [("train", 10), ("val", 10), ("train", 20)]
    assert folder.metrics()[0]["loss"] is None
    assert not list(tmp_path.glob(".*"))


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
