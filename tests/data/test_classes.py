"""Tables of classes, as users and labelling tools write them, and the palettes of label files."""

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.check import check
from dfn_fast.data.datasets.classes import TABLES, class_table, read_classes, read_table
from dfn_fast.data.datasets.folder import FolderDataset
from dfn_fast.data.datasets.image_list import ListDataset
from dfn_fast.data.datasets.voc import VocDataset, voc_palette
from dfn_fast.errors import ConfigError, DataError

BACKGROUND, CAT = (0, 0, 0), (48, 112, 32)
BOTH = {0: BACKGROUND, 1: CAT}


class TestForms:
    @pytest.mark.parametrize(
        ("text", "names", "colours"),
        [
            ("background\ncat\n", ("background", "cat"), {}),
            ("\ufeffbackground\r\nblack cat  48 112 32 \r\n\r\n", ("background", "black cat"), {1: CAT}),
            ("background,0,0,0\ncat, 48, 112, 32\n", ("background", "cat"), BOTH),
            ("background;0;0;0\ncat;48;112;32\n", ("background", "cat"), BOTH),
            ("background\t0\t0\t0\ncat\t48\t112\t32\n", ("background", "cat"), BOTH),
            ("0 0 0 background\n48 112 32\tblack cat\n", ("background", "black cat"), BOTH),
            ("0,0,0,background\n48,112,32,cat\n", ("background", "cat"), BOTH),
            ('"background"\n"cat, black" 48 112 32\n', ("background", "cat, black"), {1: CAT}),
            ('"sky ""blue""",0,0,0\n"cat, black"\n', ('sky "blue"', "cat, black"), {0: BACKGROUND}),
            ('5" pipe\n"#1"\n', ('5" pipe', "#1"), {}),
            ("# my classes\nbackground\n#\ncat\n", ("background", "cat"), {}),
            ("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:48,112,32:a,b:\n", ("background", "cat"), BOTH),
            ("background:::\na:b:48,112,32::\n", ("background", "a:b"), {1: CAT}),
            ("time 12:30\nkey:value\n", ("time 12:30", "key:value"), {}),
            ("Pixel Value, Class\n0, background\n1, cat\n", ("background", "cat"), {}),
            ("Class,Pixel Value\ncat,1\nbackground,0\nvoid,255\n", ("background", "cat"), {}),
            ("name,r,g,b\nbackground,0,0,0\ncat,48,112,32\n", ("background", "cat"), BOTH),
            ("B;G;R;Class_Name\n0;0;0;background\n32;112;48;cat\n", ("background", "cat"), BOTH),
            ('id,name,r,g,b\n1,"cat, black",48,112,32\n0,sky,0,0,0\n', ("sky", "cat, black"), BOTH),
            ("name r g b\nbackground 0 0 0\ncat 48 112 32\n", ("background", "cat"), BOTH),
            ("1,cat,48,112,32\n0,background,0,0,0\n", ("background", "cat"), BOTH),
            ("1: cat\n0: background\n", ("background", "cat"), {}),
            ("0 background\n1 cat\n255 void\n", ("background", "cat"), {}),
            ("1,cat\n0,background\n", ("background", "cat"), {}),
            ("3 wheeler\ncar\n", ("3 wheeler", "car"), {}),
            ("__ignore__\n_background_\ncat\n", ("_background_", "cat"), {}),
        ],
    )
    def test_are_read_as_what_they_are(self, write, text, names, colours):
        path = write("c", text.encode())
        table = read_table(path)
        assert (table.names, table.colours, table.source) == (names, colours, str(path))
        palette = voc_palette(len(names))
        for i, colour in colours.items():
            palette[i] = colour
        np.testing.assert_array_equal(table.palette, palette)
        assert read_classes(path)[0] == names

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("background,cat,dog\n", r":1: expected a name, or name R G B, .* got 'background,cat,dog'"),
            ("a\ncar, parked\n", r':2: expected a name.*quotes around a name with a comma: "a, b"'),
            ("a\nb,\n", ":2: expected a name"),
            ("filename, a, b\nx.jpg, 0, 1\n", ":1: expected a name"),
            ("class\nbackground\ncat\n", ":1: is 'class' a header or a class"),
            ("names\nbackground\ncat\n", ":1: is 'names' a header or a class"),
            ("#one\n#two\n", ":1: is '#one' a comment or a class"),
            ("a\n[\n", r":2: expected a class name.*got 1 characters: '\['"),
            ("a\nb\x1b[31m\n", r":2: expected a class name"),
            ("a\nb\0\n", r":2: expected a class name"),
            ("a\n" + "b" * 201, r":2: expected a class name.*got 201 characters"),
            ("a\n__ignore__\n", ":2: class '__ignore__' stands only in the first line"),
            ("1 cat\n2 dog\n", r"each of the ids 0\.\.1 once.* got 1, 2"),
            ("Pixel Value, Class\n0, a\n0, b\n", r"each of the ids 0\.\.0 once.* got 0, 0"),
            ("id,name\n0,a\nx,b\n", r"each of the ids 0\.\.0 once.* got 0, x"),
            ("id,name\n0,a\n,b\n", r"got 0, \(none\)"),
            ("name,r,g,b\na,0,0\nb,1,1,1\n", ":2: expected 4 fields as in the header"),
            ("name,r,g,b\na,0,0,0\nb,0,256,0\n", r":3: expected a colour of 0\.\.255, got '0 256 0'"),
            ("name,r,g,b\na,0,0,0\nb,0,0.5,0\n", r":3: expected a colour of 0\.\.255"),
            ("Pixel Value, Class\n0, background\n", r"expected 2\.\.255 classes, one per line, got 1"),
        ],
    )
    def test_others_are_refused_and_never_shifted(self, write, text, message):
        with pytest.raises((ConfigError, DataError), match=rf"classes\.txt.*{message}"):
            read_classes(write("classes.txt", text))


