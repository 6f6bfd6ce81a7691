"""Reports against metrics computed by hand, and the command line on small folders of images."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dfn_fast import cli
from dfn_fast.data.base import Pair, Sample, SegmentationDataset
from dfn_fast.data.border import border_targets
from dfn_fast.errors import CheckpointError, ConfigError, DataError
from dfn_fast.evaluate.__main__ import main
from dfn_fast.evaluate.evaluation import evaluate
from dfn_fast.evaluate.metrics import BorderScore, BoundaryFScore, ConfusionMatrix
from dfn_fast.inference.predictor import Predictor
from dfn_fast.media.images import write_image, write_label
from support.saved_networks import CLASSES, save_checkpoint, small_network
from support.tiny_resnet import tiny_backbones

SIZES = ((40, 48), (48, 36), (33, 64))


def scene(index):
    """An image, and a label with blocks of three classes and 255."""
    rng = np.random.default_rng(index)
    height, width = SIZES[index % len(SIZES)]
    label = np.kron(rng.choice([0, 1, 2, 255], size=(9, 9)), np.ones((8, 8), int))[:height, :width].astype(np.uint8)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image, label


class Scenes(SegmentationDataset):
    """Scenes made on the spot; ``read`` are the indices that were asked for."""

    name, classes = "scenes", tuple(CLASSES)

    def __init__(self, count=4):
        super().__init__([Pair(Path(f"{i}.jpg"), Path(f"{i}.png"), str(i)) for i in range(count)], "val", "nowhere")
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return Sample(*scene(index), str(index))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Loading a checkpoint builds a tiny backbone."""
    with tiny_backbones():
        yield


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A training checkpoint of ``model``, trained on folder data."""
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "best.pth")


@pytest.fixture
def root(tmp_path):
    """Folder data: train/ and val/ with images/ and masks/, and classes.txt."""
    root = tmp_path / "data"
    for split, indices in (("train", (0,)), ("val", (1, 2, 3))):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index in indices:
            image, label = scene(index)
            write_image(root / split / "images" / f"{index}.png", image)
            write_label(root / split / "masks" / f"{index}.png", label)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def test_report_is_the_metrics_of_all_images(model):
    predictor, dataset = Predictor(model, amp="off"), Scenes()
    report = evaluate(predictor, dataset, border=True, border_width=5)
    confusion, contours, borders = ConfusionMatrix(3), BoundaryFScore(3), BorderScore()
    for index in range(4):
        image, label = scene(index)
        prediction = predictor(image)
        confusion.update(label, prediction)
        contours.update(label, prediction)
        borders.update(border_targets(label, 5), predictor.border(image))
    assert (report.mean_iou, report.mean_accuracy) == (confusion.mean_iou, confusion.mean_accuracy)
    assert report.pixel_accuracy == confusion.pixel_accuracy
    np.testing.assert_array_equal(report.per_class_iou, confusion.per_class_iou)
    np.testing.assert_array_equal(report.pixel_share, confusion.pixel_share)
    assert report.boundary_f_score == contours.value
    assert report.border == {**borders.best(), "width": 5}
    assert 0 < report.mean_iou < 1
    assert 0 < report.boundary_f_score < 1


def test_each_image_is_read_once_and_told_of(model):
    dataset, calls = Scenes(), []
    report = evaluate(
        Predictor(model, amp="off"), dataset, boundary=False, on_image=lambda: calls.append(len(dataset.read))
    )
    assert dataset.read == [0, 1, 2, 3]
    assert calls == [1, 2, 3, 4]
    assert report.boundary_f_score is None
    assert report.border is None


def test_on_image_can_end_the_evaluation(model):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Predictor(model, amp="off"), Scenes(), on_image=stop)


def test_limit_takes_the_first_images_and_says_so(model):
    dataset = Scenes()
    report = evaluate(Predictor(model, amp="off"), dataset, limit=2)
    assert dataset.read == [0, 1]
    assert report.conditions == "scenes val, first 2 of 4 images, scale 1, no flip, whole image"
    assert evaluate(Predictor(model, amp="off"), Scenes(), limit=9).conditions.startswith("scenes val, 4 images,")


def test_every_line_with_a_number_names_its_conditions(model):
    report = evaluate(Predictor(model, amp="off", scales=(0.5, 1), flip=True, window=64), Scenes(), border=True)
    conditions = "scenes val, 4 images, scales 0.5 1, flip, window 64x64 overlap 0.33"
    assert report.conditions == conditions
    lines = [line for line in report.table().splitlines() if line.strip()]
    assert [line for line in lines if conditions not in line] == [lines[1]]  # the heads of the columns
    metrics = ["mIoU", "mean accuracy", "pixel accuracy", "boundary F-score", "border network"]
    for name in (*CLASSES, *metrics):
        assert any(line.startswith(name) for line in lines)
    assert f"{report.mean_iou:.4f}" in report.table()


def test_class_that_is_nowhere_is_absent_and_null(model):
    class Void(Scenes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(label=np.full_like(sample.label, 255))

    report = evaluate(Predictor(model, amp="off"), Void(1))
    assert math.isnan(report.mean_iou)
    assert "absent" in report.table()
    assert "these images have no labelled pixel, so there is nothing to measure" in report.table()
    assert "no labelled pixel" not in evaluate(Predictor(model, amp="off"), Scenes(1)).table()
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["mean_iou"] is None
    assert content["per_class_iou"] == dict.fromkeys(CLASSES)


def test_class_counts_that_differ_are_an_error():
    model = small_network(5, border=False)
    with pytest.raises(ConfigError, match=r"5 classes.* 3"):
        evaluate(Predictor(model, amp="off"), Scenes())


def test_command_prints_the_table_and_writes_json(model, checkpoint, root, capsys, tmp_path):
    file = tmp_path / "out.json"
    options = ["--scales", "0.75", "1", "--flip", "--device", "cpu", "--border", "--border-width", "3"]
    assert main([str(checkpoint), "--root", str(root), *options, "--json", str(file)]) == 0
    output = capsys.readouterr().out
    content = json.loads(file.read_text())

    confusion = ConfusionMatrix(3)
    for index in (1, 2, 3):
        image, label = scene(index)
        confusion.update(label, Predictor(model, amp="off", scales=(0.75, 1), flip=True)(image))
    assert content["mean_iou"] == confusion.mean_iou
    assert content["per_class_iou"] == dict(zip(CLASSES, confusion.per_class_iou, strict=True))
    assert content["conditions"] == "folder val, 3 images, scales 0.75 1, flip, whole image"
    assert (content["scales"], content["flip"], content["window"]) == ([0.75, 1], True, None)
    assert (content["checkpoint"], content["device"]) == (str(checkpoint), "cpu")
    assert content["border"]["width"] == 3
    assert {"torch", "dfn_fast"} <= content["versions"].keys()
    assert f"mIoU {confusion.mean_iou:.4f} {content['conditions']}" in " ".join(output.split())
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_folder_without_class_names_takes_the_checkpoints(checkpoint, root, capsys):
    (root / "classes.txt").unlink()
    assert main([str(checkpoint), "--root", str(root), "--split", "train", "--no-boundary", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "thing" in output
    assert "folder train, 1 image," in output
    assert "boundary" not in output


def test_how_the_data_was_read_is_noted(checkpoint, root, capsys, monkeypatch):
    notes = property(lambda self: ["a.txt was passed over"], lambda *_: None)
    monkeypatch.setattr(SegmentationDataset, "notes", notes)
    assert main([str(checkpoint), "--root", str(root), "--limit", "1", "--device", "cpu"]) == 0
    assert "note: a.txt was passed over" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["classes.txt", "labelmap.txt", "val/_classes.csv"])
def test_other_class_names_are_noted(checkpoint, root, capsys, table):
    (root / "classes.txt").unlink()
    header = "Pixel Value, Class\n" * table.endswith("csv")
    rows = [f"{i}, {name}" if header else name for i, name in enumerate(("ground", "other", "thing"))]
    (root / table).write_text(header + "\n".join(rows))
    assert main([str(checkpoint), "--root", str(root), "--limit", "1", "--device", "cpu"]) == 0
    assert "class 1 is 'other' in the data set and 'thing' in the checkpoint" in capsys.readouterr().err


def test_data_set_of_another_class_count_names_both_and_the_remedy(checkpoint, root):
    (root / "classes.txt").write_text("a\nb\nc\nd")
    with pytest.raises(ConfigError, match=r"3 classes, trained on folder.* 4; choose .*--data"):
        main([str(checkpoint), "--root", str(root), "--device", "cpu"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--num-classes", "256"], "--num-classes must be at most 255"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--border-width", "0"], "border width: expected an odd number"),
        (["--border-width", "1000000001", "--border"], "border width: expected an odd number"),
        (["--border-width", "3"], "add --border"),
        (["--json", "missing/folder/a.json"], "--json .* folder"),
        (["--scales", "0"], "scales"),
        (["--window", "16"], "window"),
        (["--split", "vall"], "val"),
        (["--border-width", "4", "--border"], "border width"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_wrong_options_are_user_errors(checkpoint, root, options, message):
    with pytest.raises(ConfigError, match=message):
        main([str(checkpoint), "--root", str(root), "--device", "cpu", *options])


def test_a_border_width_that_a_checkpoint_cannot_mean_is_refused(model, root, tmp_path):
    path = save_checkpoint(model, tmp_path / "wide.pth", config={"border_width": 10**9 + 1})
    with pytest.raises(CheckpointError, match=r"wide\.pth: border width: expected an odd number .* got 1000000001"):
        main([str(path), "--root", str(root), "--border", "--device", "cpu"])


@pytest.mark.parametrize("settings", [{"limit": 0}, {"limit": -1}, {"border_width": 0}, {"border_width": 4}])
def test_a_setting_that_is_not_possible_is_refused(model, settings):
    with pytest.raises(ConfigError, match=f"got {next(iter(settings.values()))}"):
        evaluate(Predictor(model, amp="off"), Scenes(), **settings)


def test_a_file_that_is_never_read_is_named(model):
    class Hanging(Scenes):
        def __getitem__(self, index):
            return super().__getitem__(index) if index < 2 else threading.Event().wait()

    with pytest.raises(DataError, match=r"2\.jpg with 2\.png was not read within 0\.2 s"):
        evaluate(Predictor(model, amp="off"), Hanging(), timeout=0.2)


def test_the_report_does_not_replace_the_checkpoint(model, root, tmp_path):
    path = save_checkpoint(model, tmp_path / "best.pth")
    (tmp_path / "link.json").symlink_to(path)
    before = path.read_bytes()
    for name in ("best.pth", "link.json"):
        with pytest.raises(ConfigError, match=rf"--json .*{name} is the checkpoint itself"):
            main([str(path), "--root", str(root), "--json", str(tmp_path / name), "--device", "cpu"])
    assert path.read_bytes() == before


def test_border_of_a_network_without_one_is_an_error_before_work(tmp_path, root):
    torch.save(small_network(3, border=False).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="Border Network"):
        main([str(tmp_path / "bare.pth"), "--data", "folder", "--root", str(root), "--border", "--device", "cpu"])


def test_bare_weights_need_the_name_of_the_data_set(tmp_path, model, root):
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="--data is missing"):
        main([str(tmp_path / "bare.pth"), "--root", str(root), "--device", "cpu"])


def test_damaged_image_is_named(checkpoint, root):
    file = root / "val" / "images" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"2\.png.*truncated"):
        main([str(checkpoint), "--root", str(root), "--device", "cpu"])


def test_misspelt_option_names_the_nearest(checkpoint, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main([str(checkpoint), "--scale", "1"]))
    assert left.value.code == 2
    assert "did you mean --scales?" in capsys.readouterr().err


def test_camvid_from_its_files(camvid_root, tmp_path, capsys):
    torch.save(small_network(11).state_dict(), tmp_path / "bare.pth")
    arguments = [str(tmp_path / "bare.pth"), "--data", "camvid", "--root", str(camvid_root), "--limit", "2"]
    assert main([*arguments, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "camvid val, first 2 of 101 images, scale 1, no flip, whole image" in output
    assert "bicyclist" in output
