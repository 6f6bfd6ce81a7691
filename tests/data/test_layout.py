"""Splits of ``folder``: the user's own are kept, in whatever way they are given, and what is chosen instead is told."""

import itertools
import os

import pytest

from dfn_fast.data.datasets.folder import FolderDataset
from dfn_fast.data.datasets.layout import held_out_folders
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import ConfigError, DataError


@pytest.fixture
def pairs(write_pair):
    """``pairs("train/a", "b", home="x/")`` writes x/images/train/a.png, x/masks/train/a.png and so on."""

    def pairs(*stems, home=""):
        for stem in stems:
            write_pair(f"{home}images/{stem}.png", f"{home}masks/{stem}.png")

    return pairs


def names(root, split):
    return FolderDataset(root, split, num_classes=2).names()


def note(root, split="train"):
    return " ".join(FolderDataset(root, split, num_classes=2).notes)


class TestFoldersOfSplits:
    @pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "val2017", "validation_set"])
    @pytest.mark.parametrize("train", ["train", "Training", "train-images"])
    def test_below_images_and_masks(self, tmp_path, pairs, train, val):
        pairs(*(f"{train}/{i}" for i in range(7)), *(f"{val}/{i}" for i in range(3)), f"{val}/night/3")
        assert names(tmp_path, "train") == [f"{train}/{i}" for i in range(7)]
        assert names(tmp_path, "val") == [*(f"{val}/{i}" for i in range(3)), f"{val}/night/3"]
        for split in ("train", "val"):
            assert note(tmp_path, split) == f"The split is that of the folders in {tmp_path}/images: 7 train, 4 val"

    def test_further_down(self, tmp_path, pairs):
        pairs("cam1/train/a", "cam2/train/a", "cam1/val/a")
        assert names(tmp_path, "train") == ["cam1/train/a", "cam2/train/a"]
        assert names(tmp_path, "val") == ["cam1/val/a"]

    @pytest.mark.parametrize("val", ["val", "valid", "Validation", "val_2"])
    def test_above_images_and_masks(self, tmp_path, pairs, val):
        pairs("a", "b", home="train/")
        pairs("c", home=f"{val}/")
        assert names(tmp_path, "train") == ["a", "b"]
        assert names(tmp_path, "val") == ["c"]
        assert note(tmp_path, "val") == ("" if val == "val" else f"Split val is folder {val}: 1 images")

    @pytest.mark.parametrize("images", ["test/images/x.png", "images/test/x.png"])
    def test_one_without_labels_does_not_disturb_the_others(self, tmp_path, pairs, write_pair, images):
        home = "{}/" if images.startswith("test") else ""
        for split in ("train", "val"):
            pairs("a" if home else f"{split}/a", home=home.format(split))
        write_pair(images, "elsewhere.png")
        assert len(names(tmp_path, "train")) == len(names(tmp_path, "val")) == 1
        with pytest.raises(DataError, match=r"x\.png: no label|test.masks: the folder of the masks is missing"):
            names(tmp_path, "test")
        write_pair(images, images.replace("images", "masks"))
        assert len(names(tmp_path, "test")) == 1

    def test_files_without_a_partner_are_told_by_their_own_split(self, tmp_path, pairs):
        pairs("train/a", "train/b", "val/c", "val/d")
        (tmp_path / "images/train/a.png").unlink()
        (tmp_path / "masks/train/b.png").unlink()
        with pytest.raises(DataError, match=r"2 entries(.|\n)*b\.png: no label(.|\n)*a\.png: no image"):
            names(tmp_path, "train")
        assert names(tmp_path, "val") == ["val/c", "val/d"]

    @pytest.mark.parametrize("home", ["images", "train"])
    def test_train_alone_has_no_val(self, tmp_path, pairs, home):
        pairs(*(["train/a"] if home == "images" else ["a"]), home="" if home == "images" else "train/")
        assert len(names(tmp_path, "train")) == 1
        with pytest.raises(
            ConfigError, match=r"has no split 'val'; it has train; .*keep all images in images/ without"
        ):
            names(tmp_path, "val")


