"""Reading and writing videos: frames, rates, sizes, and files that are not videos or are truncated."""

import math
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from dfn_fast.errors import DataError, UserError
from dfn_fast.media.mp4 import set_times, shown_frames
from dfn_fast.media.video import VideoReader, VideoWriter, is_live, is_video

RED, BLUE = (220, 30, 30), (30, 30, 220)


def write_video(path, frames, rate=12.5, code="MJPG"):
    """RGB frames as a video, by OpenCV alone."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, frames[0].shape[1::-1])
    assert video.isOpened()
    for frame in frames:
        video.write(frame[:, :, ::-1])
    video.release()


def plain_frames(count, height=40, width=52):
    """Frames that get lighter, so that a wrong order shows."""
    return [np.full((height, width, 3), 10 + 200 * i // count, np.uint8) for i in range(count)]


def noise(count, height=40, width=52):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8))


def frames_of(video):
    frames = []
    while (frame := video.read()) is not None:
        frames.append(frame)
    return frames


def read_all(path):
    with VideoReader(str(path)) as video:
        return frames_of(video), video.missing()


def test_frames_come_in_order_and_in_rgb(tmp_path):
    frames = [np.full((40, 52, 3), colour, np.uint8) for colour in (RED, BLUE, RED, RED, BLUE)]
    path = tmp_path / "a.avi"
    write_video(path, frames)
    with VideoReader(str(path)) as video:
        assert (video.size, video.frame_rate, video.announced, video.live) == ((40, 52), 12.5, 5, False)
        read = frames_of(video)
        assert video.read() is None
        assert video.missing() == 0
    assert np.abs(np.stack(read).astype(int) - np.stack(frames)).max() <= 4


@pytest.mark.parametrize(
    ("suffix", "code"), [(".mp4", "mp4v"), (".m4v", "mp4v"), (".mov", "mp4v"), (".avi", "MJPG"), (".mkv", "mp4v")]
)
def test_containers(tmp_path, suffix, code):
    path = tmp_path / f"a{suffix}"
    write_video(path, plain_frames(9), code=code)
    frames, missing = read_all(path)
    assert (len(frames), missing) == (9, 0)
    assert np.all(np.diff([frame.mean() for frame in frames]) > 5)


@pytest.mark.parametrize(("height", "width"), [(40, 52), (41, 53), (2, 400)])  # even, odd, the least height
@pytest.mark.parametrize("rate", [30000 / 1001, 12.5])
def test_what_is_written_is_read_again(tmp_path, height, width, rate):
    frames = plain_frames(6, height, width)
    path = tmp_path / "a.mp4"
    with VideoWriter(tmp_path, rate, (height, width)) as writer:
        for frame in frames:
            writer.write(frame)
        assert not path.exists()
        writer.finish(path)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with VideoReader(str(path)) as video:
        assert video.size == (height // 2 * 2, width // 2 * 2)
        assert video.frame_rate == pytest.approx(rate, abs=0.01)
        read = frames_of(video)
    assert len(read) == 6
    for frame, expected in zip(read, frames, strict=True):
        assert abs(frame.mean() - expected.mean()) < 6


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_colours_survive_the_writer(tmp_path):
    with VideoWriter(tmp_path, 10, (40, 52)) as writer:
        writer.write(np.full((40, 52, 3), RED, np.uint8))
        writer.finish(tmp_path / "a.mp4")
    frame = read_all(tmp_path / "a.mp4")[0][0]
    assert np.abs(frame.reshape(-1, 3).mean(0) - RED).max() < 8


def test_an_interrupted_video_leaves_nothing_and_the_old_one_alone(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path, 10, (40, 52)) as writer:
        writer.write(plain_frames(1)[0])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_a_video_that_is_not_whole_gets_no_name(tmp_path):
    with pytest.raises(OSError, match=r"a\.mp4: 0 of 4 frames"), VideoWriter(tmp_path, 10, (40, 52)) as writer:
        for frame in noise(4):
            writer.write(frame)
        writer._video.release()
        (written,) = tmp_path.iterdir()
        os.truncate(written, written.stat().st_size // 2)  # as a full disk leaves it
        writer.finish(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dfn_fast.media.video.ENCODER", "none")
    with pytest.raises(UserError, match=r"cannot encode a video of 52x40 \(none in \.mp4\).*--frames"):
        VideoWriter(tmp_path, 10, (40, 52))
    assert os.listdir(tmp_path) == []


def test_no_video_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"missing\.mp4: this video does not exist"):
        VideoReader(str(tmp_path / "missing.mp4"))
    for name, content in (("empty.mp4", b""), ("text.avi", b"no video\n" * 9), ("noise.mkv", bytes(range(256)) * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: no frame can be decoded \({len(content)} bytes\)"):
            VideoReader(str(tmp_path / name))


def test_a_container_without_frames_is_an_error(tmp_path):
    video = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (52, 40))
    video.release()
    with pytest.raises(DataError, match=r"a\.avi: no frame"):
        VideoReader(str(tmp_path / "a.avi"))


def test_frames_that_change_their_size_are_an_error(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi", plain_frames(3))
    with VideoReader(str(tmp_path / "a.avi")) as video:
        video.read()
        monkeypatch.setattr(video, "size", (41, 52))
        with pytest.raises(DataError, match=r"a\.avi: its frames change from 52x41 to 52x40 at number 1"):
            video.read()


def test_what_opencv_raises_is_named(tmp_path, monkeypatch):
    class Capture:
        def __getattr__(self, name):
            return lambda *_: 0

        def read(self):
            raise cv2.error("no such thing")

    (tmp_path / "a.avi").write_bytes(b"")
    monkeypatch.setattr("dfn_fast.media.video.open_capture", lambda source: Capture())
    with pytest.raises(DataError, match=r"a\.avi: OpenCV cannot decode this video \(no such thing\)"):
        VideoReader(str(tmp_path / "a.avi"))


def test_no_camera_is_an_error():
    with pytest.raises(DataError, match="camera:97: it sent no frame"):
        VideoReader("camera:97")


@pytest.mark.parametrize(("suffix", "code"), [(".avi", "MJPG"), (".mkv", "mp4v")])
def test_frames_of_a_truncated_video_come_and_the_others_are_counted(tmp_path, suffix, code):
    path = tmp_path / f"a{suffix}"
    write_video(path, noise(40), rate=10, code=code)
    os.truncate(path, path.stat().st_size // 2)
    frames, missing = read_all(path)
    assert 5 < len(frames) < 30
    assert missing == 40 - len(frames)


def test_a_sound_that_ends_later_is_no_missing_frame(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path, plain_frames(40), rate=10, code="mp4v")
    with VideoReader(str(path)) as video:
        assert len(frames_of(video)) == 40
        video.announced = 49  # what the header's duration comes to with 0.9 s more of sound
        assert video.missing() == 0
        video.announced = 52
        assert video.missing() == 12


def test_a_rate_that_is_none_divides_nothing(tmp_path):
    write_video(tmp_path / "a.mkv", plain_frames(5), rate=10, code="mp4v")
    with VideoReader(str(tmp_path / "a.mkv")) as video:
        frames_of(video)
        video.announced = 99
        for video._rate in (0.0, math.nan, -1.0, math.inf):
            assert video.missing() == 94


def edited(path, *edits):
    """Gives a video of OpenCV's another edit list: durations and begins, in ticks."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst")
    table = b"".join(struct.pack(">IiI", length, begin, 1 << 16) for length, begin in edits)
    grown = len(table) - 12
    content[at + 8 : at + 24] = struct.pack(">I", len(edits)) + table
    for name in (b"moov", b"trak", b"edts", b"elst"):
        place = content.index(name) - 4
        content[place : place + 4] = struct.pack(">I", struct.unpack_from(">I", content, place)[0] + grown)
    path.write_bytes(content)


