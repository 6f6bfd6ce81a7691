"""Data sets by name, joined splits, and wrong images and labels."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.registry import DATASETS, build_dataset
from dfn_fast.errors import ConfigError, DataError

NEEDS_ROOT = [name for name, entry in DATASETS.items() if entry.needs_root]


class TestRegistry:
    def test_unknown_name(self):
        with pytest.raises(ConfigError, match=r"data set 'citiscapes' is not one of .*; did you mean cityscapes"):
            build_dataset("citiscapes", "x", "train")

    @pytest.mark.parametrize("name", NEEDS_ROOT)
    def test_missing_root_shows_the_tree(self, name, tmp_path):
        for root, message in ((None, "--root is missing"), (tmp_path / "none", "--root .*none: no such folder")):
            with pytest.raises(ConfigError, match=f"{message}; expected the folder of data set '{name}'") as caught:
                build_dataset(name, root, "train")
            tree = DATASETS[name].tree.splitlines()
            assert len(tree) >= 4
            assert all(f"  {line}" in str(caught.value) for line in tree)

    @pytest.mark.parametrize("name", ["voc", "cityscapes", "camvid"])
    def test_unknown_split_lists_the_known(self, name, tmp_path):
        with pytest.raises(ConfigError, match=f"data set '{name}' has no split 'trian'; it has train, val.*mean train"):
            build_dataset(name, tmp_path, "val+trian")

    def test_synthetic_takes_no_root(self, tmp_path):
        with pytest.raises(ConfigError, match="data set 'synthetic' has no files; leave the option out, or use voc"):
            build_dataset("synthetic", tmp_path, "train")

    def test_number_of_classes_must_agree(self, tmp_path, write_pair):
        write_pair("val/a.png", "valannot/a.png")
        assert build_dataset("camvid", tmp_path, "val", num_classes=11).num_classes == 11
        with pytest.raises(ConfigError, match="--num-classes 12: data set 'camvid' has 11"):
            build_dataset("camvid", tmp_path, "val", num_classes=12)
        with pytest.raises(ConfigError, match=r"--classes c\.txt: data set 'camvid' has its own classes"):
            build_dataset("camvid", tmp_path, "val", classes="c.txt")

    def test_folder_and_list_get_their_classes(self, tmp_path, write, write_pair):
        write_pair("train/images/a.png", "train/masks/a.png")
        write("train.txt", "train/images/a.png\ttrain/masks/a.png\n")
        classes = write("names.txt", "x\ny\nz\n")
        for name in ("folder", "list"):
            assert build_dataset(name, tmp_path, "train", num_classes=5).num_classes == 5
            assert build_dataset(name, str(tmp_path), "train", classes=classes).classes == ("x", "y", "z")

    def test_home_folder(self, tmp_path, write_pair, monkeypatch):
        write_pair("data/val/a.png", "data/valannot/a.png")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(build_dataset("camvid", "~/data", "val")) == 1

    @pytest.mark.parametrize("name", NEEDS_ROOT)
    def test_every_default_split_is_a_split(self, name):
        entry = DATASETS[name]
        assert not entry.splits or {entry.train, entry.val} <= set(entry.splits)


class TestJoined:
    def test_parts_follow_each_other(self, tmp_path, write_pair):
        for name, split, fill in (("a", "train", 1), ("b", "train", 2), ("c", "val", 3)):
            write_pair(f"{split}/{name}.png", f"{split}annot/{name}.png", fill=fill)
        dataset = build_dataset("camvid", tmp_path, "val+train")
        assert (len(dataset), dataset.split, dataset.name, dataset.num_classes) == (3, "val+train", "camvid", 11)
        assert dataset.names() == ["c", "a", "b"]
        assert [(dataset[i].name, dataset[i].label[0, 0]) for i in range(3)] == [("c", 3), ("a", 1), ("b", 2)]

    def test_names_stay_unique(self, tmp_path, write_pair):
        for split in ("train", "val"):
            write_pair(f"{split}/a.png", f"{split}annot/a.png")
        dataset = build_dataset("camvid", tmp_path, "train+val")
        assert dataset.names() == [dataset[0].name, dataset[1].name] == ["train/a", "val/a"]

    def test_each_part_reads_its_own_labels(self, tmp_path, write):
        frame = "aachen/aachen_000000_000019"
        write(f"leftImg8bit/train/{frame}_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8))
        write(f"gtFine/train/{frame}_gtFine_labelTrainIds.png", np.full((4, 6), 7, np.uint8))
        write(f"gtCoarse/train/{frame}_gtCoarse_labelIds.png", np.full((4, 6), 7, np.uint8))
        dataset = build_dataset("cityscapes", tmp_path, "train+train_coarse")
        assert [dataset[i].label[0, 0] for i in range(2)] == [7, 0]

    def test_a_part_twice(self, tmp_path, write_pair):
        write_pair("train/a.png", "trainannot/a.png")
        with pytest.raises(ConfigError, match="names a part twice"):
            build_dataset("camvid", tmp_path, "train+train")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class TestFiles:
    """One pair of ``folder``, 6 x 4 pixels, 3 classes, with something wrong or unusual about it."""

    @pytest.fixture
    def read(self, tmp_path, write_pair):
        label = write_pair("train/images/a.png", "train/masks/a.png", fill=2)

        def read(image=None, image_suffix=".png", mask=None):
            target = tmp_path / "train" / "images" / "a.png"
            if image is not None:
                target.unlink()
                target = target.with_suffix(image_suffix)
                target.write_bytes(image) if isinstance(image, bytes) else image.save(target)
            if mask is not None:
                label.write_bytes(mask) if isinstance(mask, bytes) else mask.save(label)
            return build_dataset("folder", tmp_path, "train", num_classes=3)[0]

        return read

    @pytest.fixture
    def encoded(self, tmp_path):
        def encoded(suffix) -> bytes:
            path: Path = tmp_path / f"whole{suffix}"
            Image.fromarray(noise(64, 48, 3)).save(path)
            return path.read_bytes()

        return encoded

    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    @pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
    def test_truncated_image(self, read, encoded, suffix, kept):
        whole = encoded(suffix)
        with pytest.raises(DataError, match=rf"a\{suffix}: this image is damaged or truncated"):
            read(whole[: int(len(whole) * kept)], suffix)

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
    def test_no_image_at_all(self, read, content):
        with pytest.raises(DataError, match=r"a\.jpg: this image .* is not in a supported image format"):
            read(content, ".jpg")

    def test_truncated_label(self, read, tmp_path):
        Image.fromarray(noise(64, 48)).save(tmp_path / "whole.png")
        whole = (tmp_path / "whole.png").read_bytes()
        with pytest.raises(DataError, match=r"masks.a\.png: this label is damaged or truncated"):
            read(mask=whole[: len(whole) // 2])

    def test_16_bit_image(self, read):
        with pytest.raises(DataError, match=r"a\.png: expected an image of 8 bits per channel"):
            read(Image.fromarray(np.full((4, 6), 40000, np.uint16)))

    def test_greyscale_image_gets_three_channels(self, read):
        grey = noise(4, 6)
        np.testing.assert_array_equal(read(Image.fromarray(grey)).image, np.stack([grey] * 3, -1))

    def test_alpha_is_dropped(self, read):
        rgba = noise(4, 6, 4)
        np.testing.assert_array_equal(read(Image.fromarray(rgba)).image, rgba[..., :3])

    def test_label_of_another_size(self, read):
        with pytest.raises(DataError, match=r"masks.a\.png: expected a label of the image's size 6x4 .* got 4x6"):
            read(mask=Image.fromarray(np.zeros((6, 4), np.uint8)))

    @pytest.mark.parametrize(
        ("label", "kind"),
        [(noise(4, 6, 3), "RGB"), (noise(4, 6, 4), "RGBA"), (np.full((4, 6), 256, np.uint16), "16-bit")],
        ids=["RGB", "RGBA", "16-bit"],
    )
    def test_label_of_other_channels(self, read, label, kind):
        with pytest.raises(DataError, match=rf"masks.a\.png: expected a label with one 8-bit channel.* got {kind}"):
            read(mask=Image.fromarray(label))

    def test_label_that_is_a_jpeg_by_another_name(self, read):
        content = io.BytesIO()
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(content, "JPEG")
        with pytest.raises(DataError, match=r"masks.a\.png: this label is a JPEG, whose compression changes class ids"):
            read(mask=content.getvalue())

    @pytest.mark.parametrize("value", [3, 254])
    def test_label_value_that_is_no_class(self, read, value):
        labels = np.zeros((4, 6), np.uint8)
        labels[3, 5] = value
        with pytest.raises(DataError, match=rf"masks.a\.png: label values \[{value}\] are not classes of 'folder'"):
            read(mask=Image.fromarray(labels))

    def test_a_good_one(self, read):
        labels = np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8)
        np.testing.assert_array_equal(read(mask=Image.fromarray(labels)).label, labels)