class TestTables:
    @pytest.mark.parametrize("name", TABLES)
    def test_each_is_found_by_its_name(self, tmp_path, write, write_pair, name):
        write_pair("train/images/a.png", "train/masks/a.png")
        write(name, "sky\nroad\n")
        assert FolderDataset(tmp_path, "train").classes == ("sky", "road")
        (tmp_path / name).rename(tmp_path / "train" / name)  # as Roboflow does
        assert FolderDataset(tmp_path, "train").classes == ("sky", "road")

    def test_two_that_agree_are_one(self, tmp_path, write):
        write("classes.txt", "sky\nroad\n")
        write("labelmap.txt", "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:48,112,32::\n")
        table = class_table([tmp_path, tmp_path], None, None)
        assert (table.names, table.palette.tolist()) == (("sky", "road"), [[0, 0, 0], [48, 112, 32]])

    @pytest.mark.parametrize(
        ("other", "text", "difference"),
        [
            ("labelmap.txt", "road:0,0,0::\nsky:1,1,1::\n", "class 0 is 'sky' in one, class 0 is 'road' in the other"),
            ("_classes.csv", "id,name\n0,sky\n1,road\n2,sea\n", "2 classes in one, 3 classes in the other"),
            (
                "class_dict.csv",
                "name,r,g,b\nsky,0,0,0\nroad,5,6,7\n",
                r"class 1 \(road\) has colour \(1, 2, 3\) in one",
            ),
            ("train/_classes.csv", "id,name\n0,road\n1,sky\n", "class 0 is 'sky' in one"),
        ],
    )
    def test_two_that_disagree_are_refused(self, tmp_path, write, write_pair, other, text, difference):
        write_pair("train/images/a.png", "train/masks/a.png")
        write_pair("val/images/a.png", "val/masks/a.png")
        write("classes.txt", "sky\nroad 1 2 3\n")
        write(other, text)
        for split in ("train", "val"):
            with pytest.raises(DataError, match=rf"classes\.txt and .*{other} disagree: {difference}"):
                FolderDataset(tmp_path, split)
        assert FolderDataset(tmp_path, "train", classes=tmp_path / "classes.txt").classes == ("sky", "road")

    def test_a_list_of_images_is_no_table(self, tmp_path, write, write_pair):
        write_pair("a.jpg", "a.png")
        write("classes.txt", "sky\nroad\n")
        write("labels.txt", "a.jpg\ta.png\n")
        assert ListDataset(tmp_path, "labels").classes == ("sky", "road")

    def test_a_table_that_is_no_file_is_named(self, tmp_path):
        (tmp_path / "labelmap.txt").mkdir()
        with pytest.raises(ConfigError, match=r"labelmap\.txt: expected a regular file, got a folder"):
            class_table([tmp_path], None, None)