@pytest.mark.parametrize("rate", [25, 30000 / 1001])
@pytest.mark.parametrize(
    ("edits", "expected"),
    [([(20, 0)], 20), ([(20, 10)], 20), ([(5, 10), (5, 20)], 10), ([(40, 0)], 40), ([(8, -1), (40, 0)], 40)],
)
def test_frames_that_an_edit_list_leaves_out_are_not_missing(tmp_path, rate, edits, expected):
    path = tmp_path / "a.mp4"
    write_video(path, plain_frames(40), rate=rate, code="mp4v")
    content = path.read_bytes()
    at = content.index(b"mdhd")
    ticks = struct.unpack_from(">I", content, at + 16)[0] / rate
    edited(path, *((round(1000 * length / rate), round(ticks * max(begin, 0)) or begin) for length, begin in edits))
    frames, missing = read_all(path)
    assert expected - 1 <= len(frames) <= expected + 2  # FFmpeg also shows some around a cut
    assert missing <= 1
    assert shown_frames(path) in (expected, expected - 1)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"mdat", b"free"))  # the same index, over nothing
    assert shown_frames(path) in (expected, expected - 1)


@pytest.mark.parametrize("name", [b"moov", b"trak", b"hdlr", b"mvhd", b"stts", b"elst", b"mdhd"])
def test_an_index_that_is_damaged_says_nothing(tmp_path, name):
    path = tmp_path / "a.mp4"
    write_video(path, plain_frames(4), code="mp4v")
    content = path.read_bytes()
    at = content.index(name)
    for size in (0, 1, 7, 9, 0xFFFFFFFF):
        path.write_bytes(content[: at - 4] + struct.pack(">I", size) + content[at:])
        assert shown_frames(path) in (None, 3, 4)
        before = path.read_bytes()
        if not set_times(path, [0, 1, 2, 3]):
            assert path.read_bytes() == before
    path.write_bytes(content.replace(b"\0\0\0\1\0\0\0\4\0\0", b"\0\0\0\1\xff\xff\xff\xff\0\0"))  # stts
    assert shown_frames(path) is None


