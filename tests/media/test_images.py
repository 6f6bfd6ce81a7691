"""Images and labels as they are brought: odd metadata, kinds of TIFF, sizes, and text that takes long."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dfn_fast.errors import DataError
from dfn_fast.media import images, opening, pixels_only
from dfn_fast.media.images import open_image, orientation, read_image, read_label, write_label
from dfn_fast.media.opening import MAX_BYTES, MAX_PIXELS, decoded_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
NO_EXIF = b"\0\x08\0\2\1\x12\0\3" + bytes(20)


def exif(value):
    result = Image.Exif()
    result[0x0112] = value
    return result


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def jpeg(*segments, progressive=False):
    """A JPEG with segments right behind its beginning."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", progressive=progressive)
    return file.getvalue()[:2] + b"".join(segments) + file.getvalue()[2:]


def tiff(path, data, tags):
    """A little-endian TIFF of one strip with these tags, whose values may be tuples of shorts."""
    tags = {256: data.shape[1], 257: data.shape[0], 259: 1, 278: data.shape[0], 279: data.nbytes, **tags}
    at = 8 + 2 + 12 * (len(tags) + 1) + 4
    directory, more = b"", b""
    for tag, value in sorted({273: 0, **tags}.items()):
        if tag == 273:
            directory += struct.pack("<HHII", tag, 4, 1, at)
        elif isinstance(value, tuple) and len(value) > 2:
            directory += struct.pack("<HHII", tag, 3, len(value), at + data.nbytes + len(more))
            more += struct.pack(f"<{len(value)}H", *value)
        else:
            values = value if isinstance(value, tuple) else (value,)
            kind, code = (3, "H") if max(values) < 65536 else (4, "I")
            directory += struct.pack("<HHI", tag, kind, len(values))
            directory += struct.pack(f"<{len(values)}{code}", *values).ljust(4, b"\0")
    directory = struct.pack("<H", len(tags) + 1) + directory + bytes(4)
    path.write_bytes(b"II*\0\x08\0\0\0" + directory + data.tobytes() + more)
    return path


class TestMetadata:
    def test_a_png_is_its_pixels_whatever_else_it_holds(self, tmp_path):
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "x" * 3_000_000, zip=True)
        kinds = {"text": {"pnginfo": text}, "profile": {"icc_profile": bytes(3_000_000)}, "exif": {"exif": NO_EXIF}}
        for name, options in kinds.items():
            Image.fromarray(PIXELS).save(tmp_path / f"{name}.png", **options)
            np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), PIXELS)
        path = tmp_path / "text.png"
        path.write_bytes(path.read_bytes()[:-70])  # but its pixels still have to be whole
        with pytest.raises(DataError, match=r"text\.png: this image is damaged or truncated"):
            read_image(path)

    def test_a_jpeg_is_its_pixels_whatever_else_it_holds(self, tmp_path):
        plain, odd = tmp_path / "plain.jpg", tmp_path / "odd.jpg"
        plain.write_bytes(jpeg())
        profile = b"ICC_PROFILE\0\1\2" + bytes(99)
        xmp = b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>6"
        parts = [(0xE0, b"JFIF\0"), (0xE0, b"JFXX"), (0xE1, b"Exif\0\0" + NO_EXIF), (0xE1, xmp), (0xE2, profile)]
        for part in [*parts, (0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\0"), (0xFE, b"#")]:
            odd.write_bytes(jpeg(segment(*part)))
            np.testing.assert_array_equal(read_image(odd), read_image(plain))
            odd.write_bytes(jpeg(b"\xff\xff", segment(*part)))  # between segments there may be filling
            np.testing.assert_array_equal(read_image(odd), read_image(plain))

    def test_the_mark_that_says_how_colours_are_meant_is_kept(self, tmp_path):
        Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
        with Image.open(tmp_path / "a.jpg") as image:
            np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.array(image.convert("RGB")))
        plain = jpeg()
        not_ycc = plain[:2] + segment(0xEE, b"Adobe\0d" + bytes(5)) + plain[20:]  # in place of the JFIF segment
        (tmp_path / "a.jpg").write_bytes(not_ycc)
        with Image.open(tmp_path / "a.jpg") as image, Image.open(io.BytesIO(plain)) as other:
            np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.array(image))
            assert not np.array_equal(image, other)

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
    def test_an_orientation_turns_the_pixels_and_is_told(self, tmp_path, form):
        for turn in range(1, 9):
            Image.fromarray(PIXELS).save(tmp_path / "a", form, exif=exif(turn), quality=100)
            with Image.open(tmp_path / "a") as image:
                expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
            remarks = []
            np.testing.assert_array_equal(read_image(tmp_path / "a", remarks), expected)
            assert remarks == (["are turned as their EXIF orientation says"] if turn > 1 else [])
            with open_image(tmp_path / "a") as image:
                assert orientation(image) == turn

    @pytest.mark.parametrize(("kind", "value"), [(3, b"\0\0"), (3, b"\x09\0"), (2, b"6\0"), (7, b"\6\0")])
    def test_an_orientation_that_is_none_turns_nothing(self, tmp_path, kind, value):
        entry = struct.pack("<HHI4s", 0x0112, kind, 1 if kind == 3 else 2, value.ljust(4, b"\0"))
        Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"II*\0\x08\0\0\0\1\0" + entry + bytes(4))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), PIXELS)


