"""Cityscapes, fine and coarse, from small trees."""

import numpy as np
import pytest

from dfn_fast.data.datasets.cityscapes import TRAIN_ID_TO_LABEL_ID, CityscapesDataset
from dfn_fast.errors import DataError

# From cityscapesscripts/helpers/labels.py: the train id of each label id 0..33.
TRAIN_IDS = [
    255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255,
    5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18,
]  # fmt: skip
ALL_IDS = np.array([*range(34), 255, 255], np.uint8).reshape(6, 6)


@pytest.fixture
def frame(write):
    """Writes one frame: ``frame("train", "aachen_000000_000019", kind="gtFine", labels=...)``."""

    def frame(split, name, kind="gtFine", labels=ALL_IDS, ending="labelIds"):
        city = name.split("_")[0]
        write(f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", np.zeros((*labels.shape[:2], 3), np.uint8))
        return write(f"{kind}/{split}/{city}/{name}_{kind}_{ending}.png", labels)

    return frame


def test_label_ids_become_train_ids(tmp_path, frame):
    frame("train", "aachen_000000_000019")
    frame("train", "bochum_000000_000313")
    dataset = CityscapesDataset(tmp_path, "train")
    assert dataset.names() == ["aachen_000000_000019", "bochum_000000_000313"]
    assert dataset.num_classes == 19
    np.testing.assert_array_equal(dataset[1].label.ravel(), [*TRAIN_IDS, 255, 255])
    assert dataset[0].label.dtype == np.uint8


def test_train_ids_become_label_ids():
    for label_id, train_id in enumerate(TRAIN_IDS):
        if train_id != 255:
            assert TRAIN_ID_TO_LABEL_ID[train_id] == label_id
    assert TRAIN_ID_TO_LABEL_ID[255] == 0
    assert TRAIN_ID_TO_LABEL_ID.dtype == np.uint8


def test_colours():
    # from cityscapesscripts/helpers/labels.py
    expected = {
        "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
        "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30),
        "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180),
        "person": (220, 20, 60), "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
        "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
    }  # fmt: skip
    assert CityscapesDataset.classes == tuple(expected)
    assert CityscapesDataset.palette.tolist() == [list(colour) for colour in expected.values()]


def test_train_id_files_serve_where_they_are_the_only_ones(tmp_path, frame):
    frame("train", "aachen_000000_000019", labels=np.full((4, 6), 18, np.uint8), ending="labelTrainIds")
    frame("train", "bochum_000000_000313", labels=np.full((4, 6), 18, np.uint8), ending="labelTrainIds")
    frame("train", "bochum_000000_000313", labels=np.full((4, 6), 33, np.uint8))
    frame("train", "bochum_000000_000313", labels=np.full((4, 6, 3), 9, np.uint8), ending="color")
    dataset = CityscapesDataset(tmp_path, "train")
    assert [dataset[i].label[0, 0] for i in range(2)] == [18, 18]
    assert dataset.pairs[1].label.name.endswith("_labelIds.png")


@pytest.mark.parametrize(("split", "folder"), [("train_extra", "train_extra"), ("train_coarse", "train")])
def test_coarse(tmp_path, frame, split, folder):
    frame("train", "aachen_000000_000019", labels=np.full((4, 6), 7, np.uint8))
    frame(folder, "aachen_000000_000019", kind="gtCoarse", labels=np.full((4, 6), 8, np.uint8))
    assert CityscapesDataset(tmp_path, split)[0].label[0, 0] == 1


@pytest.mark.parametrize("value", [34, 254])
def test_value_that_is_no_label_id(tmp_path, frame, value):
    frame("val", "munster_000000_000019", labels=np.array([[7, value], [255, 33]], np.uint8))
    with pytest.raises(DataError, match=rf"labelIds\.png: expected label ids 0\.\.33, or 255, got \[{value}\]"):
        CityscapesDataset(tmp_path, "val")[0]


def test_train_id_file_of_label_ids_is_caught(tmp_path, frame):
    frame("val", "munster_000000_000019", labels=np.full((4, 6), 19, np.uint8), ending="labelTrainIds")
    with pytest.raises(DataError, match=r"label values \[19\] are not classes of 'cityscapes'"):
        CityscapesDataset(tmp_path, "val")[0]


def test_image_without_a_label_and_the_reverse(tmp_path, frame):
    frame("val", "munster_000000_000019").unlink()
    with pytest.raises(DataError, match=r"munster_000000_000019_leftImg8bit\.png: no label"):
        CityscapesDataset(tmp_path, "val")
    label = frame("val", "munster_000000_000019")
    (tmp_path / "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError, match=rf"{label.name}: no image"):
        CityscapesDataset(tmp_path, "val")


def test_missing_folders_name_the_archive(tmp_path, frame):
    with pytest.raises(DataError, match=r"leftImg8bit.train: .*is missing.*leftImg8bit archive"):
        CityscapesDataset(tmp_path, "train")
    frame("train", "aachen_000000_000019")
    with pytest.raises(DataError, match=r"gtCoarse.train: .*is missing.*gtCoarse archive"):
        CityscapesDataset(tmp_path, "train_coarse")


def test_what_is_passed_over_is_noted(tmp_path, frame, write):
    frame("train", "aachen_000000_000019")
    frame("train", "aachen_000000_000019", ending="color")
    write("gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json", "{}")
    other = write("leftImg8bit/train/aachen/b.png", np.zeros((6, 6, 3), np.uint8))
    table = write("leftImg8bit/train/aachen/table.csv", "x")
    notes = CityscapesDataset(tmp_path, "train").notes
    assert [note.rpartition(": ")[2] for note in notes] == [str(table), str(other)]
    assert notes[1].startswith("passed over 1 images whose names do not end in _leftImg8bit")


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine"])
def test_two_frames_of_one_name_are_refused(tmp_path, frame, folder):
    label = frame("train", "aachen_000000_000019")
    image = tmp_path / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    path = image if folder == "leftImg8bit" else label
    (path.parent.parent / "bochum").mkdir()
    (path.parent.parent / "bochum" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=rf"{path.name} and .*bochum/{path.name}: two frames of one name"):
        CityscapesDataset(tmp_path, "train")
