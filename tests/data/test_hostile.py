"""Hostile files: false headers, wrong modes, paths that are not files, and lists that lead elsewhere."""

import os
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.check import check
from dfn_fast.data.datasets.camvid import CamVidDataset
from dfn_fast.data.datasets.folder import FolderDataset, held_out
from dfn_fast.data.datasets.image_list import ListDataset
from dfn_fast.data.datasets.voc import VocDataset
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import DataError, UserError
from dfn_fast.media.images import MAX_PIXELS, read_image, read_label
from dfn_fast.media.listing import read_lines


def png(width, height, *, depth=8, colour=0, interlace=0, rows=b"\0\0", chunks=b""):
    """A PNG with a header of one's choice; ``rows`` are the filtered bytes, whatever the header says."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class TestSizes:
    @pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 2**31 - 1), (1, 2**30)])
    def test_a_header_that_promises_gigabytes_is_refused_before_they_are_taken(self, write, size):
        path = write("a.png", png(*size, colour=2))
        for read in (read_image, read_label):
            with pytest.raises(DataError, match=rf"a\.png: this \w+ has {size[0]}x{size[1]} pixels by its header"):
                read(path)

    def test_the_limit_leaves_room_for_aerial_images(self, write):
        assert MAX_PIXELS >= 20_000 * 20_000
        side = 10_000  # more than Pillow's own limit takes without a warning
        rows = (b"\0" + bytes((side + 7) // 8)) * side
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(write("a.png", png(side, side, depth=1, rows=rows))).shape == (side, side, 3)
        assert side * side > Image.MAX_IMAGE_PIXELS  # it is left as others know it

    def test_what_does_not_fit_into_memory_is_named(self, write, monkeypatch):
        def load(image):
            raise MemoryError

        path = write("a.png", noise(4, 6, 3))
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        with pytest.raises(DataError, match=r"a\.png: this image does not fit into memory"):
            read_image(path)

    @pytest.mark.parametrize("content", [png(0, 1), b"P6 0 4 255\n", b"BM" + bytes(60)])
    def test_no_pixels_at_all(self, write, content):
        with pytest.raises(DataError, match=r"a\.png: this image"):
            read_image(write("a.png", content))

    @pytest.mark.parametrize("interlace", [0, 1])
    def test_one_pixel(self, write, interlace):
        path = write("a.png", png(1, 1, rows=b"\0\x07", interlace=interlace))
        assert read_image(path).tolist() == [[[7, 7, 7]]]
        assert read_label(path).tolist() == [[7]]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
class TestNoRegularFiles:
    """Each of these would be waited for without an end."""

    @pytest.fixture(params=["pipe", "socket", "folder", "device"])
    def odd(self, request, tmp_path, monkeypatch):
        path, server = tmp_path / "a.png", None
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            monkeypatch.chdir(tmp_path)  # a socket's path is short
            server = socket.socket(socket.AF_UNIX)
            server.bind("a.png")
        elif request.param == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        yield path, request.param
        if server is not None:
            server.close()

    @pytest.mark.parametrize("read", [read_image, read_label, read_lines])
    def test_are_refused(self, odd, read):
        path, kind = odd
        with pytest.raises(DataError, match=rf"a\.png: expected a regular file, got a {kind}"):
            read(path)

    @pytest.mark.parametrize("odd", ["pipe", "socket", "device"], indirect=True)
    def test_the_check_of_a_data_set_goes_on_after_one(self, odd, tmp_path, write_pair):
        path, kind = odd
        write_pair("train/images/b.png", "train/masks/b.png")
        write_pair("train/images/a.png", "train/masks/a.png")
        os.replace(path, tmp_path / "train" / "images" / "a.png")
        report = check("folder", tmp_path, ["train"], num_classes=2)
        assert [kind in problem for problem in report.all_problems()] == [True]
        assert report.splits[0].sizes.total() == 1


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [("1", [255, 255, 255]), ("LA", [200, 200, 200]), ("CMYK", [55, 155, 245]), ("P", [200, 100, 10])],
    )
    def test_of_images_that_are_converted(self, tmp_path, mode, expected):
        image = Image.new("CMYK" if mode == "CMYK" else "RGB", (6, 4), (200, 100, 10, 0)[: 3 + (mode == "CMYK")])
        if mode == "P":
            image = image.quantize(4)
        elif mode != "CMYK":
            image = Image.new("RGB", (6, 4), (200, 200, 200)).convert(mode)
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        image.save(path)
        assert read_image(path).shape == (4, 6, 3)
        assert read_image(path)[2, 3].tolist() == expected

    def test_of_more_than_8_bits_a_channel_are_refused(self, tmp_path, write):
        deep = {
            "i16.tif": Image.fromarray(np.full((4, 6), 40000, np.uint16)),
            "f.tif": Image.fromarray(np.full((4, 6), 0.5, np.float32)),
            "i32.tif": Image.fromarray(np.full((4, 6), 70000, np.int32)),
        }
        for name, image in deep.items():
            image.save(tmp_path / name)
        write("rgb16.png", png(1, 1, depth=16, colour=2, rows=bytes(7)))
        write("rgba16.png", png(1, 1, depth=16, colour=6, rows=bytes(9)))
        write("la16.png", png(1, 1, depth=16, colour=4, rows=bytes(5)))
        write("rgb16.ppm", b"P6\n1 1\n65535\n" + bytes(6))
        for name in (*deep, "rgb16.png", "rgba16.png", "la16.png", "rgb16.ppm"):
            with pytest.raises(DataError, match=rf"{name}: expected an image of 8 bits per channel"):
                read_image(tmp_path / name)

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (png(8, 1, depth=1, rows=b"\0\x1b"), "1-bit"),
            (png(4, 1, depth=2, rows=b"\0\x1b"), "values that are stretched"),
            (png(4, 1, depth=4, rows=b"\0\x01\x23"), "values that are stretched"),
            (b"P5\n4 1\n20\n\x00\x01\x02\x14", "values that are stretched"),
            (png(1, 1, colour=4, rows=bytes(3)), "LA"),
        ],
        ids=["1 bit", "2 bits", "4 bits", "pgm", "alpha"],
    )
    def test_of_labels_whose_values_are_no_class_ids(self, write, content, kind):
        with pytest.raises(DataError, match=rf"a\.png: expected a label with one 8-bit channel.*, got {kind}"):
            read_label(write("a.png", content))

    def test_the_ids_of_a_palette_of_few_bits_are_kept(self, write):
        palette = struct.pack(">I", 12) + b"PLTE" + bytes(12)
        chunk = palette + struct.pack(">I", zlib.crc32(palette[4:]))
        path = write("a.png", png(4, 1, depth=2, colour=3, rows=b"\0\x1b", chunks=chunk))
        assert read_label(path).tolist() == [[0, 1, 2, 3]]

    @pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
    def test_of_several_frames_the_first_is_the_image_and_none_is_the_label(self, tmp_path, suffix):
        frames = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (10, 200)]
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert read_image(path).tolist() == np.full((4, 6, 3), 10).tolist()
        with pytest.raises(DataError, match="expected one label, got several frames"):
            read_label(path)

    def test_exif_turns_images_and_labels_alike(self, tmp_path):
        pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: to be shown turned by 90 degrees
        for name in ("a.png", "a.tif"):
            Image.fromarray(pixels).save(tmp_path / name, exif=exif)
            np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], np.rot90(pixels, -1))
            np.testing.assert_array_equal(read_label(tmp_path / name), np.rot90(pixels, -1))

    def test_a_document_that_another_program_would_run_is_no_image(self, write, monkeypatch):
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
        with pytest.raises(DataError, match=r"a\.jpg: this image .* is not in a supported image format"):
            read_image(write("a.jpg", content))

    def test_every_cut_of_a_jpeg_and_a_png_is_an_error(self, tmp_path):
        for name in ("a.jpg", "a.png"):
            path = tmp_path / name
            Image.fromarray(noise(16, 16, 3)).save(path)
            whole = path.read_bytes()
            for length in range(0, len(whole) - 30, 7):  # the last bytes hold no pixels
                path.write_bytes(whole[:length])
                with pytest.raises(DataError, match=name.replace(".", r"\.")):
                    read_image(path)


NAMES = ["my photo (1)", "straße, 東京 – 🚗", "a;b&c|d$e'f", "x\u2028y\x85z", "tab\u00a0", "%s {0}", "-rf"]


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_any_name_serves_in_folders_and_lists(self, tmp_path, write, write_pair, name):
        write_pair(f"train/images/{name}/{name}.png", f"train/masks/{name}/{name}.png", fill=1)
        folder = FolderDataset(tmp_path, "train", num_classes=2)
        write("all.txt", f"train/images/{name}/{name}.png\ttrain/masks/{name}/{name}.png\n")
        listed = ListDataset(tmp_path, "all.txt", num_classes=2)
        assert folder.names() == [f"{name}/{name}"]
        assert listed.names() == [f"train/images/{name}/{name}"]
        assert folder[0].label.max() == listed[0].label.max() == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="other file systems have no such names")
    def test_a_name_that_is_no_text_serves_and_is_shown(self, tmp_path, write_pair):
        name = os.fsdecode(b"caf\xe9")
        write_pair(f"images/{name}.png", f"masks/{name}.png")
        write_pair("images/b.png", "masks/b.png", fill=9)
        os.truncate(tmp_path / "images" / f"{name}.png", 30)
        assert held_out([name, "b"])
        command = [sys.executable, "-m", "dfn_fast.data", "check", "folder", "--root", tmp_path, "--num-classes", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1, done.stderr
        assert r"caf\udce9.png: this image" in done.stdout

    def test_a_long_line_is_cut_in_the_text(self, tmp_path, write):
        for line in ("a" * 10**6, "a/" * 10**5 + "\tb", "\0", "/x/a\0/b.png /y/d.png"):
            write("train.txt", line)
            for name, options in (("list", {"num_classes": 2}), ("camvid", {})):
                with pytest.raises(DataError, match=r"train\.txt") as caught:
                    build_dataset(name, tmp_path, "train", **options)
                assert len(str(caught.value)) < 1000


class TestOutsideRoot:
    """A list, be it in the root or not, names only files below the root unless that is allowed."""

    @pytest.fixture
    def root(self, tmp_path, write, write_pair):
        write_pair("far/a.jpg", "far/a.png", fill=1)
        write_pair("root/img/b.jpg", "root/lab/b.png", fill=2)
        (tmp_path / "root" / "JPEGImages").mkdir()
        return tmp_path / "root"

    @pytest.mark.parametrize("image", ["../far/a.jpg", "img/../../far/a.jpg", "{far}/a.jpg", "{root}/../far/a.jpg"])
    @pytest.mark.parametrize("name", ["list", "camvid", "voc"])
    def test_is_refused_with_file_and_line_or_allowed(self, root, write, name, image):
        file = "root/ImageSets/Segmentation/train.txt" if name == "voc" else "root/train.txt"
        far = image.format(far=root.parent / "far", root=root)
        separator = "\t" if name == "list" else " "
        write(file, f"# comment\nimg/b.jpg{separator}lab/b.png\n{far}{separator}{far[:-4]}.png\n")
        options = {"num_classes": 3} if name == "list" else {}
        if name == "camvid" and image.startswith("{"):  # another machine's path: looked for below the root
            text = r"train\.txt(.|\n)*root/far/a\.jpg: this image does not exist"
        else:
            text = rf"train\.txt:3: .*a\.jpg is outside of {root}; .*--allow-outside-root"
        with pytest.raises(DataError, match=text):
            build_dataset(name, root, "train", **options)
        dataset = build_dataset(name, root, "train", **options, allow_outside_root=True)
        assert [dataset[i].label.max() for i in range(2)] == [2, 1]

    def test_labels_too(self, root, write):
        write("root/train.txt", "img/b.jpg\t../far/a.png\n")
        with pytest.raises(DataError, match=r"train\.txt:1: .*a\.png is outside of"):
            ListDataset(root, "train", num_classes=3)

    def test_what_is_outside_is_not_even_looked_for(self, root, write, monkeypatch):
        asked = []
        isfile = os.path.isfile
        monkeypatch.setattr(os.path, "isfile", lambda path: (asked.append(str(path)), isfile(path))[1])
        write("root/train.txt", "../far/a.jpg\t/etc/passwd\n")
        with pytest.raises(DataError):
            ListDataset(root, "train", num_classes=3)
        assert not [path for path in asked if "far" in path or "passwd" in path]

    def test_a_list_elsewhere_names_files_of_the_root(self, root, write):
        far_list = write("far/all.txt", "img/b.jpg\tlab/b.png\n")
        assert ListDataset(root, str(far_list), num_classes=3)[0].label.max() == 2
        write("far/all.txt", "a.jpg\ta.png\n")
        with pytest.raises(DataError, match=r"all\.txt:1: .*far/a\.jpg is outside of"):
            ListDataset(root, str(far_list), num_classes=3)

    def test_a_link_in_the_root_is_followed(self, root, write):
        (root / "link").symlink_to(root.parent / "far")
        write("root/train.txt", "link/a.jpg\tlink/a.png\n")
        assert ListDataset(root, "train", num_classes=3)[0].label.max() == 1

    def test_ids_are_paths_too(self, root, write):
        write("root/ImageSets/Segmentation/train.txt", "../../far/a\n")
        with pytest.raises(DataError, match=r"train\.txt:1: .* is outside of"):
            VocDataset(root, "train")

    def test_original_camvid_lists_still_work(self, root, write_pair, write):
        write_pair("root/train/c.png", "root/trainannot/c.png", fill=3)
        write("root/train.txt", "/SegNet/CamVid/train/c.png /SegNet/CamVid/trainannot/c.png\n")
        assert CamVidDataset(root, "train")[0].label.max() == 3
        write("root/train.txt", "/SegNet/../c.png /SegNet/../c.png\n")
        with pytest.raises(DataError, match=r"train\.txt:1: .* is outside of"):
            CamVidDataset(root, "train")


def test_a_table_of_classes_takes_time_in_proportion(tmp_path, write):
    """A pattern that goes back for each space would take hours."""
    path = write("classes.txt", "road" + " " * 300_000 + "x\nsky 1 2 " + "9" * 5000 + "\n")
    done = []
    reading = threading.Thread(target=lambda: done.append(error_of(path, tmp_path)), daemon=True)
    reading.start()
    reading.join(60)
    assert done
    assert "classes.txt:1: expected a class name" in done[0]
    write("classes.txt", "road\nsky 1 2 " + "9" * 5000 + "\n")
    assert "classes.txt:2: expected a colour of 0..255" in error_of(path, tmp_path)


def error_of(path, root):
    with pytest.raises(UserError) as caught:
        FolderDataset(root, "train", classes=path) if (root / "images").is_dir() else _classes(path)
    return str(caught.value)


def _classes(path):
    from dfn_fast.data.datasets.folder import read_classes

    return read_classes(path)