class TestTiffs:
    @pytest.mark.parametrize(
        ("bands", "tags", "text"),
        [
            (2, {262: 1}, "a TIFF of 2 bands, 8 bits each, unsigned, photometric MINISBLACK, compression raw"),
            (2, {262: 1, 338: 0}, "a TIFF of 2 bands"),
            (5, {262: 1, 338: (0, 0, 0, 0)}, "a TIFF of 5 bands"),
            (1, {}, "a TIFF of 1 band, 8 bits each, unsigned, photometric None"),
            (1, {262: 1, 339: 2}, "a TIFF of 1 band, 8 bits each, signed"),
            (3, {262: 8}, "a TIFF of 3 bands, 8 bits each, unsigned, photometric CIELAB"),
            (1, {262: 32803}, "photometric colour filter array"),
            (1, {262: 1, 259: 34887}, "compression 34887"),
            (3, {262: 2, 254: 1}, "a camera's raw file"),
            (3, {262: 2, 50706: (1, 4, 0, 0)}, "a camera's raw file"),
        ],
    )
    def test_what_is_no_image_is_named_and_not_called_damaged(self, tmp_path, bands, tags, text):
        bits = (8,) * bands
        path = tiff(tmp_path / "a.tif", np.zeros((5, 6, bands), np.uint8), {258: bits, 277: bands, **tags})
        for read in (read_image, read_label):
            with pytest.raises(DataError, match=r"a\.tif: ") as caught:
                read(path)
            assert "damaged" not in str(caught.value)
            assert text in str(caught.value) or read is read_label

    def test_what_follows_the_first_three_bands_is_left_out_and_told(self, tmp_path):
        data = np.random.default_rng(0).integers(0, 256, (5, 6, 5), dtype=np.uint8)
        tags = {258: (8,) * 5, 277: 5, 262: 2}
        remarks = []
        path = tiff(tmp_path / "a.tif", data, {**tags, 338: (0, 0)})
        np.testing.assert_array_equal(read_image(path, remarks), data[:, :, :3])
        assert remarks == ["have more bands than their colours, which are left out"]
        remarks.clear()
        path = tiff(tmp_path / "a.tif", data[:, :, :4].copy(), {**tags, 258: (8,) * 4, 277: 4, 338: 2})
        np.testing.assert_array_equal(read_image(path, remarks), data[:, :, :3])
        assert remarks == []  # an alpha channel

    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
    def test_zero_may_be_white_in_an_image_but_not_in_a_label(self, tmp_path, compression):
        data = np.arange(30, dtype=np.uint8).reshape(5, 6, 1)
        path = tiff(tmp_path / "a.tif", data, {258: 8, 277: 1, 262: 0})
        with Image.open(path) as image:
            image.save(path, compression=compression, tiffinfo={262: 0})
        np.testing.assert_array_equal(read_image(path), np.repeat(255 - data, 3, 2))
        with pytest.raises(DataError, match=r"got values that are stretched to 0\.\.255, or inverted"):
            read_label(path)

    def test_a_label_that_is_compressed_with_loss_is_refused(self, tmp_path):
        Image.fromarray(PIXELS[:, :, 0]).save(tmp_path / "a.tif", compression="jpeg")
        assert read_image(tmp_path / "a.tif").shape == PIXELS.shape
        with pytest.raises(DataError, match="whose compression changes class ids"):
            read_label(tmp_path / "a.tif")

    def test_smaller_copies_of_a_page_are_no_pages(self, tmp_path):
        page = Image.fromarray(PIXELS[:, :, 0])
        smaller = page.resize((18, 12))
        for kind, others in ((1, 0), (4, 0), (0, 1)):
            smaller.encoderinfo = {"tiffinfo": {254: kind}}
            page.save(tmp_path / "a.tif", save_all=True, append_images=[smaller])
            remarks = []
            np.testing.assert_array_equal(read_image(tmp_path / "a.tif", remarks)[:, :, 0], PIXELS[:, :, 0])
            assert len(remarks) == others
            if not others:
                np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), PIXELS[:, :, 0])

    def test_a_tiff_that_is_cut_is_described(self, tmp_path):
        Image.fromarray(PIXELS).save(tmp_path / "a.tif", compression="tiff_lzw")
        content = (tmp_path / "a.tif").read_bytes()
        (tmp_path / "a.tif").write_bytes(content[:100] + bytes(1000) + content[1100:])
        with pytest.raises(DataError, match=r"a\.tif: this image cannot be decoded .*: a TIFF of 3 bands.*copy it"):
            read_image(tmp_path / "a.tif")

    def test_pixels_beyond_pillows_limit_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        for compression in ("raw", "tiff_lzw"):
            Image.fromarray(PIXELS).save(tmp_path / "a.tif", compression=compression)
            np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), PIXELS)
        with open_image(tmp_path / "a.tif"):
            read_image(tmp_path / "a.tif")  # as another thread does
            assert Image.MAX_IMAGE_PIXELS is None
        assert Image.MAX_IMAGE_PIXELS == 100


