"""Predicted videos, cameras and streams: overlays, label maps, and resuming an interrupted recording."""

import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from dfn_fast.errors import ConfigError, UserError
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.images import read_label, write_image
from dfn_fast.media.mp4 import set_times
from dfn_fast.media.overlays import overlay
from dfn_fast.media.video import VideoReader
from dfn_fast.predict.jobs import live_name
from support.predictions import contents, files, picture, run, segmenting
from support.saved_networks import PALETTE
from support.videos import frames_of, write_video


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_video_gives_an_overlay_video_and_label_maps(checkpoint, model, capsys, batch_size):
    frames = write_video("trip.avi", 7)
    arguments = (checkpoint, "trip.avi", "--output-dir", "out", "--frames", "--border", "--batch-size", batch_size)
    assert run(*arguments) == 0
    names = [f"trip_frames/{i:06d}{end}.png" for i in range(7) for end in ("", "_border")]
    assert files("out") == sorted(["legend.png", "trip_frames/frames.json", *names, "trip_overlay.mp4"])
    assert json.loads(Path("out/trip_frames/frames.json").read_text()) == {"frames": 7, "frame_rate": 12.5}
    shown = frames_of("out/trip_overlay.mp4")
    assert len(shown) == 7
    for i, frame in enumerate(frames):
        labels = read_label(f"out/trip_frames/{i:06d}.png")
        np.testing.assert_array_equal(labels, Predictor(model, amp="off")(frame))
        border = read_label(f"out/trip_frames/{i:06d}_border.png")
        # Another memory format sums in another order: half a grey level may be rounded the other way.
        np.testing.assert_allclose(border, 255 * Predictor(model, amp="off").border(frame), rtol=0, atol=0.51)
        expected = overlay(frame, labels, PALETTE, 0.5).astype(int)
        errors = [np.abs(expected - other).mean() for other in shown]
        assert errors[i] == min(errors)  # the coding loses detail, but no frame is another's
    with VideoReader("out/trip_overlay.mp4") as video:
        assert (video.frame_rate, video.size) == (12.5, (40, 52))
    assert "1 video, 7 frames, " in capsys.readouterr().out


def test_a_variable_frame_rate_is_kept(checkpoint):
    write_video("trip.mp4", 6, code="mp4v")
    times = [0, 0.08, 0.16, 0.5, 0.84, 1.18]
    assert set_times(Path("trip.mp4"), times)
    assert run(checkpoint, "trip.mp4", "--output-dir", "out", "--frames", "--limit", 5) == 0
    summary = json.loads(Path("out/trip_frames/frames.json").read_text())
    assert summary["times"] == pytest.approx(times[:5], abs=0.001)
    with VideoReader("out/trip_overlay.mp4") as video:
        while video.read() is not None:
            pass
        assert video.times(5) == pytest.approx(times[:5], abs=0.001)


def test_options_of_videos(checkpoint):
    write_video("trip.avi", 5)
    assert run(checkpoint, "trip.avi", "--output-dir", "one", "--limit", 3) == 0
    assert files("one") == ["legend.png", "trip_overlay.mp4"]
    assert len(frames_of("one/trip_overlay.mp4")) == 3
    assert run(checkpoint, "trip.avi", "--output-dir", "two", "--no-overlay", "--frames", "--limit", 99) == 0
    assert files("two") == ["legend.png", *(f"trip_frames/{i:06d}.png" for i in range(5)), "trip_frames/frames.json"]
    with pytest.raises(ConfigError, match=r"trip\.avi: --no-overlay leaves nothing"):
        run(checkpoint, "trip.avi", "--output-dir", "three", "--no-overlay")
    with pytest.raises(ConfigError, match=r"trip\.avi: the server takes no videos"):
        run(checkpoint, "trip.avi", "--output-dir", "three", "--format", "voc")
    assert not Path("three").exists()