class TestPalettes:
    """Labels of ids 0, 1 and 2, whose palettes say what each id means to the program that wrote it."""

    IDS = np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8)
    RGB = "0 0 0, 200 30 30, 30 200 30"
    SWAPPED = "0 0 0, 30 200 30, 200 30 30"
    TABLE = "background 0 0 0\nred 200 30 30\ngreen 30 200 30\n"

    @pytest.fixture
    def label(self, tmp_path, write_pair):
        """``label("train", "a", palette)`` writes a pair; the palette has all colours up to 255, or one."""

        def label(split, stem, colours):
            path = write_pair(f"{split}/images/{stem}.png", f"{split}/masks/{stem}.png")
            image = Image.fromarray(self.IDS)
            if colours:
                given = [int(v) for colour in colours.split(",") for v in colour.split()]
                image.putpalette(given + [99] * (768 - len(given)))
            image.save(path)
            return path

        return label

    def read(self, root, split="train", data="folder"):
        if data == "folder":
            dataset = FolderDataset(root, split, num_classes=None if (root / "classes.txt").exists() else 3)
        else:
            stems = sorted(path.stem for path in (root / split / "images").iterdir())
            (root / "list.txt").write_text("".join(f"{split}/images/{s}.png\t{split}/masks/{s}.png\n" for s in stems))
            dataset = ListDataset(root, "list", num_classes=None if (root / "classes.txt").exists() else 3)
        return [dataset[i].label for i in range(len(dataset))]

    @pytest.mark.parametrize("data", ["folder", "list"])
    def test_that_contradict_the_table_are_refused(self, tmp_path, write, label, data):
        write("classes.txt", self.TABLE)
        label("train", "a", self.RGB)
        assert (self.read(tmp_path, data=data)[0] == self.IDS).all()
        path = label("train", "a", self.SWAPPED)
        message = rf"{path}: class id 1 has colour \(30, 200, 30\) .* but \(200, 30, 30\) in {tmp_path}/classes\.txt"
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, data=data)

    @pytest.mark.parametrize("data", ["folder", "list"])
    def test_that_differ_between_files_are_refused(self, tmp_path, label, data):
        first, _, third = (label("train", stem, p) for stem, p in zip("abc", (self.RGB, "", self.SWAPPED), strict=True))
        with pytest.raises(DataError, match=rf"{third}: class id 1 has colour .* in {first}: one id would mean two"):
            self.read(tmp_path, data=data)

    def test_that_differ_between_splits_are_refused_with_the_first_label(self, tmp_path, label):
        label("train", "a", self.RGB)
        label("val", "b", self.SWAPPED)
        for split in ("train", "val"):
            with pytest.raises(DataError, match=r"val.masks.b\.png: class id 1 .* in .*train.masks.a\.png"):
                self.read(tmp_path, split)

    def test_in_any_file_of_two_splits_are_found_by_check(self, tmp_path, label):
        for split, stem in (("train", "a"), ("val", "b")):
            label(split, stem, "")
        label("train", "c", self.RGB)
        label("val", "d", self.SWAPPED)
        report = check("folder", tmp_path, num_classes=3)
        assert [text.count("class id 1 has colour") for text in report.all_problems()] == [1]

    @pytest.mark.parametrize("colours", ["", ", ".join(f"{i} {i} {i}" for i in range(256)), "99 99 99"])
    def test_without_meaning_are_taken_for_ids(self, tmp_path, write, label, colours):
        write("classes.txt", self.TABLE)
        label("train", "a", colours)
        assert (self.read(tmp_path)[0] == self.IDS).all()

    def test_of_one_colour_are_no_exception(self, tmp_path, write, write_pair):
        write("classes.txt", self.TABLE)
        path = write_pair("train/images/a.png", "train/masks/a.png")
        Image.new("RGB", (6, 4), (200, 30, 30)).quantize(3).save(path)
        with pytest.raises(DataError, match=r"class id 0 has colour \(200, 30, 30\)"):
            self.read(tmp_path)

    def test_colours_of_255_and_of_unused_ids_do_not_count(self, tmp_path, write, label):
        write("classes.txt", self.TABLE + "blue 30 30 200\n")
        label("train", "a", self.RGB)  # then 99 99 99, for 3 and for 255
        label("train", "b", self.RGB + ", 5 5 5")
        label("train", "c", self.RGB + ", 7 7 7" * 253)
        assert len(self.read(tmp_path)) == 3

    def test_of_another_order_than_vocs_are_refused(self, tmp_path, write, write_pair):
        path = write_pair("JPEGImages/a.jpg", "SegmentationClass/a.png")
        write("ImageSets/Segmentation/train.txt", "a\n")
        Image.new("RGB", (6, 4), (128, 0, 0)).quantize(3).save(path)  # an aeroplane everywhere
        with pytest.raises(DataError, match=r"class id 0 has colour \(128, 0, 0\) .* in PASCAL VOC"):
            VocDataset(tmp_path, "train")[0]