def test_more_than_8_bits_of_jpeg_2000_are_refused(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(PIXELS).save(deep, "JPEG2000")
    content = bytearray(deep.getvalue())
    at = content.index(b"\xff\x4f\xff\x51") + 42
    content[at] = content[at + 3] = content[at + 6] = 11  # 12 bits in each channel
    (tmp_path / "a.jp2").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jp2: expected an image of 8 bits per channel"):
        read_image(tmp_path / "a.jp2")


class TestBounds:
    def test_a_webp_of_34_bytes_takes_no_gigabytes(self, tmp_path, monkeypatch):
        path = tmp_path / "a.webp"
        head = b"VP8L" + struct.pack("<IBI", 13, 0x2F, 16382 | 16382 << 14) + bytes(8)
        path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head)) + b"WEBP" + head)
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow makes a canvas"))
        with pytest.raises(DataError, match=r"a\.webp: this image has 16383x16383 pixels .* take 5\.1 GB"):
            read_image(path)

    @pytest.mark.parametrize("kind", [{"lossless": True}, {"lossless": False}, {"exif": exif(6)}])
    def test_the_size_of_every_kind_of_webp_is_known_before_it_is_opened(self, tmp_path, kind):
        Image.fromarray(PIXELS).save(tmp_path / "a.webp", **kind)
        with open(tmp_path / "a.webp", "rb") as file:
            assert opening._webp_size(file) == (36, 24)

    def test_the_bytes_of_every_format_are_bounded(self, tmp_path):
        assert MAX_PIXELS * 8 <= MAX_BYTES  # a TIFF of RGB may have all the pixels that are promised
        expected = {"PNG": 7, "JPEG": 7, "BMP": 7, "TIFF": 7, "PPM": 7, "GIF": 4, "JPEG2000": 28, "WEBP": 19}
        for form, each in expected.items():
            Image.fromarray(PIXELS).save(tmp_path / "a", form)
            with open_image(tmp_path / "a") as image:
                assert decoded_bytes(image) == each * 36 * 24, form
        (tmp_path / "a").write_bytes(jpeg(progressive=True))
        with open_image(tmp_path / "a") as image:
            assert decoded_bytes(image) == 12 * 36 * 24

    def test_pixels_are_converted_band_by_band(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "_BAND", 5 * 36)
        for mode in ("L", "LA", "P", "RGBA", "CMYK"):
            image = Image.fromarray(PIXELS).convert(mode)
            image.save(tmp_path / "a.tif")
            np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.array(image.convert("RGB")))

    def test_a_jpeg_of_many_scans_is_refused(self, tmp_path, monkeypatch):
        path = tmp_path / "a.jpg"
        content = jpeg(progressive=True)
        path.write_bytes(content)
        assert read_image(path).shape == PIXELS.shape
        at = content.rindex(b"\xff\xda")
        for block in (2, 3, 7, 1 << 20):  # no mark is lost between two blocks
            monkeypatch.setattr(pixels_only, "_BLOCK", block)
            assert pixels_only._scans(io.BytesIO(content), 0) == content.count(b"\xff\xda")
        path.write_bytes(content[:at] + content[at:-2] * 200 + content[-2:])
        with pytest.raises(DataError, match=r"a\.jpg: this JPEG has more than 200 scans"):
            read_image(path)

    def test_comments_of_a_text_ppm_take_time_in_proportion(self, tmp_path):
        path = tmp_path / "a.ppm"
        path.write_bytes(b"P3 2#" + b"\n#" * 2_000_000 + b"\n1 255\n1 2 3#4\n 5 6 7\n")
        start = time.perf_counter()
        np.testing.assert_array_equal(read_image(path), [[[1, 2, 3], [5, 6, 7]]])
        assert time.perf_counter() - start < 20  # minutes, where what is left is copied for each


@pytest.mark.parametrize("classes", [2, 254, 255])
def test_a_written_palette_has_the_classes_colours_and_white_for_255(tmp_path, classes):
    palette = np.random.default_rng(0).integers(1, 255, (classes, 3), dtype=np.uint8)
    labels = np.array([[0, classes - 1, 255]], np.uint8)
    write_label(tmp_path / "a.png", labels, palette)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as image:
        table = np.array(image.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(table[:classes], palette)
    np.testing.assert_array_equal(table[classes:255], np.zeros((255 - classes, 3)))
    np.testing.assert_array_equal(table[255], [255, 255, 255])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], [palette[0], palette[-1], [255, 255, 255]])


def test_a_chunk_that_ends_after_the_file_is_damage(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    text = b"tEXt" + b"x" * 20
    chunk = struct.pack(">I", 20) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), PIXELS)
    (tmp_path / "a.png").write_bytes(whole[:33] + b"\x7f" + chunk[1:] + whole[33:])
    with pytest.raises(DataError, match=r"a\.png: this image is"):
        read_image(tmp_path / "a.png")
