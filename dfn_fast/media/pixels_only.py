"""PNG, JPEG and text PPM files as a decoder is to see them: without what decides nothing over their pixels.

A text of some megabytes, a colour profile or a block of a camera that is not as a library expects would fail an image
whose pixels are whole.
"""

import bisect
import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from dfn_fast.errors import DataError

MAX_SCANS = 200  # of a JPEG; encoders make about ten, and each goes over all the pixels
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_EXTRAS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # kept: transparency, and whether there are several frames
_BLOCK = 1 << 20


def pixels_only(file: BinaryIO, path: object) -> BinaryIO:
    """``file`` without metadata, except for an EXIF orientation. Raises :class:`DataError` for a JPEG of many scans."""
    head = file.read(8)
    file.seek(0)
    if head == _PNG:
        return io.BufferedReader(_Parts(file, _png_parts(file)))
    if head.startswith(b"\xff\xd8\xff"):
        return io.BufferedReader(_Parts(file, _jpeg_parts(file, path)))
    if re.match(rb"P[123]\s", head):  # Pillow copies what is left for each comment
        return io.BytesIO(re.sub(rb"#[^\r\n]*", b"", file.read()))
    return file


class _Parts(io.RawIOBase):
    """Parts of a file, one after another, as a file of its own. They are looked for only as far as it is read."""

    def __init__(self, file: BinaryIO, parts: Iterator[tuple[int, int]]):
        self._file, self._more = file, parts
        self._begins: list[int] = []  # of each part, in this file
        self._parts: list[tuple[int, int]] = []  # its place in the other one, and its length
        self._size = self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            while self._find_more():
                pass
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while self._at >= self._size:
            if not self._find_more():
                return 0
        part = bisect.bisect(self._begins, self._at) - 1
        start, length = self._parts[part]
        skipped = self._at - self._begins[part]
        self._file.seek(start + skipped)
        data = self._file.read(min(length - skipped, len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _find_more(self) -> bool:
        start, length = next(self._more, (0, 0))
        if self._parts and sum(self._parts[-1]) == start:
            self._parts[-1] = (self._parts[-1][0], self._parts[-1][1] + length)
        elif length:
            self._begins.append(self._size)
            self._parts.append((start, length))
        self._size += length
        return length > 0


def _png_parts(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """The signature and the chunks of pixels. An eXIf chunk is kept if it begins as one."""
    yield 0, 8
    at, end = 8, file.seek(0, io.SEEK_END)
    while at < end:
        file.seek(at)
        length, name, start = struct.unpack(">I4s4s", file.read(12).ljust(12, b"\0"))
        whole = 12 + length
        ancillary = name.isalpha() and name[:1].islower() and name not in _PNG_EXTRAS
        if not ancillary or (name == b"eXIf" and start in (b"II*\0", b"MM\0*")):
            yield at, min(whole, end - at)
        at += whole


def _jpeg_parts(file: BinaryIO, path: object) -> Iterator[tuple[int, int]]:
    """All but the APP and COM segments before the pixels; of those, what says how colours or the sides are meant."""
    yield 0, 2
    at, end = 2, file.seek(0, io.SEEK_END)
    components = 0
    progressive = False
    while at < end:
        file.seek(at)
        marker, kind, size, start = struct.unpack(">BBH14s", file.read(18).ljust(18, b"\0"))
        if kind == 0xFF:  # filling
            at += 1
            yield at - 1, 1
            continue
        if marker != 0xFF or kind in (0x01, *range(0xD0, 0xDA)):  # not a segment: whatever follows is for the decoder
            break
        if kind == 0xDA:
            if (progressive or start[0] < components) and _scans(file, at) > MAX_SCANS:
                raise DataError(
                    f"{path}: this JPEG has more than {MAX_SCANS} scans, and each goes over all its pixels; expected "
                    "about ten; save it again"
                )
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            components, progressive = start[5], kind in (0xC2, 0xC6, 0xCA, 0xCE)
        colours = (kind == 0xE0 and size >= 16 and start[:4] == b"JFIF") or (kind == 0xEE and start[:5] == b"Adobe")
        turned = kind == 0xE1 and start[:10] in (b"Exif\0\0II*\0", b"Exif\0\0MM\0*")
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE) or colours or turned:
            yield at, min(2 + size, end - at)
        at += 2 + size
    if at < end:
        yield at, end - at


def _scans(file: BinaryIO, at: int) -> int:
    """The number of scans from ``at`` on: within their data, no two bytes look like the beginning of one."""
    file.seek(at)
    scans, last = 0, b""
    while block := file.read(_BLOCK):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    return scans
