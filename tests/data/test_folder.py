"""``folder`` and ``list``: the user's own images."""

import numpy as np
import pytest

from dfn_fast.data.datasets.folder import FolderDataset, held_out, read_classes
from dfn_fast.data.datasets.image_list import ListDataset
from dfn_fast.data.datasets.voc import voc_palette
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import ConfigError, DataError


def fills(dataset):
    return {sample.name: int(sample.label[0, 0]) for sample in (dataset[i] for i in range(len(dataset)))}


class TestFolder:
    def test_splits_by_subfolder_with_nested_folders(self, tmp_path, write, write_pair):
        write_pair("train/images/a.JPG", "train/masks/a.png", fill=1)
        write_pair("train/images/night/a.png", "train/masks/night/a.tif", fill=2)
        write_pair("val/images/c.webp", "val/masks/c.bmp", fill=0)
        write("train/images/.hidden.png", b"")
        write("train/masks/readme.md", "not an image")
        assert fills(FolderDataset(tmp_path, "train", num_classes=3)) == {"a": 1, "night/a": 2}
        assert fills(FolderDataset(tmp_path, "val", num_classes=3)) == {"c": 0}

    def test_one_folder_is_split_by_hash(self, tmp_path, write_pair):
        for name in "abcd":
            write_pair(f"images/{name}.png", f"masks/{name}.png")
        # SHA-256 of "a", "b", "c" and "d" begin with ca978112ca1bbdca, 3e23e8160039594a, 2e7d2c03a9507ae2 and
        # 18ac3e7343f01689: 0, 1, 0 and 4 modulo 5
        assert FolderDataset(tmp_path, "val", num_classes=2).names() == ["a", "c"]
        assert FolderDataset(tmp_path, "train", num_classes=2).names() == ["b", "d"]

    def test_about_a_fifth_is_held_out(self):
        for pattern in ("{:06}", "frame{:04}", "city/img_{}"):
            assert 160 < len(held_out([pattern.format(i) for i in range(1000)])) < 240

    def test_few_images_have_a_val_too(self, tmp_path, write_pair):
        for name in "bd":
            write_pair(f"images/{name}.png", f"masks/{name}.png")
        assert FolderDataset(tmp_path, "val", num_classes=2).names() == ["d"]  # the lower of the two hashes
        assert FolderDataset(tmp_path, "train", num_classes=2).names() == ["b"]

    def test_images_without_a_label_and_the_reverse(self, tmp_path, write_pair):
        for name in "abcdefgh":
            write_pair(f"images/{name}.png", f"masks/{name}.png")
        for name in "abcdefg":
            (tmp_path / "masks" / f"{name}.png").unlink()
        (tmp_path / "images" / "h.png").unlink()
        with pytest.raises(DataError) as caught:
            FolderDataset(tmp_path, "train", num_classes=2)
        text = str(caught.value)
        assert "8 entries or files cannot be used" in text
        assert f"{tmp_path / 'images' / 'a.png'}: no label with this stem" in text
        assert text.endswith("and 3 more")
        assert f"{tmp_path / 'masks' / 'h.png'}: no image with this stem" in caught.value.problems

    @pytest.mark.parametrize(
        ("mask", "hint"),
        [
            ("a.npy", r"; a\.npy is there, but it is no image; save it as PNG"),
            ("a.HEIC", r"; a\.HEIC is there, but HEIC is not read; save it as PNG"),
            ("a_Mask.png", r"; is it a_Mask\.png\? Then give both the same name"),
            ("b.npy", ""),
            ("b.png", ""),
            ("A.PNG", r"; is it A\.PNG\? Then give both the same name"),
        ],
    )
    def test_what_might_have_been_meant_is_told(self, tmp_path, write, write_pair, mask, hint):
        write_pair("images/night/a.png", "masks/c.png")
        (tmp_path / "masks/c.png").unlink()
        write(f"masks/night/{mask}", b"\0\0\0\x18ftypheic" if "HEIC" in mask else np.zeros((4, 6), np.uint8).tobytes())
        if mask.lower().endswith(".png"):
            write(f"masks/night/{mask}", np.zeros((4, 6), np.uint8))
        with pytest.raises(DataError, match=rf"images/night/a\.png: no label with this stem{hint}(\n|$)"):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_an_image_that_is_not_read_is_named(self, tmp_path, write, write_pair):
        write_pair("images/a.png", "masks/a.png")
        (tmp_path / "images/a.png").unlink()
        write("images/a.heic", b"")
        with pytest.raises(DataError, match=r"masks/a\.png: no image with this stem; a\.heic is there, but"):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_files_passed_over_are_noted(self, tmp_path, write, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png")
        for name in ("train/images/notes.md", "train/masks/a.json", "train/masks/._a.png", "train/images/Thumbs.db"):
            write(name, "x")
        images, masks = FolderDataset(tmp_path, "train", num_classes=2).notes
        assert images.startswith("passed over 1 file, ")
        assert images.endswith(f": {tmp_path}/train/images/notes.md")
        assert masks.endswith(f": {tmp_path}/train/masks/a.json")

    def test_names_are_compared_in_one_form(self, tmp_path, write_pair):
        write_pair("train/images/u\u0308ber.png", "train/masks/\u00fcber.png", fill=1)  # as macOS and others write it
        assert fills(FolderDataset(tmp_path, "train", num_classes=2)) == {"\u00fcber": 1}

    @pytest.mark.parametrize("suffix", ["jpg", "webp"])
    def test_lossy_labels_are_refused(self, tmp_path, write_pair, suffix):
        write_pair("images/a.png", f"masks/a.{suffix}")
        with pytest.raises(DataError, match=rf"a\.{suffix}: lossy compression changes class ids"):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_two_files_of_one_stem(self, tmp_path, write_pair):
        write_pair("images/a.png", "masks/a.png")
        write_pair("images/a.jpg", "masks/a.png")
        with pytest.raises(DataError, match=r"a\.png: a\.jpg has the same stem"):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_missing_folders_and_splits(self, tmp_path, write_pair):
        with pytest.raises(DataError, match=r"images: .*is missing. Expected images/ and masks/"):
            FolderDataset(tmp_path, "train", num_classes=2)
        write_pair("train/images/a.png", "train/labels/a.png")
        with pytest.raises(DataError, match=r"train.masks: .*is missing"):
            FolderDataset(tmp_path, "train", num_classes=2)
        with pytest.raises(ConfigError, match="has no split 'val'; it has train"):
            FolderDataset(tmp_path, "val", num_classes=2)

    def test_a_split_without_images_says_how_it_was_made(self, tmp_path, write_pair):
        write_pair("images/a.png", "masks/a.png")
        with pytest.raises(DataError, match=r"split 'train' .* has no images\. There is no split .*: 0 train, 1 val$"):
            FolderDataset(tmp_path, "train", num_classes=2)

    def test_empty(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "masks").mkdir()
        with pytest.raises(DataError, match="split 'train' of data set 'folder' has no images"):
            FolderDataset(tmp_path, "train", num_classes=2)


class TestClasses:
    @pytest.fixture(autouse=True)
    def one_pair(self, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png")

    def test_file_in_root(self, tmp_path, write):
        write("classes.txt", "sky\ntraffic light  250 170 30\nroad\n\n")
        dataset = FolderDataset(tmp_path, "train")
        assert dataset.classes == ("sky", "traffic light", "road")
        np.testing.assert_array_equal(dataset.palette, [[0, 0, 0], [250, 170, 30], voc_palette(3)[2]])

    def test_file_elsewhere_goes_first(self, tmp_path, write):
        write("classes.txt", "a\nb\n")
        other = write("other.txt", "c\nd\ne\n")
        assert FolderDataset(tmp_path, "train", classes=other).classes == ("c", "d", "e")

    def test_number(self, tmp_path):
        dataset = FolderDataset(tmp_path, "train", num_classes=3)
        assert dataset.classes == ("class 0", "class 1", "class 2")
        np.testing.assert_array_equal(dataset.palette, voc_palette(3))

    def test_none_given(self, tmp_path):
        with pytest.raises(ConfigError, match=r"classes\.txt: this file is missing.*--num-classes or --classes"):
            FolderDataset(tmp_path, "train")

    @pytest.mark.parametrize("num_classes", [-1, 0, 1, 256])
    def test_number_out_of_range(self, tmp_path, num_classes):
        with pytest.raises(ConfigError, match=rf"--num-classes {num_classes}: expected 2\.\.255"):
            FolderDataset(tmp_path, "train", num_classes=num_classes)

    def test_number_against_file(self, tmp_path, write):
        write("classes.txt", "a\nb\n")
        with pytest.raises(ConfigError, match=r"--num-classes 3: .*classes\.txt has 2 classes"):
            FolderDataset(tmp_path, "train", num_classes=3)

    def test_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match=r"missing\.txt: expected a text file"):
            FolderDataset(tmp_path, "train", classes=tmp_path / "missing.txt")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a\n\nb\n", r":2: expected a class name.*empty line"),
            ("a\nb\na\n", r":3: class 'a' occurs twice"),
            ("a\nb 0 256 0\n", r":2: expected a colour of 0\.\.255"),
            ("a\n", r"expected 2\.\.255 classes, one per line, got 1"),
        ],
    )
    def test_bad_files(self, write, content, message):
        path = write("classes.txt", content)
        with pytest.raises((ConfigError, DataError), match=rf"classes\.txt.*{message}"):
            read_classes(path)


