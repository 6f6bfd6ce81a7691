"""Masks of your own, in the forms in which programs save them: colours, other depths, other numbers, other names."""

import cv2
import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.check import check
from dfn_fast.data.datasets.classes import read_table
from dfn_fast.data.datasets.folder import FolderDataset
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import ConfigError, DataError

IDS = np.array([[0, 1, 2, 1, 0, 0]] * 3 + [[2, 2, 1, 0, 0, 1]], np.uint8)
COLOURS = np.array([(0, 0, 0), (128, 64, 128), (128, 64, 129)], np.uint8)
TABLES = {
    "classes.txt": "background 0 0 0\nroad 128 64 128\ncar 128 64 129\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\ncar:128,64,129::\n",
    "class_dict.csv": "name,r,g,b\nbackground,0,0,0\nroad,128,64,128\ncar,128,64,129\n",
}


@pytest.fixture
def read(tmp_path, write_pair):
    """``read(mask, data="list", ...)`` is the label of a data set of one pair, whose mask is an array or an image."""

    def read(mask, data="folder", suffix="png", **options):
        path = write_pair("train/images/a.png", "train/masks/a.png")
        path.unlink()
        path = path.with_suffix(f".{suffix}")
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)
        (tmp_path / "train.txt").write_text(f"train/images/a.png\ttrain/masks/{path.name}\n")
        return build_dataset(data, tmp_path, "train", **options)[0].label

    return read


