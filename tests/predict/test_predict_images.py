"""Predicted images as files: names, sizes, palettes, the formats of the servers, and bad input."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dfn_fast import cli
from dfn_fast.data.datasets.cityscapes import CityscapesDataset
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.errors import CheckpointError, ConfigError, DataError, UserError
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.images import read_image, read_label, write_image
from dfn_fast.media.overlays import overlay
from dfn_fast.predict import prediction
from dfn_fast.predict.__main__ import main
from support.predictions import contents, files, picture, run, segmenting
from support.saved_networks import PALETTE, small_network


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


def test_borders_are_rounded_to_the_nearest_grey():
    parts = np.array([[0, 0.4, 0.6, 1, 127.4, 127.6, 254.4, 254.6, 255]]) / 255
    arguments = argparse.Namespace(batch_size=1)
    predictor = SimpleNamespace(border=lambda image: parts, device=torch.device("cpu"))
    border = prediction.Prediction(predictor, PALETTE, arguments).border(picture(0))
    assert border.dtype == np.uint8
    assert border.tolist() == [[0, 0, 1, 1, 127, 128, 254, 255, 255]]


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


def test_a_folder_gives_every_picture_and_says_what_it_passes_over(checkpoint, capsys):
    image = Image.fromarray(picture(1))
    forms = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.jp2": "JPEG2000", "d.gif": "GIF", "e.photo": "PNG"}
    Path("disk").mkdir()
    for name, form in forms.items():
        image.save(Path("disk", name), form)
    Path("photos").mkdir()
    os.symlink("../disk", "photos/night")
    Path("photos/night/a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    Path("photos/night/notes.md").write_text("no picture")
    Path("photos/night/._a.jpg").write_bytes(b"\0\5\x16\7")
    assert run(checkpoint, "photos", "--output-dir", "photos/out", "--no-overlay") == 1
    assert files("photos/out") == ["legend.png", *(f"night/{name}.png" for name in "abcde")]
    errors = capsys.readouterr().err
    assert errors.startswith("passed over 1 file, being no image or a second one of the same stem: photos/night/notes")
    assert "1 of 6 images failed:\n  photos/night/a.HEIC: this image (112 bytes) is not in a supported" in errors
    assert "but in HEIC; convert it to PNG" in errors
    Path("photos/out/frames.json").write_text("a result, too")
    assert run(checkpoint, "photos", "--output-dir", "photos/out", "--no-overlay", "--skip-existing") == 1
    assert "frames.json" not in capsys.readouterr().err


def test_list_of_paths_relative_to_the_list_and_absolute(checkpoint, here):
    for name in ("lists/my photos/a b.png", "here.png", "lists/c.png", "d.png", "lists/#1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_image(name, picture(2))
    Path("lists/val.txt").write_text(
        f"# comment\n#1.png\nmy photos/a b.png\n\nhere.png labels/here.png\nc.png\tlabels/c.png\n{here}/d.png\n"
    )
    assert run(checkpoint, "lists/val.txt", "--output-dir", "out", "--no-overlay") == 0
    assert files("out") == ["#1.png", "c.png", "d.png", "here.png", "legend.png", "my photos/a b.png"]


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


def test_one_name_in_two_folders_of_an_input_is_no_conflict(checkpoint):
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


def test_an_unwritable_output_folder_is_an_error_before_work(checkpoint):
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
        (["--batch-size", "65537"], "--batch-size 65537: .* at most 65536"),
        (["--limit", "9" * 30], "--limit 9.*: .* at most 1000000000"),
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


HOSTILE_NAMES = ["my photo (1)", "straße, 東京 – 🚗", "a;b&c|d$e'f", "..b", "-rf", "x\u2028y"]


def test_results_stay_in_the_output_folder_whatever_the_names(checkpoint, here):
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


def test_names_that_meet_outside_their_folders_are_an_error(checkpoint, here):
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
