"""COCO's instances as VOC classes, from small annotation files."""

import json
import sys

import numpy as np
import pytest

from dfn_fast.data.datasets import coco as coco_module
from dfn_fast.data.datasets.coco import CocoDataset
from dfn_fast.data.datasets.voc import VOC_CLASSES
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import ConfigError, DataError

# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Some of COCO's 80, with its ids: all whose names differ from VOC's, one that does not, and one that VOC lacks.
CATEGORIES = {
    1: "person", 4: "motorcycle", 5: "airplane", 52: "banana", 63: "couch", 64: "potted plant", 67: "dining table",
    72: "tv",
}  # fmt: skip
VOC_NAMES = {
    1: "person", 4: "motorbike", 5: "aeroplane", 63: "sofa", 64: "pottedplant", 67: "diningtable", 72: "tvmonitor",
}  # fmt: skip


OWN = {7: "helmet", 3: "vest"}


def box(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def instance(image, category, segmentation, area, crowd=0):
    return {
        "image_id": image, "category_id": category, "segmentation": segmentation, "area": area, "iscrowd": crowd,
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path, write):
    """``coco(instances)`` writes a val2017 with image 1 of 60 x 50 and image 2 of 60 x 50."""
    pytest.importorskip("pycocotools")

    def coco(instances):
        images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 60, "height": 50} for i in (1, 2)]
        categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
        content = {"images": images, "annotations": instances, "categories": categories}
        write("annotations/instances_val2017.json", json.dumps(content))
        for image in images:
            write(f"val2017/{image['file_name']}", np.zeros((50, 60, 3), np.uint8))
        return tmp_path

    return coco


@pytest.mark.parametrize("category", VOC_NAMES)
def test_categories_go_by_name(coco, category):
    dataset = CocoDataset(coco([instance(1, category, box(0, 0, 40, 40), 1600)]), "val2017")
    label = dataset[0].label
    assert VOC_CLASSES[label[20, 20]] == VOC_NAMES[category]
    assert label[45, 50] == 0
    assert np.count_nonzero(label) == 1600


def test_smaller_instances_lie_on_top_and_crowds_below(coco):
    rows = np.zeros((50, 60), np.uint8)
    rows[:, :30] = 1
    counts = [0, 30 * 50, 30 * 50]  # column by column: no 0s, then 1,500 1s, then 1,500 0s
    root = coco(
        [
            instance(1, 64, box(5, 5, 10, 10), 100),  # the smallest first in the file, yet on top
            instance(1, 1, box(0, 0, 40, 40), 1600),
            instance(1, 1, {"counts": counts, "size": [50, 60]}, 1500, crowd=1),
            instance(1, 52, box(50, 0, 10, 50), 500),  # a banana is background
        ]
    )
    label = CocoDataset(root, "val2017")[0].label
    expected = np.zeros((50, 60), np.uint8)
    expected[:, :30] = 255
    expected[:40, :40] = VOC_CLASSES.index("person")
    expected[5:15, 5:15] = VOC_CLASSES.index("pottedplant")
    np.testing.assert_array_equal(label, expected)


def test_compressed_code(coco):
    from pycocotools import mask

    wanted = np.zeros((50, 60), np.uint8, order="F")
    wanted[3:45, 7:59] = 1
    code = mask.encode(wanted)
    code["counts"] = code["counts"].decode()
    label = CocoDataset(coco([instance(1, 5, code, 2184)]), "val2017")[0].label
    np.testing.assert_array_equal(label, wanted * VOC_CLASSES.index("aeroplane"))


@pytest.mark.parametrize(
    ("instances", "names"),
    [
        ([(1, 1, 1001, 0), (2, 1, 1000, 0)], ["000000000001"]),  # more than 1,000 labelled pixels
        ([(1, 52, 2000, 0), (2, 1, 2000, 0)], ["000000000002"]),  # a banana does not count
        ([(1, 1, 2000, 1), (2, 1, 600, 0), (2, 5, 600, 0)], ["000000000002"]),  # a crowd neither; instances add up
    ],
)
def test_images_that_count(coco, instances, names):
    root = coco([instance(i, category, box(0, 0, 9, 9), area, crowd) for i, category, area, crowd in instances])
    assert CocoDataset(root, "val2017").names() == names


def test_images_folder(coco):
    root = coco([instance(1, 1, box(0, 0, 40, 40), 1600)])
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images" / "val2017")
    assert CocoDataset(root, "val2017")[0].image.shape == (50, 60, 3)
    (root / "images" / "val2017").rename(root / "away")
    with pytest.raises(DataError, match="val2017: the folder of the images is missing"):
        CocoDataset(root, "val2017")