class TestList:
    def test_paths_are_relative_to_the_list_or_to_root_or_absolute(self, tmp_path, write, write_pair):
        write_pair("root/img/my photo.jpg", "root/lab/a.png", fill=1)
        write_pair("root/lists/near.jpg", "root/lists/near.png", fill=2)
        write_pair("far/b.jpg", "far/b.png", fill=3)
        lines = [
            "# a comment", "img/my photo.jpg\tlab/a.png", "", "near.jpg\tnear.png",
            f"{tmp_path}/far/b.jpg\t{tmp_path}/far/b.png",
        ]  # fmt: skip
        write("root/lists/all.txt", "\n".join(lines))
        dataset = ListDataset(tmp_path / "root", "lists/all.txt", num_classes=4, allow_outside_root=True)
        far = (tmp_path / "far" / "b").relative_to("/").as_posix()
        assert fills(dataset) == {"img/my photo": 1, "lists/near": 2, far: 3}
        list_file = str(tmp_path / "root" / "lists" / "all.txt")
        by_absolute_path = ListDataset(tmp_path / "root", list_file, num_classes=4, allow_outside_root=True)
        assert by_absolute_path.pairs == dataset.pairs

    def test_a_split_is_the_file_of_its_name(self, tmp_path, write, write_pair):
        write_pair("a.jpg", "a.png", fill=1)
        write("train.txt", "a.jpg\ta.png\r\n")
        write("classes.txt", "x\ny\n")
        dataset = ListDataset(tmp_path, "train")
        assert fills(dataset) == {"a": 1}
        assert dataset.classes == ("x", "y")

    def test_missing_list_tells_what_is_there(self, tmp_path, write):
        write("train.txt", "")
        write("classes.txt", "x\ny\n")
        with pytest.raises(
            ConfigError, match=r"trian\.txt: this list does not exist; the root has train; did you mean"
        ):
            ListDataset(tmp_path, "trian")

    def test_wrong_lines_are_all_named(self, tmp_path, write, write_pair):
        write_pair("a.jpg", "a.png")
        write("train.txt", "a.jpg\ta.png\na.jpg a.png\na.jpg\tb.png\na.jpg\ta.png\tx\n\t\n")
        with pytest.raises(DataError) as caught:
            ListDataset(tmp_path, "train", num_classes=2)
        assert [problem.split(": ")[0] for problem in caught.value.problems] == [
            f"{tmp_path}/train.txt:{line}" for line in (2, 3, 4)
        ]
        assert "expected image<TAB>label, got 'a.jpg a.png'" in str(caught.value)
        assert "b.png does not exist" in str(caught.value)

    @pytest.mark.parametrize(
        "line",
        [
            "#1/my photo.jpg\t#1/my photo.png", "#1\\my photo.jpg\t#1\\my photo.png\r",
            "./#1/my photo.jpg \t #1/my photo.png",
            "\ufeff#1/my photo.jpg\t#1/my photo.png",
        ],
    )  # fmt: skip
    def test_names_with_spaces_and_as_comments_and_windows_lists(self, tmp_path, write, write_pair, line):
        write_pair("#1/my photo.jpg", "#1/my photo.png", fill=1)
        write("train.txt", f"{line}\n# a comment\n#2/x.jpg\t#2/x.png\n")
        assert fills(ListDataset(tmp_path, "train", num_classes=2)) == {"#1/my photo": 1}

    def test_letters_may_be_composed(self, tmp_path, write, write_pair):
        write_pair("u\u0308.jpg", "\u00fc.png", fill=1)
        write("train.txt", "\u00fc.jpg\tu\u0308.png\n")
        assert [*fills(ListDataset(tmp_path, "train", num_classes=2)).values()] == [1]

    @pytest.mark.parametrize("data", ["list", "voc", "camvid"])
    def test_a_folder_whose_name_begins_like_the_roots_is_outside(self, tmp_path, write, write_pair, data):
        write_pair("data-secret/train/a.jpg", "data-secret/train/a.png")
        write("data/JPEGImages/x.jpg", b"")
        for path in (f"{tmp_path}/data-secret/train/a", "../data-secret/train/a"):
            line = f"{path}.jpg{chr(9) if data == 'list' else ' '}{path}.png\n"
            write("data/train.txt" if data != "voc" else "data/ImageSets/Segmentation/train.txt", line)
            options = {"num_classes": 2} if data == "list" else {}
            if data == "camvid" and path.startswith("/"):  # looked for below the root
                with pytest.raises(DataError, match=r"/data/train/a\.jpg: this image does not exist"):
                    build_dataset(data, tmp_path / "data", "train")
                continue
            with pytest.raises(DataError, match=rf"{tmp_path}/data-secret/train/a\.jpg is outside of {tmp_path}/data"):
                build_dataset(data, tmp_path / "data", "train", **options)

    def test_an_image_twice(self, tmp_path, write, write_pair):
        write_pair("a.jpg", "a.png")
        write("train.txt", "a.jpg\ta.png\n./a.jpg\ta.png\n")
        with pytest.raises(DataError, match="a second image named 'a'"):
            ListDataset(tmp_path, "train", num_classes=2)

    def test_empty(self, tmp_path, write):
        write("train.txt", "# nothing\n")
        with pytest.raises(DataError, match=r"train\.txt: split 'train' of data set 'list' has no images"):
            ListDataset(tmp_path, "train", num_classes=2)
