"""Image and label files: the one place that decodes and encodes them, and that names a file which is not right.

Images are ``[H, W, 3]`` RGB uint8, labels ``[H, W]`` uint8. Pillow decodes: it refuses a truncated file, and it reads
and writes the indices of a palette PNG, where OpenCV gives the colours.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dfn_fast.atomic import replacing
from dfn_fast.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def read_image(path: str | Path) -> np.ndarray:
    """The image as ``[H, W, 3]`` RGB uint8, turned as its EXIF orientation says.

    Greyscale and palette images get three channels, CMYK becomes RGB, an alpha channel is dropped. An image of more
    than 8 bits a channel is an error: its range is not known.
    """
    image = _decode(path, "image")
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{path}: expected an image of 8 bits a channel, got mode {image.mode} (16 or 32 bits); "
            "scale its values to 0..255 and save it with 8 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path: str | Path) -> np.ndarray:
    """The class ids of a single-channel or palette image as ``[H, W]`` uint8."""
    image = _decode(path, "label")
    if image.format in ("JPEG", "MPO"):
        raise DataError(f"{path}: this label is a JPEG, whose compression changes class ids; make it anew as PNG")
    if image.mode not in ("L", "P"):
        kind = {"1": "1-bit", "I;16": "16-bit", "I": "32-bit", "F": "floating-point"}.get(image.mode, image.mode)
        raise DataError(
            f"{path}: expected a label with one 8-bit channel or a palette, got {kind}; "
            "save class ids 0..254 (255: ignore) as a single-channel or palette PNG"
        )
    return np.array(image)


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


def _decode(path: str | Path, what: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: this {what} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected an {what} file, got a folder") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read this {what}") from None
    except UnidentifiedImageError:
        size = Path(path).stat().st_size
        raise DataError(f"{path}: this {what} ({size} bytes) is in no image format that Pillow knows") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: this {what} is damaged or truncated ({error}); copy or download it again") from error
    return image


def _save(image: Image.Image, path: str | Path) -> None:
    """To a temporary file in the same folder, then renamed: a reader or an interruption never meets half a file."""
    with replacing(path) as file:
        image.save(file, format=Image.registered_extensions()[Path(path).suffix.lower()])