def test_frames_keep_the_times_that_they_are_given(tmp_path):
    times = [0, 0.04, 0.08, 0.24, 0.4, 1.5, 1.533]
    with VideoWriter(tmp_path, 10, (40, 52)) as writer:
        for frame in plain_frames(7):
            writer.write(frame)
        writer.finish(tmp_path / "a.mp4", times)
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    found = []
    while capture.read()[0]:
        found.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    np.testing.assert_allclose(found, times, atol=0.001)
    with VideoReader(str(tmp_path / "a.mp4")) as video:
        frames_of(video)
        assert video.missing() == 0
        np.testing.assert_allclose(video.times(7), times, atol=0.001)
        assert video.times(2) == pytest.approx([0, 0.04], abs=0.001)  # not 7 / 1.6 s
        video._times[3] = video._times[2]
        assert video.times(7) is None  # not known


def test_a_video_whose_frames_cannot_be_given_their_times_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr("dfn_fast.media.video.set_times", lambda path, times: False)
    with VideoWriter(tmp_path, 9, (4, 4)) as writer:
        writer.write(np.zeros((4, 4, 3), np.uint8))
        with pytest.raises(UserError, match=r"a\.mp4: its frames cannot be given"):
            writer.finish(tmp_path / "a.mp4", [0])
    assert os.listdir(tmp_path) == []


def test_what_counts_as_a_video():
    live = ("camera:0", "camera:12", "rtsp://host/front", "http://host:8080/video.mjpg", "https://host/a.mp4")
    for source in live:
        assert is_live(source)
        assert is_video(source)
    for source in ("a.mp4", "my videos/A.MOV", "x.webm", "camera:0.mkv"):
        assert is_video(source)
        assert not is_live(source)
    for source in ("a.png", "camera:", "camera:99999999999999", "camera:٣", "mp4", str(Path("http")), "list.txt"):
        assert not is_video(source)
