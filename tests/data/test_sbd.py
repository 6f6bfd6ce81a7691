"""SBD's .mat files as VOC's augmented labels."""

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.__main__ import main
from dfn_fast.data.datasets.sbd import convert_sbd
from dfn_fast.data.datasets.voc import VocDataset, voc_palette
from dfn_fast.errors import DataError

savemat = pytest.importorskip("scipy.io").savemat

VOC = "voc/VOC2012"
SBD = "sbd/benchmark_RELEASE/dataset"


def write_mat(path, labels):
    """As MATLAB wrote SBD's: a struct GTcls with the fields Boundaries, Segmentation and CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"GTcls": {"Boundaries": np.zeros(3), "Segmentation": labels, "CategoriesPresent": [1]}})


@pytest.fixture
def roots(tmp_path, write, write_pair):
    """VOC train: a; val: c. SBD train: a, b, c; val: d. VOC's labels are full of 1, SBD's of 2, with a class 20."""
    for name in "ac":
        write_pair(f"{VOC}/JPEGImages/{name}.jpg", f"{VOC}/SegmentationClass/{name}.png", fill=1)
    for name in "bd":
        write(f"{VOC}/JPEGImages/{name}.jpg", np.zeros((4, 6, 3), np.uint8))
    write(f"{VOC}/ImageSets/Segmentation/train.txt", "a\n")
    write(f"{VOC}/ImageSets/Segmentation/val.txt", "c\n")
    labels = np.full((4, 6), 2, np.uint8)
    labels[0, 5] = 20
    for name in "abcd":
        write_mat(tmp_path / SBD / "cls" / f"{name}.mat", labels)
    write(f"{SBD}/train.txt", "a\nb\nc\n")
    write(f"{SBD}/val.txt", "d\n")
    return tmp_path / "sbd", tmp_path / "voc"


def made(roots):
    return sorted(path.name for path in (roots[1] / "VOC2012" / "SegmentationClassAug").iterdir())


def test_labels_and_list(roots):
    done = convert_sbd(*roots)
    assert (done.images, done.written, done.sbd_images) == (3, 3, 0)
    assert made(roots) == ["a.png", "b.png", "d.png"]  # c is in VOC's val
    assert done.list_file.read_text() == "a\nb\nd\n"
    train_aug = VocDataset(roots[1], "train_aug")
    assert [train_aug[i].label[0, 0] for i in range(3)] == [1, 2, 2]  # a keeps VOC's own label
    assert train_aug[1].label[0, 5] == 20
    assert train_aug[1].label.shape == (4, 6)
    palette = Image.open(roots[1] / "VOC2012" / "SegmentationClassAug" / "b.png").getpalette()
    assert palette[:63] == voc_palette(21).ravel().tolist()


def test_a_broken_mat_is_named_and_the_rest_is_done(roots, tmp_path):
    broken = tmp_path / SBD / "cls" / "b.mat"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.mat: expected a \.mat file"):
        convert_sbd(*roots)
    assert made(roots) == ["a.png", "d.png"]
    assert not (tmp_path / VOC / "ImageSets/Segmentation/train_aug.txt").exists()

    kept = tmp_path / VOC / "SegmentationClassAug" / "d.png"
    kept.write_bytes(b"made by the first run")
    broken.write_bytes(whole)
    assert convert_sbd(*roots).written == 1
    assert kept.read_bytes() == b"made by the first run"
    assert made(roots) == ["a.png", "b.png", "d.png"]


@pytest.mark.parametrize(
    "labels", [np.full((4, 6), 21, np.uint8), np.zeros((4, 6)), np.zeros((4, 6, 2), np.uint8)], ids=str
)
def test_a_mat_of_something_else_is_named(roots, tmp_path, labels):
    write_mat(tmp_path / SBD / "cls" / "b.mat", labels)
    with pytest.raises(DataError, match=r"b\.mat: expected \[H, W\] class ids from 0 to 20"):
        convert_sbd(*roots)


def test_a_missing_mat_is_named(roots, tmp_path):
    (tmp_path / SBD / "cls" / "b.mat").unlink()
    with pytest.raises(DataError, match=r"b\.mat: this label does not exist"):
        convert_sbd(*roots)


def test_images_missing_from_voc_come_from_sbd(roots, tmp_path, write, capsys):
    (tmp_path / VOC / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages.b\.jpg: this image does not exist, nor .*img.b\.jpg"):
        convert_sbd(*roots)
    write(f"{SBD}/img/b.jpg", np.full((4, 6, 3), 9, np.uint8))
    assert main(["convert-sbd", *map(str, roots)]) == 0
    out = capsys.readouterr().out
    assert "1 of the images are not in VOC's JPEGImages" in out
    assert "10582" in out
    assert "read it with --allow-outside-root" in out
    assert VocDataset(roots[1], "train_aug", allow_outside_root=True)[1].image[0, 0, 0] == 9


def test_an_id_never_leads_out_of_the_folder_of_the_labels(roots, tmp_path, write):
    write(f"{SBD}/train.txt", "../../evil\n")
    with pytest.raises(DataError, match=r"train\.txt:1: expected an id such as .* got '../../evil'"):
        convert_sbd(*roots)


def test_wrong_roots(roots, tmp_path):
    with pytest.raises(DataError, match=r"expected cls, train.txt and val.txt"):
        convert_sbd(tmp_path / "voc", roots[1])
    with pytest.raises(DataError, match="expected JPEGImages"):
        convert_sbd(roots[0], tmp_path / "sbd")


def test_target_that_cannot_be_written(roots, write):
    write(f"{VOC}/SegmentationClassAug", "a file where the folder should be")
    with pytest.raises(DataError, match="SegmentationClassAug: cannot be written"):
        convert_sbd(*roots)
