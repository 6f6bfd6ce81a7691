"""Image and label files: the one place that decodes and encodes them, and that names a file which is not right.

Images are ``[H, W, 3]`` RGB uint8, labels ``[H, W]`` uint8. Pillow decodes: it refuses a truncated file, and it reads
and writes the indices of a palette PNG, where OpenCV gives the colours.
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

IGNORE = 255

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# By content, whatever the suffix. Pillow knows more, and gives some to other programs: EPS is run by Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000")
MAX_PIXELS = 1 << 29  # 23,170 x 23,170: RGB pixels take 2 GiB while they are decoded
_KINDS = {"1": "1-bit", "I;16": "16-bit", "I": "32-bit", "F": "floating-point"}


def read_image(path: str | Path) -> np.ndarray:
    """The image as ``[H, W, 3]`` RGB uint8, turned as its EXIF orientation says: as viewers show it.

    Greyscale and palette images get three channels, CMYK becomes RGB, an alpha channel is dropped. Of an animation or
    of several pages the first is read. An image of more than 8 bits a channel is an error: its range is not known.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")) or re.search("16[BLN]|65535", _coding(image)):
            raise DataError(
                f"{path}: expected an image of 8 bits a channel, got mode {image.mode} of 16 or 32 bits; "
                "scale its values to 0..255 and save it with 8 bits"
            )
        image.load()
        plain = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        return np.array(ImageOps.exif_transpose(plain).convert("RGB"))


def read_label(path: str | Path) -> np.ndarray:
    """The class ids of a single-channel or palette image as ``[H, W]`` uint8, turned as its EXIF orientation says."""
    with open_image(path, "label") as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(f"{path}: this label is a JPEG, whose compression changes class ids; make it anew as PNG")
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
    """Writes ``[H, W]`` uint8 class ids as PNG, with the ``[K, 3]`` RGB palette where one is given (255: white)."""
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
    """The file's header, mode and size; ``load()`` decodes it. All that goes wrong is a :class:`DataError`."""
    with _naming(path, what):
        require_regular(path, DataError, what)
        # Given a path, Pillow maps the file: it misreads a TIFF with an orientation then, and a file that is cut
        # while it is read ends the process.
        with open(path, "rb") as file:
            with _PILLOWS_LIMIT:  # a global, which warns at sizes that aerial images have
                theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    image = Image.open(file, formats=FORMATS)
                finally:
                    Image.MAX_IMAGE_PIXELS = theirs
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise DataError(
                    f"{path}: this {what} has {width}x{height} pixels by its header, expected 1 to {MAX_PIXELS} of "
                    "them; is it damaged? Cut a larger one into tiles"
                )
            yield image


_PILLOWS_LIMIT = threading.Lock()


def _coding(image: Image.Image) -> str:
    """How the file's pixels are coded, in Pillow's terms; known until they are loaded."""
    return " ".join(f"{tile[0]!r} {tile[3]!r}" for tile in getattr(image, "tile", ())[:1])


@contextlib.contextmanager
def _naming(path: str | Path, what: str) -> Iterator[None]:
    """Anything that goes wrong in the block becomes a :class:`DataError` with the file's name."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: this {what} does not exist") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read this {what}") from None
    except UnidentifiedImageError:
        size = Path(path).stat().st_size
        raise DataError(
            f"{path}: this {what} ({size} bytes) is in no image format that is read: {', '.join(FORMATS)}"
        ) from None
    except MemoryError as error:
        raise DataError(f"{path}: this {what} does not fit into memory; cut it into tiles, or add memory") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise DataError(f"{path}: this {what} is damaged or truncated ({error}); copy or download it again") from error


def _save(image: Image.Image, path: str | Path) -> None:
    """To a temporary file in the same folder, then renamed: a reader or an interruption never meets half a file."""
    with replacing(path) as file:
        image.save(file, format=Image.registered_extensions()[Path(path).suffix.lower()])
