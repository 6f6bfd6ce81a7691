"""Image files opened for decoding: what their headers say, and whether that can be decoded here."""

import contextlib
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from dfn_fast.errors import DataError
from dfn_fast.files import require_regular
from dfn_fast.media.formats import FORMATS, picture_format
from dfn_fast.media.pixels_only import pixels_only
from dfn_fast.media.tiff import tiff_kind

MAX_PIXELS = 1 << 29  # 23,170 x 23,170
MAX_BYTES = 1 << 32  # while an image is decoded
# Bytes a pixel that a decoder holds beside the image. JPEG: the coefficients, if there are several scans. JPEG2000: 32
# bits a channel, twice. WebP: two canvases and a copy, which stay while the pixels are converted. PPM: in Python.
_SCRATCH = {"jpeg": 8, "jpeg2k": 24, "WEBP": 15, "ppm": 6, "ppm_plain": 6}


@contextlib.contextmanager
def open_image(path: str | Path, what: str = "image") -> Iterator[Image.Image]:
    """Opens an image and reads its header; ``load()`` decodes it. Every failure is a :class:`DataError`."""
    with _naming(path, what), _without_pillows_limit:
        require_regular(path, DataError, what, MAX_BYTES)
        # Given a path, Pillow maps the file. It then misreads a TIFF with an orientation, and a file truncated while
        # it is read kills the process.
        with open(path, "rb") as file:
            size = _webp_size(file)  # to open it, Pillow makes a canvas
            if size:
                _require_size(path, what, size, _decoded_bytes(size, "RGBA", "WEBP"))
            image = Image.open(pixels_only(file, path), formats=FORMATS)
            _require_size(path, what, image.size, decoded_bytes(image))
            yield image


def decoded_bytes(image: Image.Image) -> int:
    """The bytes that decoding an opened image to RGB takes, at most."""
    tile = getattr(image, "tile", None)
    decoder = tile[0][0] if tile else image.format
    several_scans = decoder != "jpeg" or "progressive" in image.info
    return _decoded_bytes(image.size, image.mode, decoder if several_scans else None)


def _decoded_bytes(size: tuple[int, int], mode: str, decoder: str | None) -> int:
    own = 1 if mode in ("1", "L", "P") else 4
    scratch = own if decoder == "libtiff" else _SCRATCH.get(decoder or "", 0)
    return size[0] * size[1] * (own + max(3, scratch))


def _require_size(path: str | Path, what: str, size: tuple[int, int], needed: int) -> None:
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(
            f"{path}: this {what} has {width}x{height} pixels by its header, expected 1 to {MAX_PIXELS}; "
            "is it damaged? If not, cut it into tiles"
        )
    if needed > MAX_BYTES:
        raise DataError(
            f"{path}: this {what} has {width}x{height} pixels by its header, which take {needed / 1e9:.1f} GB while "
            f"they are decoded, expected at most {MAX_BYTES / 1e9:.1f}; cut it into tiles, or save it as PNG"
        )


def _webp_size(file: BinaryIO) -> tuple[int, int] | None:
    """The size of a WebP; None of another file."""
    head = file.read(30)
    file.seek(0)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF


def jpeg2000_bits(image: Image.Image) -> set[int]:
    """How many bits the channels of an opened JPEG 2000 have, more than 128 for signed numbers; none of another file.

    Pillow makes them 8.
    """
    file = getattr(image, "fp", None)
    if image.format != "JPEG2000" or file is None:
        return set()
    begin = file.tell()
    file.seek(0)
    head = file.read(1 << 20)
    file.seek(begin)
    at = head.index(b"\xff\x4f\xff\x51")
    (channels,) = struct.unpack_from(">H", head, at + 40)
    return {(bits & 0x7F) + 1 + (bits & 0x80) for bits in head[at + 42 : at + 42 + 3 * channels : 3]}


class _WithoutLimit(contextlib.AbstractContextManager[None]):
    """Pillow's limit on pixels, a global, is lifted while any thread reads an image: ours is checked instead."""

    def __init__(self) -> None:
        self._lock, self._inside, self._theirs = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._theirs


_without_pillows_limit = _WithoutLimit()


@contextlib.contextmanager
def _naming(path: str | Path, what: str) -> Iterator[None]:
    """Turns any error in the block into a :class:`DataError` that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: this {what} does not exist") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read this {what}") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: {_unread(path, what)}") from None
    except MemoryError as error:
        raise DataError(f"{path}: this {what} does not fit into memory; cut it into tiles, or add memory") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        if kind := tiff_kind(path):
            text = f"{path}: this {what} cannot be decoded ({error}): a {kind}; copy it again, or save it as PNG"
            raise DataError(text) from error
        raise DataError(f"{path}: this {what} is damaged or truncated ({error}); copy or download it again") from error


def _unread(path: str | Path, what: str) -> str:
    """Why Pillow does not open a file: it is in another format, is no picture at all, of an odd kind, or damaged."""
    form = picture_format(path)
    if form not in FORMATS:
        size = Path(path).stat().st_size
        supported = f"is not in a supported image format, {', '.join(FORMATS)}"
        return f"this {what} ({size} bytes) {supported}" + (f", but in {form}; convert it to PNG" if form else "")
    Image.init()
    with open(path, "rb") as file:
        try:
            Image.OPEN[form][0](file, "")
            reason = ""
        except Exception as error:
            reason = f" ({error})"
    kind = tiff_kind(path) or f"{form} that Pillow cannot read"
    return f"this {what} is a {kind}{reason}; if it is whole, save it as PNG, with 8 bits per channel"
