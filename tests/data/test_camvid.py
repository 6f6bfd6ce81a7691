"""CamVid: the shared folder's lists, SegNet's own lists, no lists, and the real images if present."""

import numpy as np
import pytest

from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.errors import DataError


@pytest.fixture
def camvid(tmp_path, write_pair):
    """train: a, b (filled with 1 and 2); val: c (3). The images are JPEG."""
    for name, split, fill in (("a", "train", 1), ("b", "train", 2), ("c", "val", 3)):
        write_pair(f"CamVid/{split}/{name}.jpg", f"CamVid/{split}annot/{name}.png", fill=fill)
    return tmp_path / "CamVid"


def fills(dataset):
    return {sample.name: int(sample.label[0, 0]) for sample in (dataset[i] for i in range(len(dataset)))}


@pytest.mark.parametrize(
    "line",
    [
        "train/b.jpg trainannot/b.png",
        "/SegNet/CamVid/train/b.png /SegNet/CamVid/trainannot/b.png",
        "../../elsewhere/train/b.bmp ../../elsewhere/trainannot/b.bmp",
    ],
)
def test_list_chooses_and_files_are_found_by_folder_and_stem(camvid, write, line):
    write("CamVid/train.txt", f"{line}\n\n")
    assert fills(CamVidDataset(camvid, "train")) == {"b": 2}


@pytest.mark.parametrize(
    "line",
    [
        "train/b 1.jpg trainannot/b 1.png", "train/b 1.jpg\ttrainannot/b 1.png", "train\\b 1.jpg trainannot\\b 1.png\r",
        "\ufeff/SegNet/CamVid/train/b 1.png /SegNet/CamVid/trainannot/b 1.png",
        "D:\\x\\train\\b 1.png D:\\trainannot\\b 1",
    ],
)  # fmt: skip
def test_spaces_and_windows_lists(camvid, write, write_pair, line):
    write_pair("CamVid/train/b 1.jpg", "CamVid/trainannot/b 1.png", fill=5)
    write("CamVid/train.txt", f"{line}\n")
    assert fills(CamVidDataset(camvid, "train")) == {"b 1": 5}


def test_a_name_may_begin_as_a_comment_and_letters_be_composed(camvid, write, write_pair):
    for name, fill in (("#1", 5), ("u\u0308", 6)):
        write_pair(f"CamVid/#x/{name}.jpg", f"CamVid/lab/{name}.png", fill=fill)
    write("CamVid/train.txt", "# images\n#train/a.jpg lab/a.png\n#x/#1.jpg lab/#1.png\n#x/\u00fc.jpg lab/\u00fc.png\n")
    assert fills(CamVidDataset(camvid, "train")) == {"#1": 5, "u\u0308": 6}


def test_files_passed_over_are_noted(camvid, write):
    other = write("CamVid/train/readme.md", "x")
    assert [str(other) in note for note in CamVidDataset(camvid, "trainval").notes] == [True]


def test_without_a_list_the_folders_are_the_split(camvid):
    assert fills(CamVidDataset(camvid, "train")) == {"a": 1, "b": 2}
    assert fills(CamVidDataset(camvid.parent, "val")) == {"c": 3}


def test_trainval_is_both(camvid, write):
    write("CamVid/train.txt", "train/b.jpg trainannot/b.png\n")
    assert fills(CamVidDataset(camvid, "trainval")) == {"b": 2, "c": 3}


def test_void_is_ignored_and_12_is_no_class(camvid, write):
    write("CamVid/valannot/c.png", np.array([[0, 10, 11, 255, 5, 5]] * 4, np.uint8))
    label = CamVidDataset(camvid, "val")[0].label
    np.testing.assert_array_equal(label, [[0, 10, 255, 255, 5, 5]] * 4)
    assert label.dtype == np.uint8
    write("CamVid/valannot/c.png", np.full((4, 6), 12, np.uint8))
    with pytest.raises(DataError, match=r"c\.png: label values \[12\] are not classes of 'camvid'"):
        CamVidDataset(camvid, "val")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train/a.jpg\n", r"train\.txt:1: expected an image and a label path"),
        ("/x/train/z.png /x/trainannot/a.png\n", r"train.z\.png: this image does not exist"),
        ("train/a.jpg nowhere/a.png\n", r"nowhere.a\.png: this label does not exist"),
    ],
)
def test_bad_lists(camvid, write, content, message):
    write("CamVid/train.txt", content)
    with pytest.raises(DataError, match=message):
        CamVidDataset(camvid, "train")


def test_missing_split_and_partners(camvid, write):
    with pytest.raises(DataError, match=r"CamVid.test: .*is missing\. Expected test\.txt, or the folders"):
        CamVidDataset(camvid, "test")
    (camvid / "trainannot" / "a.png").unlink()
    (camvid / "train" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: no label(.|\n)*b\.png: no image"):
        CamVidDataset(camvid, "train")


def test_real_images(camvid_root):
    train, val = CamVidDataset(camvid_root, "train"), CamVidDataset(camvid_root, "val")
    assert (len(train), len(val)) == (367, 101)
    assert not set(train.names()) & set(val.names())
    image, label, name = train[0]
    assert (image.shape, label.shape, name) == ((360, 480, 3), (360, 480), "0001TP_006690")
    assert set(np.unique(label)) <= {*range(11), 255}
    road, sky = CamVidDataset.classes.index("road"), CamVidDataset.classes.index("sky")
    assert image[label == sky].mean() > image[label == road].mean()  # the ids mean what the names say