class TestContradictions:
    @pytest.mark.parametrize("odd", ["z", "night/z", "train/val/z"])
    def test_images_in_no_split_or_in_two(self, tmp_path, pairs, odd):
        pairs("train/a", "val/b", odd)
        with pytest.raises(DataError, match=f"images: 1 images lie in the folder of no split or of two, such as {odd}"):
            names(tmp_path, "train")

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_images_in_the_root_and_in_a_split(self, tmp_path, pairs, split):
        pairs("a")
        pairs("b", home=f"{split}/")
        with pytest.raises(DataError, match=rf"{tmp_path}/images and {tmp_path}/{split}/images both hold images"):
            names(tmp_path, "train")

    def test_two_folders_of_one_split(self, tmp_path, pairs):
        for home in ("train/", "val/", "valid/"):
            pairs("a", home=home)
        with pytest.raises(DataError, match=f"{tmp_path}/val and {tmp_path}/valid are the same split"):
            names(tmp_path, "val")
        assert names(tmp_path, "valid") == names(tmp_path, "train") == ["a"]

    @pytest.mark.parametrize("name", ["trains", "value", "contest", "my train", "fold1"])
    def test_other_names_are_no_splits(self, tmp_path, pairs, name):
        pairs(f"{name}/a", "b", "c")
        assert "whole folders, chosen by a hash" in note(tmp_path)
        pairs("d", home=f"root/{name}/")
        assert names(tmp_path / "root", name) == ["d"]
        with pytest.raises(ConfigError, match=f"has no split 'train'; it has {name}"):
            names(tmp_path / "root", "train")

    def test_a_third_folder_is_passed_over_and_told(self, tmp_path, pairs):
        pairs(*"abcd")
        pairs("a", "e", home="old/")
        pairs("a", "e", home=".cache/")
        assert names(tmp_path, "train") + names(tmp_path, "val") == ["b", "d", "a", "c"]
        assert f" {tmp_path}/old/images: passed over" in note(tmp_path)
        assert names(tmp_path, "old") == ["a", "e"]
        assert note(tmp_path, "old") == ""

    def test_a_folder_of_test_images_is_a_split_beside_one_that_is_chosen(self, tmp_path, pairs):
        pairs(*"abcd")
        pairs("e", home="testing/")
        assert names(tmp_path, "train") == ["b", "d"]
        assert names(tmp_path, "test") == ["e"]
        with pytest.raises(ConfigError, match="has no split 'extra'; it has train, val"):
            names(tmp_path, "extra")

    def test_another_split_may_be_broken_and_a_backup_have_other_classes(self, tmp_path, pairs, write):
        for home in ("train/", "val/", "backup/"):
            pairs("a", "b", home=home)
        pairs("c")
        (tmp_path / "images/c.png").rename(tmp_path / "val/masks/a.tif")
        (tmp_path / "masks/c.png").unlink()
        write("classes.txt", "x\ny\n")
        write("backup/classes.txt", "y\nx\n")
        assert FolderDataset(tmp_path, "train").names() == ["a", "b"]
        with pytest.raises(DataError, match=r"a\.tif: a\.png has the same stem"):
            FolderDataset(tmp_path, "val")

    def test_an_empty_folder_in_the_root_hides_nothing(self, tmp_path, pairs):
        (tmp_path / "images").mkdir()
        pairs("a", home="train/")
        assert names(tmp_path, "train") == ["a"]

    def test_a_missing_folder_is_told_with_what_is_there(self, tmp_path, pairs):
        pairs("a")
        os.rename(tmp_path / "masks", tmp_path / "Masks")
        with pytest.raises(DataError, match=r"the folder of the masks is missing.*; found Masks, images"):
            names(tmp_path, "train")


