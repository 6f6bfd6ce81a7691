"""PASCAL VOC 2012 from small devkits."""

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.datasets.voc import VOC_CLASSES, VocDataset, voc_palette
from dfn_fast.errors import DataError

HOME = "VOCdevkit/VOC2012"


@pytest.fixture
def devkit(tmp_path, write, write_pair):
    """train: a, b; val: c. The labels are full of 1, 2 and 3, the augmented ones of 11, 12, 13 and 14."""
    for i, name in enumerate("abcd", 1):
        if name != "d":
            write_pair(f"{HOME}/JPEGImages/{name}.jpg", f"{HOME}/SegmentationClass/{name}.png", fill=i)
        write_pair(f"{HOME}/JPEGImages/{name}.jpg", f"{HOME}/SegmentationClassAug/{name}.png", fill=10 + i)
    for split, names in {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n"}.items():
        write(f"{HOME}/ImageSets/Segmentation/{split}.txt", names)
    return tmp_path / HOME


def fills(dataset):
    return {sample.name: int(sample.label[0, 0]) for sample in (dataset[i] for i in range(len(dataset)))}


def test_palette_is_the_devkits():
    # from VOClabelcolormap of the development kit
    expected = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128),
        20: (0, 64, 128), 64: (32, 0, 0), 255: (224, 224, 192),
    }  # fmt: skip
    palette = voc_palette(256)
    assert palette.dtype == np.uint8
    assert {i: tuple(palette[i]) for i in expected} == expected
    assert len(VOC_CLASSES) == 21
    assert (VOC_CLASSES[15], VOC_CLASSES[20]) == ("person", "tvmonitor")


@pytest.mark.parametrize("root", ["", "VOCdevkit", HOME])
def test_root_may_be_any_of_three_folders(devkit, tmp_path, root):
    assert fills(VocDataset(tmp_path / root, "val")) == {"c": 3}


@pytest.mark.parametrize(("split", "expected"), [("train", {"a": 1, "b": 2}), ("trainval", {"a": 1, "b": 2, "c": 3})])
def test_splits_come_from_the_lists(devkit, split, expected):
    assert fills(VocDataset(devkit, split)) == expected


def test_palette_label_keeps_indices_and_255(devkit):
    label = Image.fromarray(np.array([[0, 20, 255, 7, 7, 7]] * 4, np.uint8))
    label.putpalette(voc_palette(256).tobytes())
    label.save(devkit / "SegmentationClass" / "c.png")
    assert Image.open(devkit / "SegmentationClass" / "c.png").mode == "P"
    np.testing.assert_array_equal(VocDataset(devkit, "val")[0].label, [[0, 20, 255, 7, 7, 7]] * 4)


def test_train_aug_without_a_list_is_all_but_val(devkit):
    assert fills(VocDataset(devkit, "train_aug")) == {"a": 11, "b": 12, "d": 14}


@pytest.mark.parametrize("place", ["ImageSets/Segmentation/train_aug.txt", "train_aug.txt"])
@pytest.mark.parametrize("lines", ["d\n", "/JPEGImages/d.jpg /SegmentationClassAug/d.png\n"])
def test_train_aug_list(devkit, write, place, lines):
    write(f"{HOME}/{place}", lines)
    assert fills(VocDataset(devkit, "train_aug")) == {"d": 14}


def test_list_may_hold_absolute_paths(devkit, write, write_pair, tmp_path):
    write_pair("elsewhere/e.jpg", "elsewhere/e.png", fill=5)
    write(f"{HOME}/train_aug.txt", f"{tmp_path}/elsewhere/e.jpg {tmp_path}/elsewhere/e.png\n")
    assert fills(VocDataset(devkit, "train_aug", allow_outside_root=True)) == {"e": 5}
    with pytest.raises(DataError, match=r"train_aug\.txt:1: .*elsewhere/e\.jpg is outside of"):
        VocDataset(devkit, "train_aug")


def test_train_aug_without_its_folder_names_the_command(devkit):
    (devkit / "SegmentationClassAug").rename(devkit / "away")
    with pytest.raises(DataError, match=r"SegmentationClassAug.*convert-sbd SBD_ROOT"):
        VocDataset(devkit, "train_aug")