class TestColours:
    @pytest.mark.parametrize("data", ["folder", "list"])
    @pytest.mark.parametrize("table", TABLES)
    def test_of_a_table_become_class_ids(self, read, write, table, data):
        write(table, TABLES[table])
        np.testing.assert_array_equal(read(COLOURS[IDS], data), IDS)
        np.testing.assert_array_equal(read(np.dstack([COLOURS[IDS], np.full(IDS.shape, 255, np.uint8)]), data), IDS)

    def test_of_255_classes_are_exact(self, read, write):
        colours = np.random.default_rng(0).permutation(1 << 24)[:255]
        table = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8)
        write("classes.txt", "".join(f"c{i} {r} {g} {b}\n" for i, (r, g, b) in enumerate(table.tolist())))
        ids = np.random.default_rng(1).integers(0, 255, (4, 6), dtype=np.uint8)
        ids[0, 0] = 254
        np.testing.assert_array_equal(read(table[ids]), ids)

    @pytest.mark.parametrize(
        ("table", "black"),
        [
            ("road 128 64 128\ncar 128 64 129\nVoid 0 0 0\n", 2),  # a class, as the table says
            ("__ignore__ 0 0 0\nroad 128 64 128\ncar 128 64 129\n", 255),
            ("id,name,r,g,b\n0,road,128,64,128\n1,car,128,64,129\n255,void,0,0,0\n", 255),
        ],
    )
    def test_of_void_are_what_the_table_says(self, read, write, table, black):
        write("classes.txt", table)
        np.testing.assert_array_equal(read(COLOURS[IDS]), np.array([black, 0, 1])[IDS])

    @pytest.mark.parametrize("data", ["folder", "list"])
    @pytest.mark.parametrize("void", ["", "__ignore__ 9 9 9\n"])
    def test_outside_of_the_table_are_named(self, tmp_path, read, write, data, void):
        write("classes.txt", void + TABLES["classes.txt"])
        mask = COLOURS[IDS]
        mask[2, 4] = mask[3, 5] = 120, 64, 140
        message = (
            r"masks.a\.png: colour \(120, 64, 140\) at x 4, y 2 is not in .*classes\.txt, as that of 2 pixels in all; "
            r"nearest is \(128, 64, 129\) of class 'car'"
        )
        with pytest.raises(DataError, match=message):
            read(mask, data)
        assert [m for m in check("folder", tmp_path, ["train"]).all_problems() if "at x 4, y 2" in m]

    def test_of_a_class_without_one_are_not_guessed(self, read, write):
        write("classes.txt", "background 0 0 0\nroad 128 64 128\ncar\n")
        with pytest.raises(DataError, match=r"colour \(128, 64, 129\) at x 2, y 0 is not in"):
            read(COLOURS[IDS])

    def test_need_a_table(self, read, write):
        write("classes.txt", "background\nroad\ncar\n")
        message = r"one 8-bit channel .* got RGB, and .*classes\.txt has no colours; .*`name R G B` for each class"
        with pytest.raises(DataError, match=message):
            read(COLOURS[IDS])

    @pytest.mark.parametrize(
        "text",
        ["sky 1 2 3\nroad\ncar 1 2 3\n", "id,name,r,g,b\n0,sky,1,2,3\n1,car,0,0,0\n255,void,1,2,3\n"],
    )
    def test_of_two_classes_at_once_are_refused(self, write, text):
        with pytest.raises(DataError, match=r"classes\.txt: colour 1 2 3 is that of class 0 \(sky\) and of "):
            read_table(write("classes.txt", text))

    def test_of_two_tables_must_differ_too(self, tmp_path, write, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png")
        write("classes.txt", "sky 1 2 3\nroad\n")
        write("labelmap.txt", "sky:::\nroad:1,2,3::\n")
        with pytest.raises(DataError, match=r"colour 1 2 3 is that of class 0 \(sky\) and of class 1 \(road\)"):
            FolderDataset(tmp_path, "train")

    def test_a_note_says_that_they_are_read(self, tmp_path, read, write):
        write("classes.txt", TABLES["classes.txt"])
        for mask, noted in ((COLOURS[IDS], True), (IDS, False)):
            read(mask)
            notes = FolderDataset(tmp_path, "train").notes
            assert any("by the colours in" in note for note in notes) == noted


class TestOtherForms:
    @pytest.mark.parametrize("data", ["folder", "list"])
    @pytest.mark.parametrize(
        ("mask", "suffix"),
        [
            (np.dstack([IDS] * 3), "png"),
            (np.dstack([IDS, np.full(IDS.shape, 255, np.uint8)]), "png"),
            (IDS.astype(np.uint16), "png"),
            (IDS.astype(np.uint16), "tif"),
        ],
        ids=["equal channels", "alpha", "16-bit PNG", "16-bit TIFF"],
    )
    def test_are_read_as_they_are(self, read, mask, suffix, data):
        np.testing.assert_array_equal(read(mask, data, suffix, num_classes=3), IDS)

    def test_one_bit_is_0_and_1(self, read):
        np.testing.assert_array_equal(read(Image.fromarray(IDS == 1), num_classes=2), IDS == 1)

    @pytest.mark.parametrize(
        ("mask", "suffix", "message"),
        [
            (IDS.astype(np.uint16) + 256, "png", r"got 16-bit values of 256\.\.258"),
            (np.dstack([IDS, IDS]), "png", "got LA with 24 transparent pixels"),
            (np.dstack([COLOURS[IDS], IDS]), "png", "got RGBA with 24 transparent pixels"),
            (IDS.astype(np.float32), "tif", "got floating-point"),
            (Image.fromarray(COLOURS[IDS]).convert("CMYK"), "tif", "got CMYK"),
            (Image.fromarray(IDS == 1), "pbm", "stretched to 0..255, or inverted"),
        ],
        ids=["16-bit", "LA", "RGBA", "float", "CMYK", "1 is black"],
    )
    def test_are_refused_by_name(self, read, mask, suffix, message):
        with pytest.raises(DataError, match=rf"a\.{suffix}: expected a label with one 8-bit channel.* {message}"):
            read(mask, suffix=suffix, num_classes=3)

    def test_colours_of_16_bits_are_refused(self, tmp_path, write, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png")
        write("classes.txt", TABLES["classes.txt"])
        cv2.imwrite(str(tmp_path / "train/masks/a.png"), COLOURS[IDS].astype(np.uint16))
        with pytest.raises(DataError, match=r"one 8-bit channel or a palette, got values that are stretched"):
            FolderDataset(tmp_path, "train")[0]


class TestNumbers:
    @pytest.mark.parametrize("data", ["folder", "list"])
    @pytest.mark.parametrize(
        ("options", "classes", "expected"),
        [
            ({"label_offset": -1}, 2, [255, 0, 1, 255]),  # ADE20K: 0 is no label
            ({"ignore_value": 2}, 2, [0, 1, 255, 255]),
            ({"ignore_value": 0, "label_offset": -1}, 2, [255, 0, 1, 255]),
            ({"ignore_value": 255}, 3, [0, 1, 2, 255]),
            ({"label_offset": 2}, 5, [2, 3, 4, 255]),
            ({"label_offset": -2}, 2, [255, 255, 0, 255]),
        ],
    )
    def test_become_class_ids(self, read, data, options, classes, expected):
        mask = np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8)
        label = read(mask, data, num_classes=classes, **options)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, np.array([*expected, *expected[:1] * 2])[None].repeat(4, 0))

    @pytest.mark.parametrize(
        ("options", "classes", "error", "message"),
        [
            ({"ignore_value": 1}, 3, ConfigError, "--ignore-value 1: .* this value is that of class 1"),
            ({"ignore_value": 3, "label_offset": -1}, 3, ConfigError, "this value is that of class 2"),
            ({"ignore_value": 256}, 3, ConfigError, r"--ignore-value 256: expected 0\.\.255"),
            ({"label_offset": 300}, 3, ConfigError, r"--label-offset 300: expected -255\.\.255"),
            ({"label_offset": 1}, 3, DataError, r"values \[2\] are not classes of 'folder'; expected 0\.\.1, or 255"),
            ({"label_offset": 253}, 255, DataError, r"values \[2\] are not classes"),  # 255 is no class either
            ({"label_offset": -1}, 1 + 1, DataError, r"values \[3\] are not classes of 'folder'; expected 1\.\.2"),
        ],
    )
    def test_that_collide_or_are_no_class_are_refused(self, read, options, classes, error, message):
        mask = IDS + (classes == 2)
        with pytest.raises(error, match=message):
            read(mask, num_classes=classes, **options)

    def test_of_colours_make_no_sense(self, read, write):
        write("classes.txt", TABLES["classes.txt"])
        with pytest.raises(DataError, match="--label-offset are for masks of class ids, but this one has the colours"):
            read(COLOURS[IDS], label_offset=-1)

    def test_hold_for_palettes_too(self, read, write):
        write("classes.txt", "road 128 64 128\ncar 128 64 129\n")
        mask = Image.fromarray(IDS)
        mask.putpalette(COLOURS.tobytes())
        np.testing.assert_array_equal(read(mask, label_offset=-1), np.array([255, 0, 1])[IDS])
        mask.putpalette(COLOURS[[0, 2, 1]].tobytes())
        with pytest.raises(DataError, match=r"class id 0 has colour \(128, 64, 129\)"):
            read(mask, label_offset=-1)

    def test_are_told(self, tmp_path, read):
        read(IDS, num_classes=2, label_offset=-1, ignore_value=9)
        notes = FolderDataset(tmp_path, "train", num_classes=2, label_offset=-1, ignore_value=9).notes
        assert notes[-2:] == [
            "value 9 of the masks is ignored",
            "a class id is a mask's value -1; values below 1 are ignored",
        ]
        assert check("folder", tmp_path, ["train"], num_classes=2, label_offset=-1).all_problems() == []

    @pytest.mark.parametrize("options", [{"ignore_value": 3}, {"label_offset": -1}])
    def test_of_other_data_sets_are_fixed(self, options):
        with pytest.raises(ConfigError, match="data set 'synthetic' has its own label values"):
            build_dataset("synthetic", None, "train", **options)


