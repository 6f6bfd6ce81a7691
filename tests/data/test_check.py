"""``python -m dfn_fast.data``: what it finds, prints and returns."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dfn_fast import cli
from dfn_fast.data import check as check_module
from dfn_fast.data.__main__ import main
from dfn_fast.data.check import check
from dfn_fast.data.registry import DATASETS
from dfn_fast.errors import ConfigError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, write):
    """train: t0..t3, val: v0 and v1; all images differ; 0, 1 and 255 take a half, 3/8 and 1/8 of each label."""
    label = np.array([[0, 0, 0, 0, 1, 1, 1, 255]] * 6, np.uint8)
    for seed, name in enumerate(["train/t0", "train/t1", "train/t2", "train/t3", "val/v0", "val/v1"]):
        split, stem = name.split("/")
        write(f"{split}/images/{stem}.png", noise(6, 8, 3, seed=seed))
        write(f"{split}/masks/{stem}.png", label)
    write("classes.txt", "sky\nroad\n")
    return tmp_path


def run(*arguments, capsys):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().out


def test_good_data(folder, capsys):
    code, out = run("check", "folder", "--root", folder, capsys=capsys)
    assert code == 0
    table = [line.split() for line in out.splitlines()]
    assert ["train", "4", "8x6", "(4", "images)", "8x6", "8x6", "8x6", "12.50", "%"] in table
    assert ["0", "sky", "50.00", "%", "50.00", "%"] in table
    assert ["1", "road", "37.50", "%", "37.50", "%"] in table
    assert ["255", "ignored", "12.50", "%", "12.50", "%"] in table
    assert out.rstrip().endswith("Nothing is wrong.")
    assert "Warning" not in out
    assert "Note" not in out


def test_every_bad_file_is_named(folder, write, capsys):
    whole = (folder / "train/images/t0.png").read_bytes()
    write("train/images/t0.png", whole[: len(whole) // 2])
    write("train/masks/t0.png", noise(6, 8, 3))  # both files of t0
    write("train/masks/t1.png", np.zeros((8, 6), np.uint8))
    write("train/masks/t2.png", np.array([[0, 1, 1, 1, 1, 1, 7, 7]] * 6, np.uint8))
    write("val/masks/v0.png", noise(6, 8, 3))  # an image that is fine
    code, out = run("check", "folder", "--root", folder, "--json", folder / "r.json", capsys=capsys)
    assert code == 1
    report = json.loads((folder / "r.json").read_text())
    expected = [
        "train/images/t0.png: this image is damaged", "masks/t0.png: expected a label with one 8-bit channel",
        "masks/t1.png: expected a label of the image's size", "masks/t2.png: label values [7] are not classes",
        "val/masks/v0.png: expected a label with one 8-bit channel",
    ]  # fmt: skip
    assert len(report["problems"]) == len(expected)
    for problem, text in zip(report["problems"], expected, strict=True):
        assert text in problem
        assert problem in out
    assert "Problems (5):" in out
    assert out.rstrip().endswith("5 problems found")
    # t1's 48 pixels of 0, t2's 6, 30 and 12 of 0, 1 and 7, t3's 24, 18 and 6 of 0, 1 and 255: what can be read counts
    shares = {value: round(share * 144) for value, share in report["splits"]["train"]["pixel_share"].items()}
    assert shares == {"0": 78, "1": 48, "7": 12, "255": 6}
    assert ["7", "NO", "CLASS", "8.33", "%", "-"] in [line.split() for line in out.splitlines()]
    assert report["splits"]["train"]["sizes"] == {"8x6": 1}


def test_files_without_a_partner_are_all_told_up_to_twenty(folder, capsys):
    for i in range(25):
        (folder / f"train/images/x{i:02}.png").write_bytes(b"")
    code, out = run("check", "folder", "--root", folder, "--json", folder / "r.json", capsys=capsys)
    assert code == 1
    assert "Problems (25):" in out
    assert out.count("no label with this stem") == 20
    assert "and 5 more; --json FILE writes them all" in out
    assert len(json.loads((folder / "r.json").read_text())["problems"]) == 25


def test_sizes(folder, write, capsys):
    for name, (h, w) in {"t0": (2, 30), "t1": (40, 50), "t2": (3, 3)}.items():  # t3 has 8 x 6 = 48 pixels
        write(f"train/images/{name}.png", noise(h, w, 3))
        write(f"train/masks/{name}.png", np.zeros((h, w), np.uint8))
    write("train/images/t4.png", noise(3, 3, 3, seed=9))
    write("train/masks/t4.png", np.zeros((3, 3), np.uint8))
    _, out = run("check", "folder", "--root", folder, "--split", "train", capsys=capsys)
    row = ["train", "5", "3x3", "(2", "images)", "3x3", "8x6", "50x40"]
    assert row in [line.split()[: len(row)] for line in out.splitlines()]


def test_an_image_in_train_and_val_is_wrong(folder, write):
    write("val/images/v1.png", (folder / "train/images/t2.png").read_bytes())
    report = check("folder", folder)
    assert report.problems == ["train and val share 1 images with identical content: t2"]


def test_a_name_in_train_and_val_is_a_note(folder):
    for kind in ("images", "masks"):
        (folder / "val" / kind / "v0.png").rename(folder / "val" / kind / "t3.png")
    report = check("folder", folder)
    assert report.all_problems() == []
    assert report.notes == ["train and val share 1 names whose images differ: t3"]


def test_an_image_in_two_lists_is_wrong(folder, write):
    for name, stems in (("train", ["t0", "t1"]), ("eval", ["t1"]), ("train_more", ["t0"])):
        lines = [f"../train/images/{stem}.png\t../train/masks/{stem}.png\n" for stem in stems]
        write(f"validation/{name}.txt", "".join(lines))
    splits = [str(folder / "validation" / f"{name}.txt") for name in ("train", "eval", "train_more")]
    report = check("list", folder, splits)
    assert report.problems == [f"{splits[0]} and {splits[1]} share 1 images with identical content: train/images/t1"]
    assert len(report.notes) == 1


def test_training_splits_may_share_images(tmp_path, write, write_pair):
    for split, name in (("train", "a"), ("val", "b")):
        write_pair(f"{split}/{name}.png", f"{split}annot/{name}.png")
        write(f"{split}annot/{name}.png", np.array([[0, 1, 2, 3, 4, 5]] * 4, np.uint8))
    report = check("camvid", tmp_path, ["train", "val", "trainval"])
    assert report.all_problems() == []
    assert any("train and trainval share 1 images" in note for note in report.notes)
    assert any("val and trainval share 1 images" in note for note in report.notes)


def test_classes_that_never_occur_are_a_warning(folder, write, capsys):
    write("classes.txt", "sky\nroad\nsea\nice\n")
    code, out = run("check", "folder", "--root", folder, capsys=capsys)
    assert code == 0
    assert "Warnings (2):" in out
    assert "train: classes that are in no label: sea, ice (4 of 4 labels read)" in out
    assert out.rstrip().endswith("No problem found, but 2 warnings: read before you train.")


def test_labels_that_no_training_can_use_are_wrong_in_train_and_a_warning_in_val(folder, write, capsys):
    for stem in ("train/masks/t0", "train/masks/t1", "train/masks/t2", "train/masks/t3", "val/masks/v0"):
        write(f"{stem}.png", np.array([[0, 0, 0, 0, 255, 255, 255, 255]] * 6, np.uint8))
    write("val/masks/v1.png", np.full((6, 8), 255, np.uint8))
    code, out = run("check", "folder", "--root", folder, capsys=capsys)
    assert code == 1
    assert "Problems (1):" in out
    assert "every labelled pixel of split 'train' has class 'sky' (4 of 4 labels read)" in out
    assert "50 % of the pixels are 255, which is ignored: is it meant as 'road'? Then write 1 in its place" in out
    assert "Warnings (1):" in out
    write("train/masks/t0.png", np.array([[0, 1, 2, 3, 3, 3, 3, 3]] * 6, np.uint8))  # what a wrong file holds is open
    assert run("check", "folder", "--root", folder, capsys=capsys)[1].count("every labelled pixel") == 1


def test_how_a_data_set_was_read_is_noted_once(folder, capsys):
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        for split in ("train", "val"):
            (folder / split / kind).rename(folder / kind / split)
    code, out = run("check", "folder", "--root", folder, capsys=capsys)
    assert code == 0
    assert "Notes (1):" in out
    assert f"  The split is that of the folders in {folder}/images: 4 train, 2 val\n" in out


def test_names_are_printed_without_their_control_characters(folder, write, capsys):
    for name in ("x\x1b[2J", "y\x1b[2J"):
        write(f"train/images/{name}.png", noise(6, 8, 3))
        write(f"train/masks/{name}.png", np.zeros((6, 8), np.uint8))
    _, out = run("check", "folder", "--root", folder, capsys=capsys)
    assert "\x1b" not in out
    assert r"x\x1b[2J = y\x1b[2J" in out


def test_a_file_has_a_time_limit(folder, capsys, monkeypatch):
    read = check_module._observation

    def slow(dataset, index):
        if dataset.pairs[index].name == "t1":
            threading.Event().wait(5)
        return read(dataset, index)

    monkeypatch.setattr(check_module, "_observation", slow)
    code, out = run("check", "folder", "--root", folder, "--file-timeout", "0.2", capsys=capsys)
    assert code == 1
    assert "t1.png: this image and its label were not read within 0.2 s; are they damaged?" in out
    assert "1 problem found" in out


def test_notes(folder, write):
    write("train/images/t0.png", noise(6, 8))
    write("train/images/t1.png", noise(6, 8, 4))
    write("train/masks/t2.png", np.full((6, 8), 255, np.uint8))
    write("train/images/t3.png", (folder / "train/images/t2.png").read_bytes())
    report = check("folder", folder, ["train"])
    assert report.all_problems() == []
    assert report.all_notes() == [
        "train: 1 images are greyscale, read as three equal channels",
        "train: 1 images have an alpha channel, which is dropped",
        "train: 1 labels are 255 everywhere",
        "train: 1 images occur more than once: t2 = t3",
    ]


def test_other_count_than_the_published_is_a_note(tmp_path, write_pair):
    write_pair("val/a.png", "valannot/a.png")
    report = check("camvid", tmp_path, ["val"])
    assert "val: 1 images, but the published split has 101" in report.all_notes()


def test_joined_splits_are_checked_one_by_one(folder):
    assert [s.split for s in check("folder", folder, ["train+val", "train"]).splits] == ["train", "val"]


def test_empty_and_missing_folders_are_problems(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    code, out = run("check", "folder", "--root", tmp_path, "--num-classes", "2", capsys=capsys)
    assert code == 1
    assert "masks: the folder of the masks is missing" in out
    (tmp_path / "masks").mkdir()
    code, out = run("check", "folder", "--root", tmp_path, "--num-classes", "2", capsys=capsys)
    assert code == 1
    assert "split 'train' of data set 'folder' has no images" in out


def test_threads_give_the_same_report(folder):
    assert check("folder", folder, workers=1).as_json() == check("folder", folder, workers=4).as_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tain"], "has no split 'tain'; it has train, val; did you mean train"),
        (["--num-classes", "5"], "--num-classes 5"),
        (["--workers", "0"], "--workers 0: expected at least 1 and at most 256"),
        (["--workers", "257"], "--workers 257: expected at least 1 and at most 256"),
        (["--file-timeout", "-1"], r"--file-timeout -1\.0: expected 0\.\.86400 seconds"),
        (["--file-timeout", "nan"], "--file-timeout nan: expected"),
        (["--file-timeout", "86401"], "--file-timeout 86401"),
        (["--json", "/nowhere/r.json"], "--json /nowhere/r.json: its folder does not exist"),
    ],
)
def test_wrong_options(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(["check", "folder", "--root", str(folder), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "did you mean check"),
        (["check", "camvd"], "did you mean camvid"),
        (["check", "camvid", "--rot", "x"], "unknown option --rot; did you mean --root"),
        (["list", "--all"], "unknown option --all"),
    ],
)
def test_misspelt_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_root_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main(["check", "voc"]))
    assert exit_.value.code == 2
    assert "error: --root is missing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["list"], ["--help"]])
def test_layouts_are_shown(arguments, capsys):
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 0  # noqa: PT017
    out = capsys.readouterr().out
    for name, entry in DATASETS.items():
        assert f"\n{name}: {entry.description}" in f"\n{out}"
        assert all(line in out for line in entry.tree.splitlines())


def test_as_a_module(folder):
    """Report on stdout, progress on stderr."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "dfn_fast.data", "check", "folder", "--root", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr
    assert "2/2" in done.stderr
    assert "Nothing is wrong." in done.stdout
    assert "4/4" not in done.stdout


def test_camvid(camvid_root, capsys):
    code, out = run("check", "camvid", "--root", camvid_root, capsys=capsys)
    assert code == 0
    assert "367" in out
    assert "101" in out
    assert "Note" not in out
