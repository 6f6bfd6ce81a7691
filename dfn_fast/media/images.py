"""Image and label files: the only place that decodes and encodes them. Its errors name the file.

Images are ``[H, W, 3]`` RGB uint8, labels ``[H, W]`` uint8. Pillow decodes, because it refuses truncated files, and
because it reads and writes the indices of a palette PNG; OpenCV would return the colours.
"""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dfn_fast.errors import DataError
from dfn_fast.files import replacing, require_regular
from dfn_fast.media.formats import FORMATS, picture_format

IGNORE = 255

MAX_PIXELS = 1 << 29  # 23,170 x 23,170: RGB pixels take 2 GiB while they are decoded
_KINDS = {"1": "1-bit", "I;16": "16-bit", "I": "32-bit", "F": "floating-point"}


def read_image(path: str | Path) -> np.ndarray:
    """The image as ``[H, W, 3]`` RGB uint8, turned by its EXIF orientation, as viewers show it.

    Greyscale and palette images get three channels, CMYK becomes RGB, an alpha channel is dropped. Only the first
    frame or page is read. More than 8 bits per channel is an error, because the range is not known.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")) or re.search("16[BLN]|65535", _coding(image)):
            raise DataError(
                f"{path}: expected an image of 8 bits per channel, got mode {image.mode} of 16 or 32 bits; "
                "scale its values to 0..255 and save it with 8 bits"
            )
        image.load()
        plain = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        return np.array(ImageOps.exif_transpose(plain).convert("RGB"))


def read_label(path: str | Path) -> np.ndarray:
    """The class ids of a single-channel or palette image as ``[H, W]`` uint8, turned by its EXIF orientation."""
    with open_image(path, "label") as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(f"{path}: this label is a JPEG, whose compression changes class ids; make it again as PNG")
        # Grey values of 2 or 4 bits, or of a PGM whose largest value is not 255, are stretched to 0..255.
        stretched = re.search(r"L;[24]|'ppm'", _coding(image))
        if image.mode not in ("L", "P") or stretched:
            kind = "values that are stretched to 0..255" if stretched else _KINDS.get(image.mode, image.mode)
            raise DataError(
                f"{path}: expected a label with one 8-bit channel or a palette, got {kind}; "
                "save class ids 0..254 (255: ignore) as a single-channel or palette PNG"
            )
        if getattr(image, "is_animated", False):
            raise DataError(f"{path}: expected one label, got several frames or pages; save the right one as PNG")
        image.load()
        return np.array(ImageOps.exif_transpose(image))


def write_label(path: str | Path, labels: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Writes ``[H, W]`` uint8 class ids as PNG, with the ``[K, 3]`` RGB palette if one is given (255: white)."""
    image = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    if palette is not None:
        table = np.zeros((256, 3), np.uint8)
        table[255] = 255
        table[: len(palette)] = palette
        image = image.convert("L")
        image.putpalette(table.tobytes())
    _save(image, path)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Writes ``[H, W, 3]`` RGB uint8 in the format that the suffix names."""
    _save(Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8)), path)


@contextlib.contextmanager
def open_image(path: str | Path, what: str = "image") -> Iterator[Image.Image]:
    """Opens an image and reads its header; ``load()`` decodes it. Every failure is a :class:`DataError`."""
    with _naming(path, what):
        require_regular(path, DataError, what)
        # Given a path, Pillow maps the file. It then misreads a TIFF with an orientation, and a file truncated while
        # it is read kills the process.
        with open(path, "rb") as file:
            with _PILLOWS_LIMIT:  # a global, which warns at the sizes of aerial images
                theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    image = Image.open(file, formats=FORMATS)
                finally:
                    Image.MAX_IMAGE_PIXELS = theirs
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise DataError(
                    f"{path}: this {what} has {width}x{height} pixels by its header, expected 1 to {MAX_PIXELS}; "
                    "is it damaged? If not, cut it into tiles"
                )
            yield image


_PILLOWS_LIMIT = threading.Lock()


def _coding(image: Image.Image) -> str:
    """The coding of the file's pixels, in Pillow's terms. It is known only until they are loaded."""
    return " ".join(f"{tile[0]!r} {tile[3]!r}" for tile in getattr(image, "tile", ())[:1])


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
        raise DataError(f"{path}: this {what} is damaged or truncated ({error}); copy or download it again") from error


def _unread(path: str | Path, what: str) -> str:
    """Why Pillow does not open a file: it is in another format, is no picture at all, or is damaged."""
    form = picture_format(path)
    if form in FORMATS:
        return f"this {what} begins as a {form} file does, but has no header that Pillow understands"
    size = Path(path).stat().st_size
    supported = f"is not in a supported image format, {', '.join(FORMATS)}"
    return f"this {what} ({size} bytes) {supported}" + (f", but in {form}; convert it to PNG" if form else "")


def _save(image: Image.Image, path: str | Path) -> None:
    """Writes a temporary file in the same folder and renames it, so that nobody ever sees half a file."""
    with replacing(path) as file:
        image.save(file, format=Image.registered_extensions()[Path(path).suffix.lower()])