def test_broken_videos_are_named_and_the_rest_is_done(checkpoint, capsys):
    write_image("a.png", picture(0))
    Path("empty.mp4").write_bytes(b"")
    write_video("cut.avi", 30)
    os.truncate("cut.avi", Path("cut.avi").stat().st_size // 2)
    count = len(frames_of("cut.avi"))
    assert 5 < count < 25
    write_video("good.avi", 3)
    inputs = ("empty.mp4", "cut.avi", "a.png", "good.avi")
    assert run(checkpoint, *inputs, "--output-dir", "out", "--frames") == 1
    names = [f"cut_frames/{i:06d}.png" for i in range(count)] + [f"good_frames/{i:06d}.png" for i in range(3)]
    others = ["a.png", "a_overlay.png", "cut_overlay_truncated.mp4", "good_overlay.mp4", "good_frames/frames.json"]
    assert files("out") == sorted([*others, *names, "legend.png"])
    assert len(frames_of("out/cut_overlay_truncated.mp4")) == count
    errors = capsys.readouterr().err
    assert "2 of 4 images and videos failed:\n  empty.mp4: no frame can be decoded (0 bytes)" in errors
    assert f"cut.avi: this video is damaged or truncated: {30 - count} of its 30 frames" in errors
    assert (
        run(checkpoint, *inputs, "--output-dir", "out", "--frames", "--skip-existing") == 1
    )  # no success the 2nd time
    assert "2 of 2 videos failed" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_interrupted_video_is_continued_to_the_same_files(checkpoint, batch_size):
    write_video("trip.avi", 9)
    arguments = (checkpoint, "trip.avi", "--frames", "--border", "--batch-size", batch_size, "--output-dir")
    assert run(*arguments, "whole") == 0
    with pytest.raises(KeyboardInterrupt), segmenting(stop_after=5) as batches:
        run(*arguments, "out")
    finished = sum(batches)
    assert finished == {1: 5, 3: 3}[batch_size]
    names = [f"trip_frames/{i:06d}{end}.png" for i in range(finished) for end in ("", "_border")]
    assert files("out") == sorted(["legend.png", *names])  # no half video, and what had run is there
    Path("out/trip_frames/000001.png").write_bytes(b"")  # as after a power cut
    with segmenting() as batches:
        assert run(*arguments, "out", "--skip-existing") == 0
    assert sum(batches) == 9 - finished + 1
    assert contents("out") == contents("whole")
    np.testing.assert_array_equal(frames_of("out/trip_overlay.mp4"), frames_of("whole/trip_overlay.mp4"))
    with segmenting() as batches:
        assert run("missing.pth", *arguments[1:], "out", "--skip-existing") == 0  # nothing left to do
    assert batches == []


@pytest.mark.parametrize(("height", "width"), [(52, 40), (40, 60), (44, 52)])
def test_frames_of_an_earlier_run_at_another_size_are_made_again(checkpoint, height, width):
    arguments = (checkpoint, "trip.avi", "--frames", "--border", "--no-overlay", "--output-dir", "out")
    write_video("trip.avi", 3, height, width)
    assert run(*arguments) == 0
    Path("out/trip_frames/frames.json").unlink()  # as if it had been interrupted
    write_video("trip.avi", 3)
    Path("out/trip_frames/000002.png").unlink()
    with segmenting() as batches:
        assert run(*arguments, "--skip-existing") == 0
    assert sum(batches) == 3
    assert {read_label(path).shape for path in Path("out/trip_frames").glob("*.png")} == {(40, 52)}


def test_what_a_video_loses_and_what_an_earlier_run_left_is_told(checkpoint, capsys):
    class Odd:  # OpenCV writes no such video
        def __init__(self, source):
            self.capture = cv2.VideoCapture(source)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            ok, frame = self.capture.read()
            return ok, frame[:39, :51] if ok else None

    arguments = (checkpoint, "trip.avi", "--frames", "--output-dir", "out")
    write_video("trip.avi", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfn_fast.media.video.open_capture", Odd)
        assert run(*arguments) == 0
    assert "trip.avi: its overlay is 50x38 of 51x39 pixels, as its format has even sides" in capsys.readouterr().err
    write_video("trip.avi", 2)
    assert run(*arguments) == 0
    errors = capsys.readouterr().err
    assert "trip.avi: out/trip_frames has 2 more frames, of an earlier run; this one has 2" in errors
    assert "its overlay is" not in errors


def test_frames_are_made_where_only_the_overlay_exists(checkpoint):
    write_video("trip.avi", 3)
    assert run(checkpoint, "trip.avi", "--output-dir", "out") == 0
    assert run(checkpoint, "trip.avi", "--output-dir", "out", "--frames", "--skip-existing") == 0
    assert "trip_frames/000002.png" in files("out")
    assert "trip_frames/frames.json" in files("out")


class Camera:
    """In place of cv2.VideoCapture: frames without an end, of an unknown rate."""

    def __init__(self):
        self.frames = 0

    def read(self):
        time.sleep(0.02)
        self.frames += 1
        return True, picture(self.frames)

    def get(self, prop):
        return 0.0

    def release(self):
        pass


def test_a_camera_is_recorded_until_ctrl_c_or_the_limit(checkpoint, capsys):
    arguments = (checkpoint, "camera:0", "--frames", "--output-dir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfn_fast.media.video.open_capture", lambda source: Camera())
        assert run(*arguments, "limited", "--limit", 4, "--file-timeout", "0.01") == 0  # a camera may take any time
        with segmenting(stop_after=4):
            assert run(*arguments, "stopped") == 0
        assert "1 video, 4 frames" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt), segmenting(stop_after=0):
            run(*arguments, "nothing")
    expected = ["legend.png", *(f"camera_0_frames/{i:06d}.png" for i in range(4))]
    expected += ["camera_0_frames/frames.json", "camera_0_overlay.mp4"]
    assert files("limited") == files("stopped") == sorted(expected)
    assert contents("stopped") == contents("limited")
    assert len(frames_of("stopped/camera_0_overlay.mp4")) == 4
    assert files("nothing") == ["legend.png"]
    with pytest.raises(ConfigError, match="holds a recording"):
        run(*arguments, "stopped")


def test_a_stream_is_named_after_its_last_part():
    names = {"rtsp://me@host:554/live/front?x=1": "front", "http://host:80/": "host_80", "https://host/a.mp4": "a"}
    for source, name in names.items():
        assert live_name(source) == name


def test_videos_of_a_folder_are_inputs_of_their_own(checkpoint):
    Path("in").mkdir()
    write_video("in/trip.avi", 2)
    with pytest.raises(ConfigError, match="give each video as an INPUT"):
        run(checkpoint, "in", "--output-dir", "out")
    write_image("in/trip.png", picture(0))
    assert run(checkpoint, "in", "in/trip.avi", "--output-dir", "out") == 0
    assert files("out") == ["legend.png", "trip.png", "trip_overlay.mp4", "trip_overlay.png"]


def test_a_result_never_replaces_a_video(checkpoint):
    for name in ("a.avi", "a_overlay.mp4"):
        write_video(name, 2, code="mp4v" if name.endswith("mp4") else "MJPG")
    with pytest.raises(ConfigError, match="would replace a video"):
        run(checkpoint, "a.avi", "a_overlay.mp4", "--output-dir", ".")


def test_a_disk_that_is_full_at_the_end_of_a_video_is_named(checkpoint, monkeypatch):
    write_video("trip.avi", 2)

    def full(self, path, times):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dfn_fast.media.video.VideoWriter.finish", full)
    with pytest.raises(UserError, match=r"--output-dir out: .*No space left.*--skip-existing"):
        run(checkpoint, "trip.avi", "--output-dir", "out")
    assert files("out") == ["legend.png"]