class TestEndings:
    ENDINGS = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_labelIds", ".jpg")

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_of_all_masks_are_dropped_and_told(self, tmp_path, write_pair, ending):
        for i, stem in enumerate(("a", "b_mask", "night/c")):
            write_pair(f"train/images/{stem}.jpg", f"train/masks/{stem}{ending}.png", fill=i)
        dataset = FolderDataset(tmp_path, "train", num_classes=3)
        assert [(s.name, s.label[0, 0]) for s in dataset] == [("a", 0), ("b_mask", 1), ("night/c", 2)]
        (note,) = dataset.notes
        assert note.startswith("masks end in " + (ending if ending != ".jpg" else "the suffix of their image"))
        assert note.endswith(f", as a{ending}.png")

    def test_leave_the_split_as_it_is(self, tmp_path, write, write_pair):
        for name in "abcd":
            write_pair(f"images/{name}.png", f"masks/{name}_gt.png")
        assert FolderDataset(tmp_path, "val", num_classes=2).names() == ["a", "c"]
        write("train.txt", "images/b.png\tmasks/b_gt.png\na.png\n")
        write("val.txt", "d.png\tmasks/d_gt.png\nc\tmasks/c_gt\n")
        assert FolderDataset(tmp_path, "val", num_classes=2).names() == ["c", "d"]
        write("val.txt", "d.png\tmasks/c_gt.png\n")
        with pytest.raises(DataError, match=r"val\.txt:1: .* pairs files of other stems"):
            FolderDataset(tmp_path, "val", num_classes=2)

    def test_give_way_to_exact_stems(self, tmp_path, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png", fill=1)
        assert FolderDataset(tmp_path, "train", num_classes=2)[0].label[0, 0] == 1
        write_pair("train/images/a.png", "train/masks/a_mask.png")
        with pytest.raises(DataError, match=r"a_mask\.png: no image with this stem"):
            FolderDataset(tmp_path, "train", num_classes=2)

    @pytest.mark.parametrize("second", ["a", "b"])
    def test_of_two_kinds_are_refused(self, tmp_path, write_pair, second):
        write_pair("train/images/a.png", "train/masks/a_mask.png")
        write_pair(f"train/images/{second}.png", f"train/masks/{second}_label.png")
        message = rf"masks end in _mask, as a_mask\.png, and in _label, as {second}_label\.png"
        with pytest.raises(DataError, match=message):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_do_not_hide_a_mask_without_an_image(self, tmp_path, write, write_pair):
        write_pair("train/images/a.png", "train/masks/a_mask.png")
        for name in ("b_mask", "b"):
            write(f"train/masks/{name}.png", np.zeros((4, 6), np.uint8))
        with pytest.raises(DataError) as caught:
            FolderDataset(tmp_path, "train", num_classes=2)
        assert [p.count("b_mask.png: no image") + p.count("b.png: no image") for p in caught.value.problems] == [1, 1]