def test_errors_name_the_file(coco, write):
    root = coco([instance(1, 1, box(0, 0, 40, 40), 1600)])
    with pytest.raises(ConfigError, match="no split 'train2017'; it has val2017"):
        CocoDataset(root, "train2017")
    (root / "val2017" / "000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"000000000001\.jpg: this image does not exist"):
        CocoDataset(root, "val2017")
    write("val2017/000000000001.jpg", np.zeros((50, 61, 3), np.uint8))
    with pytest.raises(DataError, match=r"61x50.*got 60x50"):
        CocoDataset(root, "val2017")[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}'])
def test_annotations_of_something_else(coco, write, content):
    root = coco([])
    write("annotations/instances_val2017.json", content)
    with pytest.raises(DataError, match=r"instances_val2017\.json: expected COCO's instances"):
        CocoDataset(root, "val2017")


def test_no_annotations(tmp_path):
    pytest.importorskip("pycocotools")
    with pytest.raises(DataError, match=r"annotations: no instances_\*\.json there"):
        CocoDataset(tmp_path, "val2017")


def edited(root, change):
    """Applies ``change`` to the content of the annotation file."""
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def test_what_is_left_out_is_noted(coco):
    instances = [instance(1, 1, box(0, 0, 40, 40), 1600), instance(1, 52, box(0, 0, 9, 9), 81)]
    root = edited(coco(instances), lambda c: c["annotations"].append(instance(7, 1, box(0, 0, 9, 9), 81)))
    assert CocoDataset(root, "val2017").notes == [
        "1 instances of 1 categories that are not VOC's are background: banana",
        "1 of 2 images are left out, having no class of VOC or at most 1000 labelled pixels",
        "1 annotations are of images that are not in instances_val2017.json, and are left out",
    ]


def test_own_categories_are_refused_or_noted(coco):
    def rename(content):
        content["categories"][0]["name"], content["categories"][3]["name"] = names

    names = ("pothole", "background")
    root = edited(coco([instance(1, i, box(0, 0, 40, 40), 1600) for i in (1, 52)]), rename)
    with pytest.raises(
        DataError,
        match=r"none of its categories is a class of VOC.*: pothole, background\. .*--classes FILE.*--data folder",
    ):
        CocoDataset(root, "val2017")
    names = ("person", "helmet")
    dataset = CocoDataset(edited(root, rename), "val2017")
    assert "1 instances of 1 categories that are not VOC's are background: helmet" in dataset.notes


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("images", {"height": True}, "height True, width 60"),
        ("images", {"width": 60.0}, r"height 50, width 60\.0"),
        ("images", {"height": 0}, "height 0"),
        ("images", {"height": 16385}, "height 16385, width 60"),
        ("images", {"width": 16385}, "height 50, width 16385"),
        ("images", {"file_name": 1}, "file_name 1"),
        ("images", {"id": 2}, "image 2 is there twice"),
        ("categories", {"id": 4}, "category 4 is there twice"),
        ("annotations", {"category_id": 3}, "category 3, which is not in categories"),
        ("annotations", {"area": True}, "an area of True"),
        ("annotations", {"area": float("nan")}, "an area of nan"),
        ("annotations", {"area": -1}, "an area of -1"),
        ("annotations", {"iscrowd": "0"}, "iscrowd '0'"),
    ],
)
def test_wrong_values_are_named(coco, part, values, message):
    root = edited(coco([instance(1, 1, box(0, 0, 40, 40), 1600)]), lambda content: content[part][0].update(values))
    with pytest.raises(DataError, match=rf"instances_val2017\.json: expected COCO's instances .*: .*{message}"):
        CocoDataset(root, "val2017")


def test_an_annotation_file_has_a_limit(coco, monkeypatch):
    root = coco([instance(1, 1, box(0, 0, 40, 40), 1600)])
    size = (root / "annotations/instances_val2017.json").stat().st_size
    monkeypatch.setattr(coco_module, "MAX_BYTES", size)
    assert len(CocoDataset(root, "val2017")) == 1
    monkeypatch.setattr(coco_module, "MAX_BYTES", size - 1)
    with pytest.raises(DataError, match=f"this annotation file has {size} bytes, expected at most {size - 1}"):
        CocoDataset(root, "val2017")


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([0, 0, 9, 0, 32768, 9], None),
        ([0, 0, 9, 0, 32769, 9], "corner lies far"),
        ([0, 0, 9, 0, 9, -16384], None),
        ([0, 0, 9, 0, 9, -16385], "corner lies far"),
        ([0, 0, 9, 0, 9, float("nan")], "corner lies far"),
        ([0, 0, 9, 0, 9, 9, 9], "reshape"),
        ([0, 0, 32768, 0] * 31 + [0, 0], None),  # 2,031,616 of 2,097,152 pixels long
        ([0, 0, 32768, 0] * 33 + [0, 0], "an outline of more than 2097152 pixels"),
    ],
)
def test_outlines_have_limits(coco, polygon, message):
    dataset = CocoDataset(coco([instance(1, 1, [polygon], 1600)]), "val2017")
    if message is None:
        assert dataset.label(0).shape == (50, 60)
        return
    with pytest.raises(DataError, match=rf"000000000001\.jpg: a segmentation cannot be drawn .*{message}"):
        dataset.label(0)


