"""The classes that labels have, found before a training."""

import threading

import numpy as np
import pytest

from dfn_fast.data import survey as survey_module
from dfn_fast.data.registry import build_dataset
from dfn_fast.data.survey import survey
from dfn_fast.errors import DataError


@pytest.fixture
def listed(tmp_path, write, write_pair):
    """``listed([0, 1], [255])``: a list of images whose labels hold these values, with the given classes."""

    def listed(*labels, classes="sky road"):
        for i, values in enumerate(labels):
            write_pair(f"{i}.png", f"{i}_label.png")
            write(f"{i}_label.png", np.resize(np.array(values, np.uint8), (4, 6)))
        write("train.txt", "".join(f"{i}.png\t{i}_label.png\n" for i in range(len(labels))))
        write("classes.txt", classes.replace(" ", "\n"))
        return build_dataset("list", tmp_path, "train")

    return listed


def test_every_class_seen_ends_the_reading(listed):
    found = survey(listed(*[[0, 1, 255]] * 9))
    assert (found.read, found.complete, found.warnings) == (1, True, [])
    found.require_trainable()


def test_a_class_in_one_label_is_found_wherever_it_is(listed):
    for place in range(4):
        labels = [[0]] * 4
        labels[place] = [1]
        assert survey(listed(*labels)).warnings == []


def test_labels_are_read_all_over_the_data_set(listed):
    assert survey(listed(*[[0]] * 25, *[[1]] * 25)).read < 10


def test_absent_classes_are_named(listed):
    found = survey(listed([0, 1, 255], [1], classes="sky road sea ice"))
    assert found.warnings == ["classes that are in no label: sea, ice (2 of 2 labels read)"]
    found.require_trainable()


@pytest.mark.parametrize(
    ("values", "classes", "question"),
    [
        ([0, 255], "sky road", "50 % of the pixels are 255, which is ignored: is it meant as 'road'? Then write 1 in"),
        ([1, 255, 255], "sky road", "67 % .* is it meant as 'sky'? Then write 0 in its place"),
        ([0, 255], "sky road sea", "is it meant as a class? Then write the id of that class"),
        ([0], "sky road", None),
    ],
)
def test_one_class_is_refused_and_255_asked_about(listed, values, classes, question):
    found = survey(listed(values, values, classes=classes))
    only = classes.split()[values[0]]
    with pytest.raises(DataError, match=rf"train\.txt: every labelled pixel .* class '{only}' \(2 of 2") as caught:
        found.require_trainable()
    for text in (str(caught.value), found.warnings[0]):
        assert ("255" in text) == (question is not None)
    if question:
        with pytest.raises(DataError, match=question.replace("?", r"\?")):
            found.require_trainable()


def test_no_labelled_pixel_is_refused(listed):
    found = survey(listed([255]))
    with pytest.raises(DataError, match=r"no label of split 'train' has a pixel of a class, all are 255 \(1 of 1"):
        found.require_trainable()
    assert "100 % of the pixels are 255, which is ignored: is it meant as a class?" in found.warnings[0]


def test_values_that_a_data_set_takes_for_void_are_named(tmp_path, write):
    write("leftImg8bit/train/task/f_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8))
    label = write("gtFine/train/task/f_gtFine_labelIds.png", np.resize(np.array([0, 1, 2], np.uint8), (4, 6)))
    found = survey(build_dataset("cityscapes", tmp_path, "train"))
    with pytest.raises(DataError, match=f"values 0, 1, 2 of {label} are void in data set 'cityscapes'.*--data folder"):
        found.require_trainable()


def test_the_time_ends_it_and_then_one_class_is_a_warning_only(listed):
    found = survey(listed(*[[0]] * 5), seconds=0)
    assert found.read == 1
    assert found.warnings == ["classes that are in no label: road (1 of 5 labels read)"]
    found.require_trainable()


def test_labels_alone_are_read(listed, tmp_path):
    dataset = listed([0, 1])
    (tmp_path / "0.png").write_bytes(b"")
    assert survey(dataset).read == 1


def test_a_wrong_value_and_a_slow_file_are_errors(listed, monkeypatch):
    with pytest.raises(DataError, match=r"0_label\.png: label values \[7\] are not classes"):
        survey(listed([0, 7]))
    dataset = listed([0, 1])
    monkeypatch.setattr(survey_module, "FILE_SECONDS", 0.02)
    wait = threading.Event().wait
    monkeypatch.setattr(dataset, "label", lambda index: wait(1))
    with pytest.raises(DataError, match=r"0_label\.png: this label was not read within 0\.02 s"):
        survey(dataset)


def test_joined_splits_and_scenes(tmp_path, write_pair):
    for split, name, fill in (("train", "a", 1), ("train", "b", 3), ("val", "a", 2)):
        write_pair(f"{split}/{name}.png", f"{split}annot/{name}.png", fill=fill)
    assert survey(build_dataset("camvid", tmp_path, "train+val")).present == [1, 2, 3]
    scenes = survey(build_dataset("synthetic", None, "train"))
    scenes.require_trainable()
    assert (scenes.read, scenes.warnings) == (0, [])
