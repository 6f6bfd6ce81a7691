"""Inputs that take long, have odd names or odd metadata: each fails or is told alone, and the others go on."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfn_fast.errors import ConfigError, DataError, UserError
from dfn_fast.files import clear_leftovers, replacing
from dfn_fast.media import video
from dfn_fast.media.images import read_image, read_label, write_image
from dfn_fast.media.video import VideoReader, VideoWriter
from dfn_fast.predict import prediction
from dfn_fast.predict.jobs import _find_sources
from support.predictions import files, picture, run
from support.videos import write_video

NO_TEXT = os.fsdecode(b"v\xff")
posix = pytest.mark.skipif(sys.platform != "linux", reason="other file systems have no such names")


@pytest.fixture
def hanging(monkeypatch):
    """``hanging("b.png")`` makes the reading of that file hang until the test ends."""
    end = threading.Event()

    def hang(name, call="read_image"):
        plain = getattr(prediction, call)

        def read(path, *more):
            if Path(path).name == name:
                end.wait(60)
            return plain(path, *more)

        monkeypatch.setattr(prediction, call, read)

    yield hang
    end.set()


@pytest.mark.parametrize("call", ["read_image", "open_image"])
def test_a_file_that_takes_too_long_fails_alone(checkpoint, hanging, capsys, call):
    hanging("b.png", call)
    for name in "abc":
        write_image(f"{name}.png", picture(0))
    options = ("--no-overlay", "--output-dir", "out", "--file-timeout", "0.3")
    assert run(checkpoint, "a.png", "b.png", "c.png", *options) == 1
    assert files("out") == ["a.png", "c.png", "legend.png"]
    assert "1 of 3 images failed:\n  b.png: it was not read within 0.3 s" in capsys.readouterr().err


def test_a_video_that_takes_too_long_fails_alone_and_nothing_else_touches_it(checkpoint, monkeypatch, capsys):
    """OpenCV ends the process if a video is read by two threads, or released while it is read."""
    write_video("trip.avi", 9)
    write_video("good.avi", 2)
    end, calls = threading.Event(), []

    class Capture:
        def __init__(self, source):
            self.source, self.capture, self.frames = source, plain(source), 0

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            self.frames += 1
            calls.append(("read", self.source))
            if (self.source, self.frames) == ("trip.avi", 3):
                end.wait(60)
            return self.capture.read()

        def release(self):
            calls.append(("release", self.source))
            self.capture.release()

    plain = video.open_capture
    monkeypatch.setattr(video, "open_capture", Capture)
    inputs = (checkpoint, "trip.avi", "good.avi", "--output-dir", "out", "--file-timeout", "0.5", "--batch-size", 4)
    try:
        assert run(*inputs) == 1
        assert calls.count(("read", "trip.avi")) == 3
        assert ("release", "trip.avi") not in calls
        assert ("release", "good.avi") in calls
    finally:
        end.set()
    assert files("out") == ["good_overlay.mp4", "legend.png"]
    assert "1 of 2 videos failed:\n  trip.avi: it was not read within 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [("-1", "at least 0"), ("nan", "finite"), ("1e9", "at most 86400")])
def test_a_time_that_is_none_is_an_error(checkpoint, value, text):
    write_image("a.png", picture(0))
    with pytest.raises(ConfigError, match=f"--file-timeout must be {text}"):
        run(checkpoint, "a.png", "--output-dir", "out", "--file-timeout", value)


@posix
def test_names_that_are_no_text_never_reach_opencv(checkpoint, tmp_path, monkeypatch, capsys):
    write_video("v.avi", 3)
    os.rename("v.avi", f"{NO_TEXT}.avi")
    write_image(f"{NO_TEXT}.png", picture(0))
    assert run(checkpoint, f"{NO_TEXT}.avi", f"{NO_TEXT}.png", "--output-dir", "out") == 1
    assert files("out") == ["legend.png", f"{NO_TEXT}.png", f"{NO_TEXT}_overlay.png"]
    assert r"v\udcff.avi: the name of this video is no valid text in UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(video.cv2, "VideoWriter", lambda *_: pytest.fail("OpenCV got it"))
    (tmp_path / NO_TEXT).mkdir()
    with pytest.raises(UserError, match="the name of this folder for a video is no valid text"):
        VideoWriter(tmp_path / NO_TEXT, 10, (40, 52))
    with pytest.raises(DataError, match="no valid text"):
        VideoReader(f"http://host/{NO_TEXT}.mp4")


def test_a_name_that_is_too_long_fails_alone_and_before_its_work(checkpoint, capsys):
    for name in ("0" * 240, "0" * 250, "ok"):
        write_image("in.png", picture(0))
        os.rename("in.png", f"{name}.png")
    write_video("v.avi", 2)
    os.rename("v.avi", f"{'v' * 245}.avi")
    inputs = [f"{'0' * 240}.png", f"{'0' * 250}.png", "ok.png", f"{'v' * 245}.avi"]
    for more in ([], ["--skip-existing"]):
        assert run(checkpoint, *inputs, "--output-dir", "out", *more) == 1
        names = [f"{'0' * 240}.png", f"{'0' * 240}_overlay.png", "legend.png", "ok.png", "ok_overlay.png"]
        assert files("out") == names
        errors = capsys.readouterr().err
        assert "2 of " in errors
        assert errors.count("cannot be written (File name too long); rename the input") == 4  # at once, and at the end
    with pytest.raises(ConfigError, match="no such image"):
        run(checkpoint, "a" * 300 + ".png", "--output-dir", "out")


@posix
def test_what_a_killed_run_left_is_cleared_and_nothing_else(checkpoint, monkeypatch):
    for name in ("a.png", "in/night/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_image(name, picture(0))
    Path("out/night").mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process, folder in ((dead.pid, "out/night"), (dead.pid, "out"), (os.getpid(), "out")):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(os, "getpid", lambda process=process: process)
            patch.setattr(os, "unlink", lambda path: None)  # as if killed before
            with replacing(f"{folder}/{'ä' * 100}"):
                raise ZeroDivisionError
        Path(folder, f".video.{socket.gethostname()[:32]}-{process}.a1_defgh.tmp.mp4").write_text("half")
    old = "out/.a.png.far-away-1.abcdefgh.tmp"
    others = [f".a.png.far-{dead.pid}.abcdefgh.tmp", ".mine.tmp", "a.abcdefgh.tmp"]
    for name in (old, *(f"out/{name}" for name in others)):
        Path(name).write_text("")
    os.utime(old, (0, 0))
    assert len(files("out")) == 10
    kept = {name for name in files("out") if f"-{os.getpid()}." in name or name in others}
    assert len(kept) == 5
    assert run(checkpoint, "a.png", "in", "--output-dir", "out", "--no-overlay") == 0
    assert set(files("out")) == {*kept, "a.png", "night/b.png", "legend.png"}
    clear_leftovers(Path("nowhere"))


def test_how_images_were_read_is_told(checkpoint, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6
    Path("in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(picture(0)).save(f"in/{name}", exif=turned)
    frames = [Image.fromarray(picture(i)) for i in range(2)]
    frames[0].save("in/c.tif", save_all=True, append_images=frames[1:])
    assert run(checkpoint, "in", "--output-dir", "out", "--no-overlay") == 0
    assert read_label("out/a.png").shape == read_image("in/a.png").shape[:2] == (52, 40)
    errors = capsys.readouterr().err
    assert "images that are turned as their EXIF orientation says: 2 (in/a.png, in/b.png)\n" in errors
    assert "images that have more frames or pages, of which the first is read: 1 (in/c.tif)\n" in errors


@posix
def test_control_characters_of_names_are_written_out(checkpoint, capsys):
    name = "a\x1b[2J\x9b"
    Path("in").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.fromarray(picture(0)).save("in.png", exif=turned)
    os.rename("in.png", f"in/{name}.png")
    Path(f"in/{name}b.png").write_bytes(b"no image")
    Path(f"in/{name}.txt").write_text("")
    write_video("v.avi", 2)
    os.rename("v.avi", f"{name}.avi")
    assert run(checkpoint, "in", f"{name}.avi", "--output-dir", f"out{name}") == 1
    printed = "".join(capsys.readouterr())
    assert printed.count(r"a\x1b[2J\x9b") >= 5
    assert not set("\x1b\x9b") & set(printed)


def test_links_in_a_circle_are_no_inputs(here):
    Path("in").mkdir()
    write_image("in/a.png", picture(0))
    os.symlink("loop", "in/loop")
    os.symlink("..", "in/up")
    assert _find_sources(["in"], Path("out")) == [("in/a.png", "a")]
    with pytest.raises(ConfigError, match="in/loop: no such image"):
        _find_sources(["in/loop"], Path("out"))


def test_a_video_of_frames_that_fit_into_no_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.avi"
    write_video(path, 2)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 40 * 52 - 1)
    with pytest.raises(DataError, match=r"a\.avi: this video has frames of 52x40 pixels by its header"):
        VideoReader(str(path))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 40 * 52)
    with VideoReader(str(path)) as reader:
        assert np.shape(reader.read()) == (40, 52, 3)
