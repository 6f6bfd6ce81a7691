"""What a run says of its data: how it was read, and which classes no label has."""

import json

import numpy as np
import pytest
from PIL import Image

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.data import base
from dfn_fast.errors import DataError
from dfn_fast.evaluate.__main__ import main as measure
from support.runs import differences


@pytest.fixture
def unlabelled(own_photos):
    """The tiny folder, whose validation labels are 255 everywhere."""
    for mask in (own_photos / "val" / "masks").iterdir():
        Image.fromarray(np.full((48, 40), 255, np.uint8)).save(mask)
    return own_photos


@pytest.fixture
def drawn(own_photos):
    """Writes 255 over one class of the training labels, and perhaps a third class, which no label has."""

    def draw(class_id, names="ground\nblob\n"):
        (own_photos / "classes.txt").write_text(names)
        for mask in (own_photos / "train" / "masks").iterdir():
            label = np.array(Image.open(mask))
            label[label == class_id] = 255
            Image.fromarray(label).save(mask)
        return own_photos

    return draw


def test_labels_with_one_class_are_not_trained_on(tiny, drawn, tmp_path):
    with pytest.raises(DataError, match=r"every labelled pixel of split 'train' has class 'ground'.*meant as 'blob'"):
        tiny("run", "--root", str(drawn(1)))
    assert not (tmp_path / "run").exists()


def test_a_class_that_no_label_has_is_named_once(tiny, drawn, capsys):
    words = ["--root", str(drawn(7, "ground\nblob\nrock\n"))]
    tiny("run", *words, "--stop-after", "1")
    assert capsys.readouterr().err.count("split 'train': classes that are in no label: rock (9 of 9 labels read)") == 1
    tiny("run", "--resume", "--stop-after", "2")
    assert "rock" not in capsys.readouterr().err


def test_how_the_data_was_read_is_printed_once(tiny, capsys, monkeypatch):
    monkeypatch.setattr(
        base.SegmentationDataset, "notes", property(lambda self: ["a.txt was passed over"], lambda *_: 0)
    )
    tiny("run", "--stop-after", "1")
    assert capsys.readouterr().out.count("note: a.txt was passed over") == 1


def test_a_validation_without_a_labelled_pixel_says_so_and_keeps_the_newest(tiny, unlabelled, capsys):
    run = tiny("run", "--root", str(unlabelled), "--stop-after", "5")
    run = tiny("run", "--resume")
    printed, told = capsys.readouterr()
    assert "warning: split 'val' of " in told
    assert "has no labelled pixel: no mIoU can be measured" in told
    assert printed.count("val has no labelled pixel: there is no mIoU, and the newest network counts as the best") == 3
    assert "nan" not in printed
    assert "-1.0" not in printed
    best, last = read_file(run.best), read_file(run.last)
    assert best["position"]["iteration"] == last["position"]["iteration"] == 6
    assert differences(best["model"], last["model"]) == []
    summary = json.loads(run.summary_file.read_text())
    assert (summary["best_mean_iou"], summary["last_mean_iou"]) == (None, None)
    assert summary["checkpoint"] == str(run.best)
    assert [r["mean_iou"] for r in run.metrics() if r["kind"] == "val"] == [None, None]


def test_masks_of_other_numbers_are_trained_on_and_measured(tiny, own_photos, capsys):
    for mask in own_photos.glob("*/masks/*"):
        Image.fromarray(np.array(Image.open(mask)) + np.uint8(1)).save(mask)
    words = ["--root", str(own_photos), "--label-offset", "-1"]
    with pytest.raises(DataError, match=r"label values \[2\] are not classes"):
        tiny("plain", *words[:2])
    run = tiny("run", *words, "--ignore-value", "9", "--stop-after", "1")
    printed = capsys.readouterr().out
    assert "note: value 9 of the masks is ignored" in printed
    assert "note: a class id is a mask's value -1; values below 1 are ignored" in printed
    assert measure([str(run.last), "--device", "cpu", *words[:2]]) == 0
    assert "note: a class id is a mask's value -1" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"label values \[2\] are not classes"):
        measure([str(run.last), "--device", "cpu", *words[:2], "--label-offset", "0"])
