"""Labels of other programs become folders of masks: one scene in each form."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.__main__ import main
from dfn_fast.data.check import check
from dfn_fast.data.convert.write import FORMS, convert
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import ConfigError, DataError

# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WIDTH, HEIGHT = 40, 30
ROAD, CAR = (2, 3, 20, 15), (10, 10, 30, 25)  # left, top, right, bottom; the car lies on the road
SCENE = [("road", ROAD), ("car", CAR)]
IDS = {"labelme": {"car": 1, "road": 2}}  # sorted by name; elsewhere in the order of the form
COLOURS = np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)], np.uint8)


def corners(box):
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def expected(form):
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for name, (left, top, right, bottom) in SCENE:
        label[top : bottom + 1, left : right + 1] = IDS.get(form, {"road": 1, "car": 2})[name]
    return label


@pytest.fixture
def source(tmp_path, write):
    """``source(form)`` writes the scene as a.png of train and as b.png of val, in that form."""

    def image(path, seed):
        write(f"source/{path}", np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))

    def labelme():
        shapes = [{"label": name, "points": corners(box), "shape_type": "polygon"} for name, box in SCENE]
        for seed, stem in enumerate(("train/a", "valid/b")):
            image(f"{stem}.png", seed)
            name = stem.split("/")[1] + ".png"
            content = {"imagePath": name, "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
            write(f"source/{stem}.json", json.dumps(content))

    def coco():
        for seed, (split, name) in enumerate((("train2017", "a.png"), ("val2017", "b.png"))):
            image(f"{split}/{name}", seed)
            instances = [
                {"id": i, "image_id": 5, "category_id": 3 + i, "segmentation": [np.ravel(corners(box)).tolist()]}
                for i, (_, box) in enumerate(SCENE)
            ]
            images = [{"id": 5, "file_name": name, "height": HEIGHT, "width": WIDTH}]
            categories = [{"id": 3 + i, "name": name} for i, (name, _) in enumerate(SCENE)]
            content = {"images": images, "annotations": instances, "categories": categories}
            path = write(f"source/annotations/instances_{split}.json", "")
            path.write_text(json.dumps(content))

    def yolo():
        write("source/classes.txt", "road\ncar\n")
        for seed, stem in enumerate(("train/a", "val/b")):
            image(f"images/{stem}.png", seed)
            lines = [
                f"{i} " + " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in corners(box))
                for i, (_, box) in enumerate(SCENE)
            ]
            write(f"source/labels/{stem}.txt", "\n".join(lines))

    def cvat():
        labels = "".join(f"<label><name>{name}</name><color>#ff00cc</color></label>" for name, _ in SCENE)
        images = ""
        for i, (name, subset) in enumerate((("a.png", "Train"), ("b.png", "Validation"))):
            image(f"images/{name}", i)
            shapes = "".join(
                f'<polygon label="{label}" z_order="0" points="{";".join(f"{x}.0,{y}.0" for x, y in corners(box))}"/>'
                for label, box in SCENE
            )
            images += (
                f'<image id="{i}" name="{name}" subset="{subset}" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
            )
        meta = f"<meta><job><labels>{labels}</labels></job></meta>"
        write("source/annotations.xml", f"<annotations><version>1.1</version>{meta}{images}</annotations>")

    def colour():
        write("source/classes.txt", "background 0 0 0\nroad 128 64 128\ncar 0 0 142\n")
        for i, stem in enumerate(("train/images/a", "val/images/b")):
            image(f"{stem}.png", i)
            write(f"source/{stem.replace('images', 'masks')}_mask.png", COLOURS[expected("colour")])

    def make(form):
        {"labelme": labelme, "coco": coco, "yolo": yolo, "cvat": cvat, "colour": colour}[form]()
        return tmp_path / "source"

    return make


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_folder_of_masks(source, tmp_path, capsys, form):
    target = tmp_path / "target"
    assert main(["convert", form, str(source(form)), str(target)]) == 0
    printed = capsys.readouterr().out
    count = np.count_nonzero(expected(form) == 2)
    name = "road" if form == "labelme" else "car"
    assert f" 2  {name:<10}       2  {2 * count:>6}\n" in printed
    assert f"1 train, 1 val images in {target}" in printed
    assert check("folder", target).all_problems() == []
    for split, stem in (("train", "a"), ("val", "b")):
        dataset = build_dataset("folder", target, split)
        assert dataset.classes == ("background", *sorted(("road", "car"), reverse=form != "labelme"))
        np.testing.assert_array_equal(dataset[0].label, expected(form))
        assert dataset.names() == [stem]
        with Image.open(target / split / "masks" / f"{stem}.png") as mask:
            assert mask.mode == "P"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def edit(source, name, change, old=None):
    path = source / name
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, change, 1))


SHAPES = {"labelme": "train/a.json", "coco": "annotations/instances_train2017.json"}


@pytest.mark.parametrize(
    ("form", "name", "change", "old", "message"),
    [
        (
            "labelme",
            "train/a.json",
            lambda c: c["shapes"][1].update(shape_type="line"),
            "",
            "shape 2: kind 'line' of class",
        ),
        (
            "labelme",
            "train/a.json",
            lambda c: c["shapes"][1].update(points=[[0, 0]]),
            "",
            "shape 2: .*3 corners or more",
        ),
        ("labelme", "train/a.json", lambda c: c.update(imageWidth=41), "", "outlines are for an image of 41x30"),
        ("labelme", "train/a.json", lambda c: c.update(imagePath="c.png"), "", "image 'c.png' is not there"),
        ("labelme", "train/a.json", lambda c: c.update(imagePath="../../c.png"), "", "is outside of"),
        ("labelme", "train/a.json", lambda c: c.pop("shapes"), "", "expected LabelMe's JSON"),
        (
            "coco",
            SHAPES["coco"],
            lambda c: c["annotations"][1].update(category_id=9),
            "",
            "annotation 1: category 9 is not",
        ),
        (
            "coco",
            SHAPES["coco"],
            lambda c: c["annotations"][1].update(segmentation=[]),
            "",
            "annotation 1: it has no segm",
        ),
        ("coco", SHAPES["coco"], lambda c: c["annotations"][1].update(image_id=9), "", "annotation 1: no image 9"),
        (
            "coco",
            SHAPES["coco"],
            lambda c: c["images"][0].update(file_name="c.png"),
            "",
            "image 'c.png': it is in none of",
        ),
        ("coco", SHAPES["coco"], lambda c: c["categories"].pop(), "", "have other categories: road, and road, car"),
        ("yolo", "labels/train/a.txt", "\n7 ", "\n1 ", r"a\.txt:2: class '7' is none of 0\.\.1"),
        ("yolo", "labels/train/a.txt", "0 0.1 0.1 0.2 0.2\n0 ", "0 ", r"a\.txt:1: this is a box, not an outline"),
        ("yolo", "labels/train/a.txt", "0 1.5", "0 0.05", r"a\.txt:1: expected corners as shares 0\.\.1"),
        (
            "cvat",
            "annotations.xml",
            "<polyline",
            "<polygon",
            r"image a\.png: shape 1 \('road'\): kind 'polyline' is not",
        ),
        ("cvat", "annotations.xml", 'label="bus"', 'label="car"', r"shape 2 \('bus'\): class 'bus' is not in"),
        ("cvat", "annotations.xml", '"41"', '"40"', "outlines are for an image of 41x30"),
        ("cvat", "annotations.xml", "<!DOCTYPE a><annotations>", "<annotations>", "expected CVAT's XML"),
        ("colour", "classes.txt", "0 0 143", "0 0 142", r"a_mask\.png: colour \(0, 0, 142\) at x 10, y 10"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(source, tmp_path, form, name, change, old, message):
    edit(source(form), name, change, old)
    with pytest.raises(DataError, match=message):
        convert(form, tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("form", FORMS)
def test_classes_that_are_given_are_those_that_a_shape_may_have(source, tmp_path, write, form):
    table = write("c.txt", "background 0 0 0\ncar 0 0 142\nroad 128 64 128\n")
    convert(form, source(form), tmp_path / "target", table)
    label = build_dataset("folder", tmp_path / "target", "train")[0].label
    # LabelMe's own order is that of the table; YOLO's numbers count the lines of the table, which begins elsewhere.
    order = {"labelme": [0, 1, 2], "yolo": [0, 0, 1]}.get(form, [0, 2, 1])
    np.testing.assert_array_equal(label, np.array(order)[expected(form)])


@pytest.mark.parametrize("form", ["labelme", "coco", "cvat"])
def test_a_shape_of_another_class_is_named(source, tmp_path, write, form):
    with pytest.raises(DataError, match=r"class 'car' is not in .*c\.txt: background, road"):
        convert(form, source(form), tmp_path / "target", write("c.txt", "background\nroad\n"))


def test_a_target_must_be_free(source, tmp_path, write):
    write("target/a.txt", "mine")
    with pytest.raises(ConfigError, match="target exists and is not an empty folder"):
        convert("yolo", source("yolo"), tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["a.txt"]
    (tmp_path / "empty").mkdir()
    assert convert("yolo", tmp_path / "source", tmp_path / "empty").splits == {"train": 1, "val": 1}
    for bad, message in (
        ((tmp_path / "none", tmp_path / "t"), "no such folder"),
        ((tmp_path, "no/t"), "create it first"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert("yolo", *bad)


REGION = np.zeros((HEIGHT, WIDTH), np.uint8)
REGION[4:7, 5:15] = 2
EVERYWHERE = np.ones((HEIGHT, WIDTH), bool)


def ellipse(rx, ry):
    y, x = np.indices((HEIGHT, WIDTH))
    return (x - 20) ** 2 / rx**2 + (y - 15) ** 2 / ry**2 <= 1


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"shape_type": "rectangle", "points": [[14, 6], [5, 4]]}, (REGION > 0, REGION > 0)),
        ({"shape_type": "rectangle", "points": [[5, 4], [14, 4], [14, 6], [5, 6]]}, (REGION > 0, REGION > 0)),
        ({"shape_type": "circle", "points": [[20, 15], [28, 15]]}, (ellipse(7, 7), ellipse(9.5, 9.5))),
        ({"points": [[-9, -9], [99, -9], [99, 99], [-9, 99]]}, (EVERYWHERE, EVERYWHERE)),
    ],
)
def test_labelmes_other_shapes(source, tmp_path, shape, wanted):
    edit(source("labelme"), "train/a.json", lambda c: c["shapes"].append({"label": "__ignore__", **shape}))
    convert("labelme", tmp_path / "source", tmp_path / "target")
    label = build_dataset("folder", tmp_path / "target", "train")[0].label
    inner, outer = wanted
    assert ((label == 255) >= inner).all()
    assert ((label == 255) <= outer).all()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ('box label="car" xtl="5" ytl="4" xbr="14" ybr="6"', (REGION > 0, REGION > 0)),
        ('mask label="car" left="5" top="4" width="10" height="3" rle="0, 30"', (REGION > 0, REGION > 0)),
        ('mask label="car" left="4" top="4" width="11" height="3" rle="1, 10, 1, 10, 1, 10"', (REGION > 0, REGION > 0)),
        ('ellipse label="car" cx="20" cy="15" rx="10" ry="4" rotation="90"', (ellipse(3, 9), ellipse(5.5, 11.5))),
    ],
)
def test_cvats_other_shapes(source, tmp_path, shape, wanted):
    root = source("cvat")
    text = (root / "annotations.xml").read_text()
    a, b = text.index("<polygon"), text.index("</image>")
    (root / "annotations.xml").write_text(f"{text[:a]}<{shape}/>{text[b:]}")
    convert("cvat", root, tmp_path / "target")
    label = build_dataset("folder", tmp_path / "target", "train")[0].label
    inner, outer = wanted
    assert ((label == 2) >= inner).all()
    assert ((label == 2) <= outer).all()
    if "rle" in shape:
        edit(root, "annotations.xml", 'rle="5,', 'rle="')
        with pytest.raises(DataError, match=r"shape 1 \('car'\): the runs of this mask do not fill its box"):
            convert("cvat", root, tmp_path / "other")


def test_cvats_shapes_are_drawn_in_their_z_order(source, tmp_path):
    edit(source("cvat"), "annotations.xml", 'label="road" z_order="3"', 'label="road" z_order="0"')
    convert("cvat", tmp_path / "source", tmp_path / "target")
    label = build_dataset("folder", tmp_path / "target", "train")[0].label
    assert (label[12, 15], label[20, 25]) == (1, 2)


def test_cocos_codes_and_crowds(source, tmp_path):
    pytest.importorskip("pycocotools")
    pixels = REGION.T.ravel() > 0  # column by column
    ends = np.flatnonzero(np.diff(pixels.astype(int))) + 1
    counts = np.diff([0, *ends, pixels.size]).tolist()

    def change(content):
        content["annotations"][1].update(segmentation={"counts": counts, "size": [HEIGHT, WIDTH]}, iscrowd=1)

    edit(source("coco"), SHAPES["coco"], change)
    convert("coco", tmp_path / "source", tmp_path / "target")
    label = build_dataset("folder", tmp_path / "target", "train")[0].label
    np.testing.assert_array_equal(label == 255, REGION > 0)


def test_yolos_images_without_labels_are_told_and_labels_without_images_refused(source, tmp_path):
    (source("yolo") / "labels/val/b.txt").unlink()
    done = convert("yolo", tmp_path / "source", tmp_path / "target")
    assert done.notes[-1] == f"1 images have no label file and are background: {tmp_path}/source/images/val/b.png"
    (tmp_path / "source/labels/val/c.txt").write_text("0 0 0 1 0 1 1")
    with pytest.raises(DataError, match=r"val/c\.txt: no image belongs to these outlines"):
        convert("yolo", tmp_path / "source", tmp_path / "other")


def test_yolos_names_are_read_from_yaml(source, tmp_path, write, monkeypatch):
    (source("yolo") / "classes.txt").unlink()
    with pytest.raises(ConfigError, match=r"no data\.yaml and no classes\.txt there; give the classes with --classes"):
        convert("yolo", tmp_path / "source", tmp_path / "target")
    write("source/data.yaml", "names: {0: road, 1: car}\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"data\.yaml: reading it needs PyYAML"):
        convert("yolo", tmp_path / "source", tmp_path / "target")
    yaml = types.SimpleNamespace(safe_load=lambda text: {"names": {1: "car", 0: "road"}}, YAMLError=ValueError)
    monkeypatch.setitem(sys.modules, "yaml", yaml)
    assert convert("yolo", tmp_path / "source", tmp_path / "target").classes == ("background", "road", "car")


def test_images_without_a_split_have_none_afterwards(source, tmp_path):
    root = source("yolo")
    for folder in ("images", "labels"):
        (root / folder / "val").rename(root / folder / "night")
    with pytest.raises(DataError, match=r"1 images are in no split, such as .*b\.png, but others are in train"):
        convert("yolo", root, tmp_path / "target")
    for folder in ("images", "labels"):
        (root / folder / "train").rename(root / folder / "day")
    assert convert("yolo", root, tmp_path / "target").splits == {"": 2}
    files = [path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*.png")]
    assert sorted(files) == ["images/day/a.png", "images/night/b.png", "masks/day/a.png", "masks/night/b.png"]


def test_two_images_are_never_one(source, tmp_path):
    root = source("yolo")
    for folder in ("images", "labels"):
        shutil.copytree(root / folder / "train", root / "train" / folder)
    with pytest.raises(DataError, match=r"would both be 'a' of train"):
        convert("yolo", root, tmp_path / "target")


def test_an_image_that_its_camera_turned_is_saved_upright(source, tmp_path):
    root = source("labelme")
    path = root / "train/a.png"
    with Image.open(path) as image:
        upright = np.asarray(image.convert("RGB"))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    done = convert("labelme", root, tmp_path / "target")
    assert done.notes[-1] == "1 images are saved upright, without the EXIF orientation that they had"
    sample = build_dataset("folder", tmp_path / "target", "train")[0]
    np.testing.assert_array_equal(sample.image, upright)
    np.testing.assert_array_equal(sample.label, expected("labelme"))


def test_odd_names_of_classes_stay_what_they_are(source, tmp_path):
    def change(content):
        content["shapes"][0]["label"], content["shapes"][1]["label"] = '# "a", b', "1 2 3 c"

    root = source("labelme")
    for name in ("train/a.json", "valid/b.json"):
        edit(root, name, change)
    assert convert("labelme", root, tmp_path / "target").classes[1:] == ('# "a", b', "1 2 3 c")
    assert check("folder", tmp_path / "target").classes == ("background", '# "a", b', "1 2 3 c")
