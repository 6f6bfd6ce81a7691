"""Files that we write: whole or not at all, in the place of nothing that is not a file, with the user's permissions."""

import io
import os
import socket
import stat
import sys
import threading
from unittest.mock import patch

import pytest
import torch

from dfn_fast import cli
from dfn_fast.checkpoint.archive import save_atomic
from dfn_fast.errors import CheckpointError, UserError
from dfn_fast.files import replacing, write_text

OLD, NEW = "old " * 9, "new"


def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    target.write_text(OLD)
    (tmp_path / "second").symlink_to("elsewhere/file")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "dangling").symlink_to("elsewhere/absent")
    for name, written in (("first", target), ("dangling", tmp_path / "elsewhere" / "absent")):
        write_text(tmp_path / name, NEW)
        assert (tmp_path / name).is_symlink()
        assert written.read_text() == NEW
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "circle", NEW)


def test_a_pipe_is_written_through_once_the_block_has_succeeded(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="nobody reads"):
        write_text(pipe, NEW)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    handle = os.open(pipe, os.O_WRONLY)  # waits for the reader
    with pytest.raises(ZeroDivisionError), replacing(pipe) as file:
        file.write(b"half")
        raise ZeroDivisionError
    write_text(pipe, NEW)
    os.close(handle)
    reader.join()
    assert found == [NEW]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
def test_a_device_is_written_through(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_text(link, NEW)
    with pytest.raises(OSError, match="No space left"):
        write_text("/dev/full", NEW)
    assert all(stat.S_ISCHR(os.stat(path).st_mode) for path in (link, "/dev/full"))


@pytest.mark.parametrize("kind", ["socket", "disk", "folder"])
def test_what_holds_other_data_is_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    with socket.socket(socket.AF_UNIX) as server, patch("stat.S_ISBLK", lambda mode: kind == "disk" and mode):
        if kind != "folder":
            monkeypatch.chdir(tmp_path)  # a socket's path may not be long
            server.bind("place")
        before = path.lstat()
        with pytest.raises(OSError, match="directory" if kind == "folder" else kind):
            write_text(path, NEW)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_file_that_is_open_gets_the_content_in_its_order(tmp_path, folder):
    with (tmp_path / "output").open("w") as file:
        print("before", file=file, flush=True)
        write_text(f"{folder}/{file.fileno()}", NEW)
    assert (tmp_path / "output").read_text() == f"before\n{NEW}"
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", NEW)
        assert os.umask(umask) == umask  # reading it has not changed it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(mode)
    write_text(tmp_path / "file", NEW)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_write_protected_file_is_not_replaced(tmp_path):
    write_text(tmp_path / "file", OLD)
    with (
        patch("os.access", lambda path, mode: mode != os.W_OK),
        pytest.raises(PermissionError, match="write-protected"),
    ):
        write_text(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == OLD


@pytest.mark.parametrize("letter", ["n", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{CJK UNIFIED IDEOGRAPH-5BFE}"])
def test_a_name_of_the_greatest_length_can_be_written_and_kept(tmp_path, letter):
    name = letter * (255 // len(letter.encode()))
    path, previous = tmp_path / name, tmp_path / ("p" * 255)
    for text in (OLD, NEW):
        with replacing(path, previous) as file:
            file.write(text.encode())
    assert (path.read_text(), previous.read_text()) == (NEW, OLD)
    with pytest.raises(OSError, match="too long"):
        write_text(tmp_path / (name + letter), NEW)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_file_or_the_one_before_is_whole_at_every_moment(tmp_path, monkeypatch, links):
    path, previous = tmp_path / "last", tmp_path / "previous"
    moments = []

    def watched(function):
        def call(*arguments):
            function(*arguments)
            moments.append([x.read_text() if x.exists() else None for x in (path, previous)])

        return call

    def no_links(*_):
        raise OSError

    for text in "123":
        with replacing(path, previous) as file:
            file.write(text.encode())
        if text == "1":
            for name in ("replace", "unlink"):
                monkeypatch.setattr(os, name, watched(getattr(os, name)))
            monkeypatch.setattr(os, "link", watched(os.link) if links else no_links)
    assert moments[-1] == ["3", "2"]
    assert all(kept is not None for _, kept in moments[moments.index(["1", "1"] if links else [None, "1"]) :])
    if links:  # `last` never goes, not even between two names
        assert None not in [last for last, _ in moments]
    assert sorted(os.listdir(tmp_path)) == ["last", "previous"]


def test_a_kill_between_two_names_leaves_nothing_behind(tmp_path):
    path, previous = tmp_path / "last", tmp_path / "previous"
    path.write_text(OLD)
    os.link(path, previous)  # both are names of one file: the kill came before the last rename
    with replacing(path, previous) as file:
        file.write(NEW.encode())
    assert (path.read_text(), previous.read_text()) == (NEW, OLD)
    assert sorted(os.listdir(tmp_path)) == ["last", "previous"]


def test_the_systems_error_is_named_where_a_writer_hides_it(tmp_path):
    path = tmp_path / "file"
    path.write_text(OLD)
    with pytest.raises(OSError, match="quota"), replacing(path):
        try:
            raise OSError("over quota")
        except OSError as error:
            raise RuntimeError("the writer failed") from error
    with pytest.raises(RuntimeError, match="a bug"), replacing(path):
        raise RuntimeError("a bug")
    assert path.read_text() == OLD


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
def test_a_checkpoint_on_a_full_disk_names_the_cause():
    with pytest.raises(CheckpointError, match=r"/dev/full: could not be written .*No space left"):
        save_atomic({"weights": torch.zeros(9)}, "/dev/full")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\rb\x07", r"a\rb\x07"),
        ("a\x9bb", r"a\x9bb"),
        ("gnp\N{RIGHT-TO-LEFT OVERRIDE}", r"gnp\u202e"),
        ("a\udcffb", r"a\udcffb"),
        ("tab\tline\n\N{LATIN SMALL LETTER E WITH ACUTE} \N{IDEOGRAPHIC SPACE}",) * 2,
    ],
)
def test_control_characters_of_a_name_are_never_printed(monkeypatch, name, shown):
    assert str(UserError(f"{name}: wrong")) == f"{shown}: wrong"
    written = {}
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""))
        written[stream] = getattr(sys, stream).buffer
    with pytest.raises(SystemExit, match="0"):
        cli.run(lambda: [print(name, end="", file=file, flush=True) for file in (sys.stdout, sys.stderr)] and 0)
    assert written["stdout"].getvalue().decode() == shown
    assert written["stderr"].getvalue().decode() == shown.replace(r"\r", "\r")  # which a progress bar needs