def test_missing_files_are_named(devkit):
    (devkit / "JPEGImages" / "a.jpg").unlink()
    (devkit / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: this image does not exist(.|\n)*b\.png: this label does not exist"):
        VocDataset(devkit, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb c d\n", r"val\.txt:2: expected an image id"),
        ("a\na\n", "a second image named 'a'"),
        ("\n# only a comment\n", "split 'val' .* has no images"),
    ],
)
def test_bad_lists(devkit, write, content, message):
    write(f"{HOME}/ImageSets/Segmentation/val.txt", content)
    with pytest.raises(DataError, match=message):
        VocDataset(devkit, "val")


@pytest.mark.parametrize(
    "lines",
    [
        "img 1\n", "img 1.jpg", "img 1.png", "\ufeffimg 1\r\n", "img 1 \r\n\r\n",
        "JPEGImages/img 1.jpg SegmentationClass/img 1.png", "JPEGImages\\img 1.jpg\tSegmentationClass\\img 1.png",
    ],
)  # fmt: skip
def test_spaces_suffixes_and_windows_lists(devkit, write, write_pair, lines):
    write_pair(f"{HOME}/JPEGImages/img 1.jpg", f"{HOME}/SegmentationClass/img 1.png", fill=5)
    write_pair(f"{HOME}/JPEGImages/img.jpg", f"{HOME}/SegmentationClass/img.png", fill=6)
    write(f"{HOME}/ImageSets/Segmentation/val.txt", lines)
    assert fills(VocDataset(devkit, "val")) == {"img 1": 5}


def test_of_two_readings_of_a_line_the_one_whose_files_exist_is_meant(devkit, write, write_pair):
    for name, fill in (("x", 5), ("x.jpg 1", 6)):
        write_pair(f"{HOME}/JPEGImages/{name}.jpg", f"{HOME}/SegmentationClass/{name}.png", fill=fill)
    line = "JPEGImages/x.jpg 1.jpg SegmentationClass/x.jpg 1.png"
    write(f"{HOME}/ImageSets/Segmentation/val.txt", line)
    assert fills(VocDataset(devkit, "val")) == {"x.jpg 1": 6}


def test_a_name_may_begin_as_a_comment_and_letters_be_composed(devkit, write, write_pair):
    for name, fill in (("#1", 5), ("u\u0308", 6)):
        write_pair(f"{HOME}/JPEGImages/{name}.jpg", f"{HOME}/SegmentationClass/{name}.png", fill=fill)
    write(f"{HOME}/ImageSets/Segmentation/val.txt", "# ids\n#a\n#../../../etc/x\n#1\n\u00fc\n")
    assert fills(VocDataset(devkit, "val")) == {"#1": 5, "u\u0308": 6}


def test_other_lists_of_vocs_are_named(devkit, write, write_pair):
    write(f"{HOME}/ImageSets/Segmentation/val.txt", "a  1\nb -1\nc  0\n")
    with pytest.raises(DataError, match=r"val\.txt:1: expected an image id, got 'a  1', as in .* of one class"):
        VocDataset(devkit, "val")
    for name in "xy":
        write_pair(f"{HOME}/JPEGImages/{name}.jpg", "elsewhere.png")
    write(f"{HOME}/ImageSets/Segmentation/val.txt", "x\ny\n")
    with pytest.raises(DataError, match=r"val\.txt: none of its images has a label in .*those of test"):
        VocDataset(devkit, "val")
    (devkit / "JPEGImages/x.jpg").unlink()
    with pytest.raises(DataError, match=r"x\.jpg: this image does not exist"):
        VocDataset(devkit, "val")


def test_missing_list(devkit):
    (devkit / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: this list cannot be read \(No such file"):
        VocDataset(devkit, "val")


def test_list_that_is_no_text(devkit, write):
    write(f"{HOME}/ImageSets/Segmentation/val.txt", b"\xff\xfe\x00a")
    with pytest.raises(DataError, match=r"val\.txt: expected a UTF-8 text file"):
        VocDataset(devkit, "val")


def test_wrong_root(tmp_path):
    with pytest.raises(DataError, match="expected JPEGImages"):
        VocDataset(tmp_path, "val")


def test_value_that_is_no_class(devkit, write):
    write(f"{HOME}/SegmentationClass/c.png", np.full((4, 6), 21, np.uint8))
    with pytest.raises(DataError, match=r"c\.png: label values \[21\] are not classes of 'voc'.*0\.\.20"):
        VocDataset(devkit, "val")[0]