@pytest.mark.parametrize("counts", [[1, 2998], [1, 3000], [3001, -1], [1500.5, 1499.5], [], [True, 2999]])
def test_runs_must_cover_the_image(coco, counts):
    dataset = CocoDataset(coco([instance(1, 1, {"counts": counts, "size": [50, 60]}, 1600)]), "val2017")
    with pytest.raises(DataError, match="the runs do not cover the image"):
        dataset.label(0)


def test_sizes_are_compared_before_anything_is_drawn(coco, monkeypatch):
    root = edited(
        coco([instance(1, 1, box(0, 0, 40, 40), 1600)]), lambda content: content["images"][0].update(width=16384)
    )
    monkeypatch.setattr(coco_module, "_draw_label", lambda *_: pytest.fail("drawn"))
    dataset = CocoDataset(root, "val2017")
    for read in (dataset.label, dataset.__getitem__):
        with pytest.raises(DataError, match=r"image's size 60x50 .*got 16384x50"):
            read(0)


def test_broken_segmentation_is_named(coco):
    root = coco([instance(1, 1, {"counts": 5}, 1600)])
    with pytest.raises(DataError, match=r"instances_val2017\.json: image 000000000001\.jpg: a segmentation"):
        CocoDataset(root, "val2017")[0]


def test_no_image_counts(coco):
    with pytest.raises(DataError, match=r"split 'val2017' .* has no images"):
        CocoDataset(coco([]), "val2017")


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match="pip install pycocotools"):
        CocoDataset(tmp_path, "val2017")


class TestOwnCategories:
    @pytest.fixture
    def own(self, coco):
        """``own(names, split)`` writes an annotation file with categories of these ids and names."""

        def own(names, split="val2017"):
            root = coco([instance(1, 7, box(0, 0, 10, 10), 100), instance(1, 3, box(5, 5, 2, 2), 4)])
            edited(root, lambda c: c.update(categories=[{"id": i, "name": name} for i, name in names.items()]))
            if split != "val2017":
                (root / "annotations/instances_val2017.json").rename(root / f"annotations/instances_{split}.json")
            return root

        return own

    def test_are_classes_in_the_order_of_their_ids(self, own):
        dataset = build_dataset("coco", own(OWN), "val2017")
        expected = np.zeros((50, 60), np.uint8)
        expected[:10, :10] = 2
        expected[5:7, 5:7] = 1
        np.testing.assert_array_equal(dataset[0].label, expected)
        assert dataset.classes == ("background", "vest", "helmet")
        assert dataset.palette.shape == (3, 3)
        assert len(dataset) == 2  # also an image without an instance, and one of few pixels
        assert dataset.notes == [
            "the classes are background and the categories of instances_val2017.json, as none of them is VOC's"
        ]

    def test_one_may_be_the_background(self, own):
        dataset = CocoDataset(own({7: "background", 3: "vest"}), "val2017")
        assert (dataset.classes, dataset[0].label.max()) == (("background", "vest"), 1)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ({7: "vest", 3: "vest"}, "class 'vest' occurs twice"),
            ({7: "a\nb", 3: "vest"}, "expected a class name"),
            ({7: "background"} | {i: f"c{i}" for i in range(8, 263)} | {3: "vest"}, "254 categories .* got 256"),
        ],
    )
    def test_that_are_no_classes_are_named(self, own, names, message):
        with pytest.raises(DataError, match=message):
            CocoDataset(own(names), "val2017")

    def test_differ_by_no_split(self, own):
        own({7: "helmet", 3: "visor"}, "train2017")
        with pytest.raises(DataError, match=r"val2017\.json and .*train2017\.json have other categories: vest, helmet"):
            CocoDataset(own(OWN), "val2017")

    def test_can_be_chosen(self, own, write):
        table = write("classes.txt", "background\nhelmet 1 2 3\nglove\n")
        dataset = build_dataset("coco", own(OWN), "val2017", classes=table)
        assert (dataset.classes, dataset.palette[1].tolist()) == (("background", "helmet", "glove"), [1, 2, 3])
        expected = np.zeros((50, 60), np.uint8)
        expected[:10, :10] = 1
        np.testing.assert_array_equal(dataset[0].label, expected)
        assert dataset.notes == [
            f"the classes are those of {table}, by the names of the categories",
            "classes that are no category of instances_val2017.json: glove",
            f"1 instances of 1 categories that are not in {table} are background: vest",
        ]
        named = build_dataset("coco", own({7: "person", 3: "vest"}), "val2017", classes=write("c", "other\nperson\n"))
        assert (named.classes, named[0].label.max(), len(named)) == (
            ("other", "person"),
            1,
            2,
        )  # VOC's are no exception

    @pytest.mark.parametrize(
        ("table", "error", "message"),
        [
            ("helmet\nvest\n", ConfigError, "its first class, 'helmet', is a category of .*; write background above"),
            ("background\nglove\n", DataError, "none of its categories, vest, helmet, is a class of .*: glove"),
        ],
    )
    def test_that_are_chosen_must_be_there(self, own, write, table, error, message):
        with pytest.raises(error, match=message):
            CocoDataset(own(OWN), "val2017", classes=write("classes.txt", table))
