"""TIFF files by their tags: what may be read as an image or a label, and what is of another kind."""

from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _FORMAT, _DNG = 254, 258, 259, 262, 277, 339, 50706
_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # by photometric interpretation; those that can be read as RGB
_PHOTOMETRICS = dict(enumerate(("MINISWHITE", "MINISBLACK", "RGB", "palette", "mask", "CMYK", "YCbCr"))) | {
    8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32803: "colour filter array", 32844: "LogL", 32845: "LogLuv",
    34892: "linear raw",
}  # fmt: skip
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "undefined", 5: "complex", 6: "complex"}


def tiff_problem(image: Image.Image) -> str:
    """Why an opened TIFF is not read as an image; empty if it is, or is no TIFF."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return ""
    if _DNG in tags or tags.get(_SUBFILE, 0) & 1:
        return "a camera's raw file, or begins with a preview of its picture; export the picture as PNG or JPEG"
    photometric = tags.get(_PHOTOMETRIC)
    channels = tags.get(_SAMPLES, 1)
    extra = channels - _CHANNELS.get(photometric, 0)
    # After grey, one that says that it is alpha; after colours, any, as the first three are named.
    grey_and_more = photometric in (0, 1) and extra and image.mode not in ("LA", "La")
    if photometric not in _CHANNELS or grey_and_more or set(tags.get(_FORMAT, (1,))) - {1, 4}:
        return f"{_described(tags)}; expected grey, RGB, CMYK or a palette: save the channels to be seen as such"
    return ""


def is_lossy(image: Image.Image) -> bool:
    """Whether an opened TIFF has a compression of photographs."""
    return getattr(image, "tag_v2", {}).get(_COMPRESSION) in (6, 7, 34712, 34892, 50001)  # of JPEG's family, and WebP


def left_out_bands(image: Image.Image) -> int:
    """How many bands of an opened TIFF are beyond its colours and their alpha."""
    tags: Any = getattr(image, "tag_v2", {})
    bands = tags.get(_SAMPLES, 1) - _CHANNELS.get(tags.get(_PHOTOMETRIC), 4)
    return max(0, bands - sum(kind in (1, 2, 999) for kind in tags.get(338, ())))


def other_pages(image: Image.Image) -> int:
    """How many pages or frames follow the first; smaller copies and masks of a TIFF are none."""
    frames = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 1
    if frames == 1 or not hasattr(image, "tag_v2"):
        return frames - 1
    count = 0
    for number in range(1, frames):
        image.seek(number)
        count += not image.tag_v2.get(_SUBFILE, 0) & 5
    image.seek(0)
    return count


def tiff_kind(path: str | Path) -> str:
    """``"TIFF of 5 bands, 8 bits each, ..."`` if the file's tags can be read, else an empty text."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            if head[:2] not in (b"II", b"MM"):
                return ""
            if head[2:4] in (b"+\0", b"\0+"):
                head += file.read(8)
            directory = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(directory.next)
            directory.load(file)
            return _described(directory)
    except Exception:  # the tags are damaged, too
        return ""


def _described(tags: Any) -> str:
    bits, form = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    photometric, compression = tags.get(_PHOTOMETRIC), tags.get(_COMPRESSION, 1)
    bands = tags.get(_SAMPLES, 1)
    return (
        f"TIFF of {bands} band{'s' * (bands != 1)}, {max(bits)} bits each, {_FORMATS.get(max(form), max(form))}, "
        f"photometric {_PHOTOMETRICS.get(photometric, photometric)}, "
        f"compression {TiffImagePlugin.COMPRESSION_INFO.get(compression, compression)}"
    )
