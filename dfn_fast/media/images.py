"""Image and label files: the only place that decodes and encodes them. Its errors name the file.

Images are ``[H, W, 3]`` RGB uint8, labels ``[H, W]`` uint8. Pillow decodes, because it refuses truncated files, and
because it reads and writes the indices of a palette PNG; OpenCV would return the colours.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dfn_fast.errors import DataError
from dfn_fast.files import replacing
from dfn_fast.media.opening import MAX_PIXELS as MAX_PIXELS
from dfn_fast.media.opening import jpeg2000_bits
from dfn_fast.media.opening import open_image as open_image
from dfn_fast.media.tiff import is_lossy, left_out_bands, other_pages, tiff_problem

IGNORE = 255
ORIENTATION = 0x0112  # in EXIF: 1 upright, 2 to 8 turned or mirrored

_BAND = 1 << 20  # pixels that are converted at a time
# EXIF's orientations: are rows and columns swapped, do rows of the file run upwards, do columns run to the left?
_TURNS = [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)]
_KINDS = {"1": "1-bit", "I;16": "16-bit", "I;16B": "16-bit", "I": "32-bit", "F": "floating-point"}


def read_image(path: str | Path, remarks: list[str] | None = None) -> np.ndarray:
    """The image as ``[H, W, 3]`` RGB uint8, turned by its EXIF orientation, as viewers show it.

    Greyscale and palette images get three channels, CMYK becomes RGB, an alpha channel is dropped. Other metadata, such
    as a colour profile, changes nothing. More than 8 bits per channel is an error, because the range is not known.
    ``remarks`` gets a few words on whatever is not read as it is in the file: that the image was turned, or that more
    frames, pages or bands follow.
    """
    with open_image(path) as image:
        deep = re.search("16[BLN]|65535", _coding(image)) or any(bits > 8 for bits in jpeg2000_bits(image))
        if deep or image.mode.startswith(("I", "F")):
            raise DataError(
                f"{path}: expected an image of 8 bits per channel, got mode {image.mode} of 16 or 32 bits; "
                "scale its values to 0..255 and save it with 8 bits"
            )
        if problem := tiff_problem(image):
            raise DataError(f"{path}: this image is a {problem}")
        said = [(other_pages(image), "have more frames or pages, of which the first is read")]
        said.append((left_out_bands(image), "have more bands than their colours, which are left out"))
        turned = image.format == "TIFF" and orientation(image) > 1  # by Pillow, while it loads
        image.load()
        turn = orientation(image)
        said.append((turned or turn > 1, "are turned as their EXIF orientation says"))
        if remarks is not None:
            remarks += [text for found, text in said if found]
        return _rgb(image, turn)


def read_label(path: str | Path) -> np.ndarray:
    """The class ids of a single-channel or palette image as ``[H, W]`` uint8, turned by its EXIF orientation."""
    with open_image(path, "label") as image:
        return stored_pixels(image, path, ("L", "P"))


def stored_pixels(image: Image.Image, path: str | Path, modes: Iterable[str]) -> np.ndarray:
    """The uint8 pixels of an opened label, which has one of ``modes``, as they are in the file, but turned upright.

    Raises :class:`DataError` for a label that was compressed with loss, or whose values Pillow would change.
    """
    if image.format in ("JPEG", "MPO") or is_lossy(image):
        raise DataError(f"{path}: this label is a JPEG, whose compression changes class ids; make it again as PNG")
    # Grey values of 2 or 4 bits, or of a PGM whose largest value is not 255, are stretched to 0..255, and those of
    # a TIFF in which 0 is white are turned round. Colours of other than 8 bits are scaled.
    changed = re.search(r"L;[24I]|1;I|'ppm'|[ABR];(?:[24]|1[56])", _coding(image)) or jpeg2000_bits(image) - {8}
    if image.mode not in modes or changed:
        kind = "values that are stretched to 0..255, or inverted" if changed else _KINDS.get(image.mode, image.mode)
        raise DataError(
            f"{path}: expected a label with one 8-bit channel or a palette, got {kind}; "
            "save class ids 0..254 (255: ignore) as a single-channel or palette PNG"
        )
    if problem := tiff_problem(image):
        raise DataError(f"{path}: this label is a {problem}")
    if other_pages(image):
        raise DataError(f"{path}: expected one label, got several frames or pages; save the right one as PNG")
    image.load()
    pixels = np.asarray(image)
    if pixels.dtype.itemsize > 1 and (pixels.min() < 0 or pixels.max() > IGNORE):
        raise DataError(
            f"{path}: expected a label with one 8-bit channel or a palette, got {_KINDS.get(image.mode, image.mode)} "
            f"values of {pixels.min()}..{pixels.max()}; save class ids 0..254 (255: ignore)"
        )
    labels, as_stored = _canvas(image.size, orientation(image), *pixels.shape[2:])
    as_stored[...] = pixels
    return labels


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 where there is none, or none that can be read."""
    for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow would take it from there too; other viewers do not
        image.info.pop(name, None)
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises nearly anything for EXIF data that are none
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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


def _coding(image: Image.Image) -> str:
    """The coding of the file's pixels, in Pillow's terms. It is known only until they are loaded."""
    return " ".join(f"{tile[0]!r} {tile[3]!r}" for tile in getattr(image, "tile", ())[:1])


def _rgb(image: Image.Image, turn: int) -> np.ndarray:
    """A loaded image as ``[H, W, 3]``. A band of rows at a time, as a second copy would double the memory."""
    result, as_stored = _canvas(image.size, turn, 3)
    width, height = image.size
    rows = max(1, _BAND // width)
    through = {"La": "LA", "RGBa": "RGBA", "P": "RGBA" if "transparency" in image.info else "P"}.get(image.mode)
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        as_stored[top : top + rows] = np.asarray((band.convert(through) if through else band).convert("RGB"))
    return result


def _canvas(size: tuple[int, int], turn: int, *channels: int) -> tuple[np.ndarray, np.ndarray]:
    """An array for an upright image, and a view of it in which the pixels lie as in the file, of this width, height."""
    swapped, up, left = _TURNS[turn]
    canvas = np.empty((*(size if swapped else size[::-1]), *channels), np.uint8)
    view = canvas.swapaxes(0, 1) if swapped else canvas
    return canvas, view[:: -1 if up else 1, :: -1 if left else 1]


def _save(image: Image.Image, path: str | Path) -> None:
    """Writes a temporary file in the same folder and renames it, so that nobody ever sees half a file."""
    with replacing(path) as file:
        image.save(file, format=Image.registered_extensions()[Path(path).suffix.lower()])
