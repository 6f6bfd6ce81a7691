"""Formats of pictures, told by a file's first bytes: those that are read here, and others so that they are named."""

import os
import re
import stat
from pathlib import Path

# Read, in Pillow's words. Pillow knows more, but hands some to other programs: EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".j2k"),
)
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jxr", ".psd", ".xcf", ".svg", ".tga", ".ico", ".exr", ".hdr", ".dds"),
    *(".qoi", ".pcx", ".pfm", ".eps", ".dcm", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".raf", ".rw2"),
)
_HEAD = 132
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "BMP": rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WEBP": rb"RIFF.{4}WEBP",
    "PPM": rb"P[1-6]\s+[\d#]",
    "GIF": rb"GIF8[79]a",
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb".{4}ftypavi[fs]",
    "CR3": rb".{4}ftypcrx",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG XR": rb"II\xbc",
    "PSD": rb"8BPS",
    "XCF": rb"gimp xcf",
    "OpenEXR": rb"v/1\x01",
    "Radiance": rb"#\?RADIANCE",
    "DDS": rb"DDS ",
    "QOI": rb"qoif",
    "ICO": rb"\0\0\x01\0[^\0]\0",
    "DICOM": rb".{128}DICM",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
    "EPS": rb"%!PS-Adobe[^\n]*EPSF",
    "RAF": rb"FUJIFILM",
    "ORF": rb"IIR[OS]",
    "RW2": rb"IIU\0",
}


def picture_format(path: str | Path) -> str:
    """The format of a picture, one of ``FORMATS`` if it can be read; empty if the file is no picture.

    The first bytes decide. A file that they do not explain is a picture if its suffix is that of one.
    """
    head = _head(path)
    found = next((name for name, start in _SIGNATURES.items() if re.match(start, head, re.DOTALL)), "")
    suffix = os.path.splitext(path)[1].lower()
    return found or (suffix[1:].upper() if suffix in OTHER_SUFFIXES else "")


def _head(path: str | Path) -> bytes:
    """The first bytes of a regular file; none if it cannot be read."""
    try:
        # A pipe would be waited for.
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                return file.read(_HEAD)
    except (OSError, ValueError):  # whoever reads the file says why
        pass
    return b""
