"""Predictions as files: names, sizes, palettes, the formats of the servers, and what happens to bad input."""

import contextlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dfn_fast import cli
from dfn_fast.checkpoint.archive import save_atomic
from dfn_fast.data.datasets.cityscapes import CityscapesDataset
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.errors import CheckpointError, ConfigError, DataError, UserError
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.images import read_image, read_label, write_image
from dfn_fast.media.overlays import overlay
from dfn_fast.media.video import VideoReader
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.predict import prediction
from dfn_fast.predict.__main__ import main
from dfn_fast.predict.jobs import live_name

CLASSES = ["ground", "thing", "other"]
PALETTE = np.array([[9, 9, 9], [200, 0, 0], [0, 0, 200]], np.uint8)


def picture(seed, height=40, width=52):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def small_network(num_classes, border=True):
    torch.manual_seed(0)
    return ReferenceDFN(
        num_classes, backbone="resnet18", stem="conv7", channels=8, border_channels=4, border=border
    ).eval()


@pytest.fixture(scope="module")
def model():
    return small_network(3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A training checkpoint of ``model``."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    config = {"num_classes": 3, "backbone": "resnet18", "stem": "conv7", "channels": 8, "border_channels": 4}
    names = {"classes": CLASSES, "palette": PALETTE.tolist(), "dataset": "folder"}
    save_atomic({"format": 1, "model": model.state_dict(), "model_config": config, **names}, path)
    return path


@pytest.fixture
def checkpoint(saved, here):
    """That checkpoint as an argument, in an empty current folder."""
    return str(saved)


@pytest.fixture
def bare(here):
    """``bare(num_classes)`` writes bare weights, as an argument."""

    def write(num_classes, border=True):
        torch.save(small_network(num_classes, border).state_dict(), "bare.pth")
        return "bare.pth"

    return write


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def run(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def test_image_gives_labels_overlay_and_legend(checkpoint, model, capsys):
    image = picture(0, 37, 61)
    write_image("street.one.png", image)
    assert run(checkpoint, "street.one.png", "--output-dir", "out", "--scales", 1, 1.5, "--flip") == 0
    assert files("out") == ["legend.png", "street.one.png", "street.one_overlay.png"]
    labels = Predictor(model, amp="off", scales=(1, 1.5), flip=True)(image)
    np.testing.assert_array_equal(read_label("out/street.one.png"), labels)
    assert len(np.unique(labels)) > 1
    with Image.open("out/street.one.png") as written:
        assert written.mode == "P"
        np.testing.assert_array_equal(np.array(written.getpalette()).reshape(-1, 3)[:3], PALETTE)
    np.testing.assert_array_equal(read_image("out/street.one_overlay.png"), overlay(image, labels, PALETTE, 0.5))
    assert "1 image, " in capsys.readouterr().out


def test_options_of_the_pictures(checkpoint, model):
    image = picture(0)
    write_image("a.png", image)
    assert run(checkpoint, "a.png", "--output-dir", "one", "--no-overlay", "--border") == 0
    assert files("one") == ["a.png", "a_border.png", "legend.png"]
    border = read_label("one/a_border.png")
    np.testing.assert_array_equal(border, np.rint(255 * Predictor(model, amp="off").border(image)))
    assert run(checkpoint, "a.png", "--output-dir", "two", "--alpha", "0") == 0
    np.testing.assert_array_equal(read_image("two/a_overlay.png"), image)


def test_folders_are_read_in_depth_and_kept_in_the_names(checkpoint):
    for name in ("photos/a.png", "photos/night/a.png", "photos/night/b.jpg", "photos/.hidden/c.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_image(name, picture(1))
    Path("photos/notes.md").write_text("not an image")
    assert run(checkpoint, "photos", "--output-dir", "photos/out", "--no-overlay") == 0
    expected = ["a.png", "legend.png", "night/a.png", "night/b.png"]
    assert files("photos/out") == expected
    assert run(checkpoint, "photos", "--output-dir", "photos/out", "--no-overlay") == 0  # its results are no input
    assert files("photos/out") == expected


def test_list_of_paths_relative_to_the_list_and_absolute(checkpoint, here):
    for name in ("lists/my photos/a b.png", "here.png", "lists/c.png", "d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_image(name, picture(2))
    Path("lists/val.txt").write_text(
        f"# comment\nmy photos/a b.png\n\nhere.png labels/here.png\nc.png\tlabels/c.png\n{here}/d.png\n"
    )
    assert run(checkpoint, "lists/val.txt", "--output-dir", "out", "--no-overlay") == 0
    assert files("out") == ["c.png", "d.png", "here.png", "legend.png", "my photos/a b.png"]


def test_missing_entry_of_a_list_names_the_line(checkpoint):
    Path("val.txt").write_text("\nnowhere.png\n")
    with pytest.raises(ConfigError, match=r"val\.txt:2: nowhere\.png"):
        run(checkpoint, "val.txt", "--output-dir", "out")


@pytest.mark.parametrize(
    ("names", "inputs"),
    [
        (("one/a.png", "two/a.jpg"), ("one/a.png", "two/a.jpg")),
        (("one/a.png", "two/a.png"), ("one", "two")),
        (("a.png", "a_overlay.jpg"), ("a.png", "a_overlay.jpg")),
        (("legend.png",), ("legend.png",)),
    ],
)
def test_results_of_one_name_are_an_error_before_work(checkpoint, names, inputs):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        write_image(name, picture(0))
    with pytest.raises(ConfigError, match="both give"):
        run(checkpoint, *inputs, "--output-dir", "out")
    assert not Path("out").exists()


def test_same_file_name_in_two_folders_below_one_input_is_no_conflict(checkpoint):
    for name in ("in/one/a.png", "in/two/a.png"):
        Path(name).parent.mkdir(parents=True)
        write_image(name, picture(len(name)))
    assert run(checkpoint, "in", "--output-dir", "out", "--no-overlay") == 0
    assert files("out") == ["legend.png", "one/a.png", "two/a.png"]


def test_a_result_never_replaces_an_image(checkpoint):
    Path("in").mkdir()
    write_image("in/a.png", picture(0))
    before = Path("in/a.png").read_bytes()
    with pytest.raises(ConfigError, match="would replace an image"):
        run(checkpoint, "in/a.png", "--output-dir", "in")
    with pytest.raises(ConfigError, match="input folder"):
        run(checkpoint, "in", "--output-dir", "in")
    assert Path("in/a.png").read_bytes() == before
    assert files("in") == ["a.png"]


def test_broken_file_is_named_and_the_others_are_done(checkpoint, capsys):
    Path("in").mkdir()
    for i in range(3):
        write_image(f"in/{i}.png", picture(i))
    Path("in/1.png").write_bytes(Path("in/1.png").read_bytes()[:500])
    assert run(checkpoint, "in", "--output-dir", "out", "--no-overlay") == 1
    assert files("out") == ["0.png", "2.png", "legend.png"]
    errors = capsys.readouterr().err
    assert "skipped: in/1.png" in errors
    assert "1 of 3 images failed:\n  in/1.png" in errors


def test_image_that_does_not_fit_into_memory_is_named_too(checkpoint, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        write_image(name, picture(0))

    def full(self, image):
        raise UserError("does not fit")

    monkeypatch.setattr(Predictor, "__call__", full)
    assert run(checkpoint, "a.png", "b.png", "--output-dir", "out") == 1
    assert "2 of 2 images failed:\n  a.png: does not fit\n  b.png: does not fit" in capsys.readouterr().err


def test_full_disk_stops_with_a_message(checkpoint, monkeypatch):
    write_image("a.png", picture(0))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction, "write_label", full)
    with pytest.raises(UserError, match=r"--output-dir out: .*No space left"):
        run(checkpoint, "a.png", "--output-dir", "out")


def test_skip_existing_leaves_finished_images_alone(checkpoint, capsys):
    Path("in").mkdir()
    for i in range(3):
        write_image(f"in/{i}.png", picture(i))
    assert run(checkpoint, "in", "--output-dir", "out") == 0
    Path("out/1_overlay.png").unlink()
    for path in Path("out").glob("*.png"):
        os.utime(path, (0, 0))
    assert run(checkpoint, "in", "--output-dir", "out", "--skip-existing") == 0
    assert "2 of 3 images" in capsys.readouterr().out
    rewritten = sorted(path.name for path in Path("out").glob("[0-9]*.png") if path.stat().st_mtime > 0)
    assert rewritten == ["1.png", "1_overlay.png"]
    assert run(checkpoint, "in", "--output-dir", "out", "--skip-existing") == 0
    assert "3 of 3 images" in capsys.readouterr().out


def test_output_folder_that_cannot_be_written_is_an_error_before_work(checkpoint):
    write_image("a.png", picture(0))
    Path("file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"--output-dir {folder} cannot be written"):
            run("missing.pth", "a.png", "--output-dir", folder)  # not even the checkpoint is read


def test_voc_format(bare):
    Path("in/deep").mkdir(parents=True)
    write_image("in/deep/2008_000006.jpg", picture(0))
    assert run(bare(21), "in", "--output-dir", "out", "--format", "voc") == 0
    name = "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    assert files("out") == [name]
    labels = Predictor(small_network(21), amp="off")(read_image("in/deep/2008_000006.jpg"))
    np.testing.assert_array_equal(read_label(f"out/{name}"), labels)
    with Image.open(f"out/{name}") as written:
        palette = np.array(written.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(palette[:21], VocDataset.palette)


def test_cityscapes_format_writes_label_ids(bare):
    Path("in/berlin").mkdir(parents=True)
    image = picture(0)
    write_image("in/berlin/berlin_000000_000019_leftImg8bit.png", image)
    assert run(bare(19), "in", "--output-dir", "out", "--format", "cityscapes") == 0
    assert files("out") == ["berlin_000000_000019_pred.png"]
    written = Image.open("out/berlin_000000_000019_pred.png")
    assert written.mode == "L"
    label_ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    np.testing.assert_array_equal(np.array(written), label_ids[Predictor(small_network(19), amp="off")(image)])
    assert len(CityscapesDataset.classes) == 19


def test_cityscapes_format_wants_names_of_frames(bare):
    write_image("a.png", picture(0))
    with pytest.raises(ConfigError, match=r"a\.png: --format cityscapes expects names like"):
        run(bare(19), "a.png", "--output-dir", "out", "--format", "cityscapes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "voc"], r"network of 21 classes, .*best\.pth has 3"),
        (["--format", "voc", "--border"], "--border"),
        (["--alpha", "2"], "--alpha 2"),
        (["--window", "8"], "window"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--limit", "0"], "--limit 0: expected 1 or more"),
    ],
)
def test_wrong_options_are_user_errors(checkpoint, options, message):
    write_image("a.png", picture(0))
    with pytest.raises(ConfigError, match=message):
        run(checkpoint, "a.png", "--output-dir", "out", *options)


def test_border_of_a_network_without_one_is_an_error(bare):
    write_image("a.png", picture(0))
    with pytest.raises(ConfigError, match="Border Network"):
        run(bare(3, border=False), "a.png", "--output-dir", "out", "--border")


def test_inputs_that_are_not_there_are_errors(checkpoint):
    Path("empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(ConfigError, match=name):
            run(checkpoint, name, "--output-dir", "out")
    write_image("a.png", picture(0))
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        run("missing.pth", "a.png", "--output-dir", "out")


def test_misspelt_format_names_the_nearest(checkpoint, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main([checkpoint, "a.png", "--output-dir", "out", "--format", "cityscape"]))
    assert left.value.code == 2
    assert "did you mean cityscapes?" in capsys.readouterr().err


def test_image_with_two_files_of_one_stem_is_an_error(checkpoint):
    Path("in").mkdir()
    write_image("in/a.png", picture(0))
    write_image("in/a.jpg", picture(0))
    with pytest.raises(DataError, match="same stem"):
        run(checkpoint, "in", "--output-dir", "out")


def contents(folder):
    """The bytes of each file but for videos, of which the decoded frames are compared."""
    return {name: Path(folder, name).read_bytes() for name in files(folder) if not name.endswith(".mp4")}


def frames_of(path):
    frames = []
    with VideoReader(str(path)) as video:
        while (frame := video.read()) is not None:
            frames.append(frame)
    return frames


def write_video(path, count, height=40, width=52, code="MJPG"):
    """A bright disc that moves over a random picture. Returns the frames as they are decoded."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 12.5, (width, height))
    assert video.isOpened()
    ground = picture(0, height, width) // 2
    for i in range(count):
        video.write(cv2.circle(ground.copy(), (5 * i % width, height // 2), 9, (250, 90, 40), -1))
    video.release()
    return frames_of(path)


@contextlib.contextmanager
def segmenting(stop_after=None):
    """Within it segmenting is interrupted at the image after ``stop_after``. Yields the sizes of the batches run."""
    plain, batches = prediction.segment, []

    def segment(predictor, images):
        if stop_after is not None and sum(batches) + len(images) > stop_after:
            raise KeyboardInterrupt
        assert len({image.shape for image in images}) == 1
        batches.append(len(images))
        return plain(predictor, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "segment", segment)
        yield batches


def test_batches_of_mixed_sizes_give_what_single_images_give(checkpoint):
    Path("in").mkdir()
    for i in range(11):
        write_image(f"in/{i:02d}.png", picture(i, *[(40, 52), (64, 33), (52, 40)][i % 3]))
    assert run(checkpoint, "in", "--output-dir", "single", "--border") == 0
    with segmenting() as batches:
        assert run(checkpoint, "in", "--output-dir", "batched", "--border", "--batch-size", 4) == 0
    assert sorted(batches) == [3, 4, 4]
    assert contents("batched") == contents("single")
    assert len(files("batched")) == 34


def test_images_of_every_kind(checkpoint, model, capsys):
    """What an image may be is read, what it may not be is named; the rest is done."""
    Path("in").mkdir()
    good = {
        "long": Image.fromarray(picture(0, 1, 4000)),
        "high": Image.fromarray(picture(0, 300, 1)),
        "small": Image.fromarray(picture(1, 20, 20)),
        "pixel": Image.fromarray(picture(2, 1, 1)),
        "grey": Image.fromarray(picture(3)[:, :, 0]),
        "alpha": Image.fromarray(np.dstack([picture(4), picture(5)[:, :, 0]])),
        "palette": Image.fromarray(picture(6)).quantize(16),
    }
    for name, image in good.items():
        image.save(f"in/{name}.png")
    Image.fromarray(picture(7)).convert("CMYK").save("in/cmyk.jpg")
    Image.fromarray(picture(8)[:, :, 0].astype(np.uint16) * 250).save("in/deep.png")
    Path("in/empty.png").write_bytes(b"")
    Path("in/text.jpg").write_text("not an image")
    assert run(checkpoint, "in", "--output-dir", "out", "--no-overlay") == 1
    assert files("out") == sorted([*(f"{name}.png" for name in [*good, "cmyk"]), "legend.png"])
    for name in good:
        image = read_image(f"in/{name}.png")
        labels = read_label(f"out/{name}.png")
        assert labels.shape == image.shape[:2]
        np.testing.assert_array_equal(labels, Predictor(model, amp="off")(image))
    np.testing.assert_array_equal(read_label("out/cmyk.png"), Predictor(model, amp="off")(read_image("in/cmyk.jpg")))
    errors = capsys.readouterr().err
    assert "3 of 11 images failed:\n  in/deep.png: expected an image of 8 bits" in errors
    assert "in/empty.png: this image (0 bytes)" in errors
    assert "in/text.jpg: this image (12 bytes)" in errors


def test_an_interrupted_folder_is_continued_to_the_same_files(checkpoint):
    Path("in").mkdir()
    for i in range(6):
        write_image(f"in/{i}.png", picture(i))
    assert run(checkpoint, "in", "--output-dir", "whole") == 0
    with pytest.raises(KeyboardInterrupt), segmenting(stop_after=3):
        run(checkpoint, "in", "--output-dir", "out")
    done = ["0.png", "0_overlay.png", "1.png", "1_overlay.png", "2.png", "2_overlay.png", "legend.png"]
    assert files("out") == done
    with segmenting() as batches:
        assert run(checkpoint, "in", "--output-dir", "out", "--skip-existing") == 0
    assert sum(batches) == 3
    assert contents("out") == contents("whole")


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
        assert run(*arguments, "limited", "--limit", 4) == 0
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
    with pytest.raises(ConfigError, match="of videos, each is an INPUT"):
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

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dfn_fast.media.video.VideoWriter.finish", full)
    with pytest.raises(UserError, match=r"--output-dir out: .*No space left.*--skip-existing"):
        run(checkpoint, "trip.avi", "--output-dir", "out")
    assert files("out") == ["legend.png"]


HOSTILE_NAMES = ["my photo (1)", "straße, 東京 – 🚗", "a;b&c|d$e'f", "..b", "-rf", "x\u2028y"]


def test_results_stay_in_the_output_folder_whatever_the_names_are(checkpoint, here):
    for name in HOSTILE_NAMES:
        write_image(here / "in.png", picture(1, 32, 33))
        Path("photos", name).mkdir(parents=True)
        os.link("in.png", Path("photos", name, f"{name}.png"))
    write_image("above.png", picture(2, 32, 33))
    Path("work").mkdir()
    lines = ["../above.png", str(here / "photos" / "-rf" / "-rf.png"), "../photos/../photos/..b/..b.png", "./in.png"]
    os.rename("in.png", "work/in.png")
    Path("work/list.txt").write_text("\n".join(lines))
    before = files(here)
    assert run(checkpoint, "photos", "work/list.txt", "--no-overlay", "--output-dir", "work/out/deep") == 0
    new = sorted(set(files(here)) - set(before))
    kept = [f"{name}/{name}.png" for name in HOSTILE_NAMES if not name.startswith(".")]  # those are hidden
    flat = ["above.png", "-rf.png", "..b.png", "in.png", "legend.png"]
    assert new == sorted(f"work/out/deep/{name}" for name in (*kept, *flat))


def test_names_that_would_meet_outside_their_folders_are_an_error(checkpoint, here):
    for folder in "ab":
        Path(folder).mkdir()
        write_image(f"{folder}/x.png", picture(1))
    Path("list.txt").write_text("../" + here.name + "/a/x.png\n../" + here.name + "/b/x.png\n")
    with pytest.raises(ConfigError, match=r"b/x\.png and .*a/x\.png would both give out/x\.png"):
        run(checkpoint, "list.txt", "--output-dir", "out")
    assert not Path("out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_what_never_ends_is_named_and_left_out(checkpoint, capsys):
    Path("photos").mkdir()
    write_image("photos/a.png", picture(1, 32, 33))
    os.mkfifo("photos/b.png")
    os.symlink("/dev/zero", "photos/c.png")
    assert run(checkpoint, "photos", "--no-overlay", "--output-dir", "out") == 1
    assert files("out") == ["a.png", "legend.png"]
    errors = capsys.readouterr().err
    assert "photos/b.png: expected a regular file, got a pipe" in errors
    assert "photos/c.png: expected a regular file, got a device" in errors
    with pytest.raises(ConfigError, match=r"b\.png: no such image"):
        run(checkpoint, "photos/b.png", "--output-dir", "out")
