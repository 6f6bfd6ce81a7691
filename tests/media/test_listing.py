"""Images of a folder: which files count as images, links, names, and what is said of the others."""

import os
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dfn_fast.errors import DataError
from dfn_fast.media.formats import FORMATS, picture_format
from dfn_fast.media.listing import find_images

HEIC = b"\0\0\0\x18ftypheic" + bytes(100)


def touch(*paths, content=b""):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("form", FORMATS)
def test_what_can_be_read_is_an_image_under_any_suffix(tmp_path, form):
    for name in ("a", "b.dat", "c.JPG_original"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / name, form)
    assert picture_format(tmp_path / "a") == form
    found = find_images(tmp_path)
    assert list(found.files) == ["a", "b", "c"]
    assert (found.passed_over, found.note) == ([], "")


def test_old_and_new_bitmaps_and_big_tiffs_are_told(tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a", "TIFF", big_tiff=True)
    assert picture_format(tmp_path / "a") == "TIFF"
    for header_bytes in (12, 40, 64, 108, 124):
        touch(tmp_path / "b", content=b"BM" + struct.pack("<IHHII", 99, 0, 0, 54, header_bytes) + bytes(99))
        assert picture_format(tmp_path / "b") == "BMP"


def test_pictures_that_cannot_be_read_are_told_from_other_files(tmp_path):
    pictures = {"a.bin": (HEIC, "HEIC"), "b.psd": (b"8BPS", "PSD"), "c.Heic": (b"", "HEIC"), "d.tga": (b"x", "TGA")}
    others = {"notes.md": b"BMP, P5 and GIF8 are formats", "x.npy": b"\x93NUMPY", "y.txt": b"P6 is one", "z.mp4": b""}
    for name, content in {**{n: c for n, (c, _) in pictures.items()}, **others}.items():
        touch(tmp_path / name, content=content)
    for name in (*pictures, *others):
        assert picture_format(tmp_path / name) == pictures.get(name, (b"", ""))[1], name
    found = find_images(tmp_path)
    assert found.files == {}
    assert found.passed_over == [tmp_path / name for name in sorted((*pictures, *others))]
    assert "passed over 8 files" in found.note
    assert f"{tmp_path}/notes.md" in found.note


def test_what_file_managers_leave_is_passed_over_without_a_word(tmp_path):
    for name in ("._a.png", ".hidden/a.png", "@eaDir/a.png", "__MACOSX/a.png", "Thumbs.db", "sub/desktop.ini"):
        touch(tmp_path / name)
    touch(tmp_path / "sub" / "a.png")
    assert find_images(tmp_path, nested=True) == ({"sub/a": tmp_path / "sub" / "a.png"}, [])
    assert find_images(tmp_path) == ({}, [tmp_path / "sub"])  # a folder that was not asked for


def test_names_are_compared_in_nfc(tmp_path):
    name = "Straße-Zürich"
    touch(tmp_path / f"{unicodedata.normalize('NFD', name)}_x.png")
    ((stem, path),) = find_images(tmp_path, ending="_x").files.items()
    assert stem == unicodedata.normalize("NFC", name)
    assert path.exists()


def test_of_two_files_with_one_stem_the_suffix_decides_or_none(tmp_path):
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.jpg_original", "JPEG")
    found = find_images(tmp_path)
    assert found == ({"a": tmp_path / "a.jpg"}, [tmp_path / "a.jpg_original"])
    image.save(tmp_path / "a.gif")
    with pytest.raises(DataError, match=r"a\.jpg: a\.gif has the same stem"):
        find_images(tmp_path)


def test_a_file_that_is_all_ending_has_no_name(tmp_path):
    touch(tmp_path / "_x.png", tmp_path / "a_x.png", tmp_path / "b.png")
    assert find_images(tmp_path, ending="_x") == ({"a": tmp_path / "a_x.png"}, [tmp_path / "_x.png"])


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path / "in" / "day" / "a.png", tmp_path / "disk" / "b.png", tmp_path / "disk" / "deep" / "c.png")
    os.symlink(tmp_path / "disk", tmp_path / "in" / "night")
    circles = {"in/self": "self", "in/up": ".", "in/day/up": "..", "disk/deep/back": str(tmp_path / "in")}
    for link, target in circles.items():
        os.symlink(target, tmp_path / link)
    expected = ["day/a", "night/b", "night/deep/c"]
    found = find_images(tmp_path / "in", nested=True)
    assert list(found.files) == expected
    assert found.passed_over == [tmp_path / "in" / "self"]  # leads nowhere
    os.rename(tmp_path / "in" / "night", tmp_path / "in" / "again")
    assert list(find_images(tmp_path / "in", nested=True).files) == ["again/b", "again/deep/c", "day/a"]


def test_links_that_lead_to_each_other_end(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in "abcdef"]
    for folder in folders:
        touch(folder / "x.png")
        for other in folders:
            os.symlink(other, folder / f"to_{other.name}")
    files = find_images(tmp_path, nested=True).files
    assert {"a/x", "a/to_b/x", "a/to_b/to_c/x", "f/to_e/to_d/to_c/to_b/to_a/x"} <= set(files)
    assert not any("to_a" in stem for stem in files if stem.startswith("a/"))
    monkeypatch.setattr("dfn_fast.media.listing.MAX_FOLDERS", 1000)
    with pytest.raises(DataError, match="more than 1000 folders below it"):
        find_images(tmp_path, nested=True)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "deep" / "a.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"deep: this folder cannot be read \(Permission denied\)"):
        find_images(tmp_path, nested=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.dat")
    assert find_images(tmp_path) == ({}, [tmp_path / "a.dat"])