class TestLists:
    @pytest.fixture(autouse=True)
    def six(self, pairs):
        pairs("a", "b", "c", "night/d", "night/e", "night/f")

    @pytest.mark.parametrize(
        "line", ["night/e", "night/e.png", "images/night/e.png", "./night/e", "/home/me/images/night/e.png",
                 "night\\e.png", "images/night/e.png\tmasks/night/e.png", "\ufeffnight/e.png\r"]
    )  # fmt: skip
    def test_go_before_a_hash(self, tmp_path, write, line):
        write("train.txt", "a\nb.png\n")
        write("valid.txt", f"{line}\n")
        assert (names(tmp_path, "train"), names(tmp_path, "val")) == (["a", "b"], ["night/e"])
        expected = f"The split is that of train.txt, valid.txt in {tmp_path}, which leave out 3 images: 2 train, 1 val"
        assert note(tmp_path) == expected

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("e.png", r"train\.txt:2: e\.png is no image in .*images"),
            ("a.png\tmasks/b.png", r"train\.txt:2: .* pairs files of other stems; read it with --data list"),
        ],
    )
    def test_wrong_lines(self, tmp_path, write, line, message):
        write("train.txt", f"a\n{line}\n")
        with pytest.raises(DataError, match=message):
            names(tmp_path, "train")

    def test_one_alone_two_of_a_split_and_an_image_in_both(self, tmp_path, write):
        write("train.txt", "a\n")
        with pytest.raises(ConfigError, match="has no split 'val'; it has train"):
            names(tmp_path, "val")
        write("val.txt", "a\nb\n")
        assert "which name 1 images more than once: 1 train, 2 val" in note(tmp_path)
        write("valid.txt", "b\n")
        with pytest.raises(DataError, match=r"val\.txt and .*valid\.txt are the same split"):
            names(tmp_path, "val")

    def test_what_they_leave_out_need_not_be_whole(self, tmp_path, write):
        write("train.txt", "a\n")
        (tmp_path / "masks/b.png").unlink()
        (tmp_path / "images/c.png").unlink()
        assert names(tmp_path, "train") == ["a"]

    def test_one_of_test_images_alone_is_no_split(self, tmp_path, write):
        write("test.txt", "whatever\n")
        assert "There is no split" in note(tmp_path)

    def test_beside_folders_of_splits_they_are_passed_over(self, tmp_path, write, pairs):
        write("root/train.txt", "q\n")
        pairs("p", home="root/train/")
        assert names(tmp_path / "root", "train") == ["p"]
        assert "train.txt: passed over, the split is by folders" in note(tmp_path / "root")


class TestChosen:
    def test_by_name_in_one_folder(self, tmp_path, pairs):
        pairs(*"abcd")
        assert note(tmp_path, "val") == (
            f"There is no split in {tmp_path}/images, so about every fifth image, chosen by a hash of its name, is val "
            "(to choose, make images/train and images/val): 2 train, 2 val"
        )

    def test_an_image_may_be_called_as_a_split(self, tmp_path, pairs):
        pairs("train", "val", "a", "b")
        assert len(names(tmp_path, "train")) + len(names(tmp_path, "val")) == 4

    def test_images_of_one_folder_stay_together(self, tmp_path, pairs):
        folders = ["", "day", "night", "night/rain", "fog", "snow"]
        pairs(*(os.path.join(folder, str(i)) for folder, i in itertools.product(folders, range(4))))
        train, val = (names(tmp_path, split) for split in ("train", "val"))
        assert len(train) + len(val) == 24
        assert 0 < len(val) < len(train)
        assert not {os.path.dirname(name) for name in train} & {os.path.dirname(name) for name in val}
        of_val = ", ".join(sorted({os.path.dirname(name) for name in val}))
        assert f"whole folders, chosen by a hash of their names, are val: {of_val}" in note(tmp_path)
        assert f": {len(train)} train, {len(val)} val" in note(tmp_path)

    def test_a_fifth_of_the_folders_but_never_most_of_the_images(self):
        # a and c are divisible by 5, b and d are not (tests/data/test_folder.py)
        assert held_out_folders({"a": 2, "b": 3, "c": 1, "d": 3}) == {"a", "c"}
        assert held_out_folders({"a": 90, "b": 10, "c": 10, "d": 5}) == {"d"}
        assert held_out_folders({"a": 1, "c": 1}) == {"a"}
        assert 140 < len(held_out_folders({f"seq{i}": 1 for i in range(1000)})) < 260

    def test_joined_splits_say_it_once(self, tmp_path, pairs):
        pairs(*"abcd")
        dataset = build_dataset("folder", tmp_path, "train+val", num_classes=2)
        assert len(dataset.notes) == 1
        assert build_dataset("synthetic", None, "train+val").notes == []
