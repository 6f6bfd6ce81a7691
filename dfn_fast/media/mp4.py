"""The times of a video in an MP4 file, which OpenCV neither tells nor writes: edit lists, and frames of any duration.

https://developer.apple.com/documentation/quicktime-file-format describes the boxes.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

_MOST_INDEX = 1 << 28  # bytes of the box that holds all tables
_MOST_FRAMES = 10_000_000
_DEEPEST = 4  # a track's tables
_DAMAGED = (struct.error, KeyError, IndexError, StopIteration, ZeroDivisionError)
_TICKS = 1000  # a second, in files that we write
_OUTER = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")

Boxes = dict[bytes, bytes]


def shown_frames(path: str | Path) -> int | None:
    """How many frames of the first video an edit list leaves, one less if in doubt; None where there is no such list.

    A trimmed video keeps its other frames, and counts them.
    """
    try:
        index = _index(Path(path))
        movie_ticks, track = _first_video(index[1]) if index is not None else (0, {})
        if b"elst" not in track:
            return None
        ticks = _ticks(track[b"mdhd"])
        table = list(struct.iter_unpack(">II", track[b"stts"][8:]))
        if sum(count for count, _ in table) > _MOST_FRAMES:
            return None
        starts = [0]
        for count, duration in table:
            starts += [starts[-1] + duration * i for i in range(1, count + 1)]
        edits = [edit for edit in _edits(track[b"elst"]) if edit[1] >= 0]
        shown = [(begin, begin + (length - 1) * ticks / movie_ticks) for length, begin in edits]
        reordered = 2 if b"ctts" in track else 0
        return sum(any(begin <= start <= end for begin, end in shown) for start in starts[:-1]) - reordered
    except (OSError, *_DAMAGED):  # another kind of file, or a damaged one
        return None


def set_times(path: Path, times: Sequence[float]) -> bool:
    """Makes the frames of a video that FFmpeg has just written begin at ``times``, in seconds, of which the first is 0.

    Returns whether its tables are as expected; if not, the file is unchanged.
    """
    starts = [round(time * _TICKS) for time in times]
    durations = [after - before for before, after in itertools.pairwise(starts)]
    durations.append(durations[-1] if durations else _TICKS)
    runs: list[list[int]] = []
    for duration in durations:
        if runs and runs[-1][1] == duration:
            runs[-1][0] += 1
        else:
            runs.append([1, duration])
    table = struct.pack(">II", 0, len(runs)) + b"".join(struct.pack(">II", *run) for run in runs)
    try:
        index = _index(path)
        if index is None or index[0] + 8 + len(index[1]) != path.stat().st_size:
            return False  # its tables stand before its frames, whose places would change
        movie_ticks, track = _first_video(index[1])
        total = sum(durations)
        in_movie = -(-total * movie_ticks // _TICKS)
        numbers = {  # offset in the box, value
            b"mvhd": [(16, in_movie)],
            b"tkhd": [(20, in_movie)],
            b"mdhd": [(12, _TICKS), (16, total)],
            b"elst": [(8, in_movie)],
        }
        if any(track[name][0] for name in numbers if name in track) or b"ctts" in track:
            return False  # of 64 bits, or in another order
        changed = _changed(index[1], {**numbers, b"stts": table})
    except (OSError, *_DAMAGED):
        return False
    with path.open("r+b") as file:
        file.seek(index[0])
        file.write(struct.pack(">I4s", 8 + len(changed), b"moov") + changed)
        file.truncate()
    return True


def _index(path: Path) -> tuple[int, bytes] | None:
    """The place and the content of the box ``moov``."""
    with path.open("rb") as file:
        at, end = 0, path.stat().st_size
        while at < end:
            file.seek(at)
            size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            header = 16 if size == 1 else 8
            size = {0: end - at, 1: large}.get(size, size)
            if name == b"moov" and header == 8 and size <= min(_MOST_INDEX, end - at):
                file.seek(at + header)
                return at, file.read(size - header)
            if size < header or name == b"moov":
                return None
            at += size
    return None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        if not 8 <= size <= len(content) - at:
            raise KeyError(name)
        yield name, content[at + 8 : at + size]
        at += size


def _leaves(content: bytes, depth: int = 0) -> Boxes:
    leaves: Boxes = {}
    for name, inner in _boxes(content):
        leaves.update(_leaves(inner, depth + 1) if name in _OUTER and depth < _DEEPEST else {name: inner})
    return leaves


def _first_video(index: bytes) -> tuple[int, Boxes]:
    """The ticks per second of the whole file, and the tables of its first track of video."""
    tracks = (_leaves(inner) for name, inner in _boxes(index) if name == b"trak")
    track = next(track for track in tracks if track[b"hdlr"][8:12] == b"vide")
    header = dict(_boxes(index))[b"mvhd"]
    return _ticks(header), {**track, b"mvhd": header}


def _ticks(header: bytes) -> int:
    return struct.unpack_from(">I", header, 20 if header[0] else 12)[0]


def _edits(table: bytes) -> list[tuple[int, int]]:
    """Each edit's duration, in ticks of the file, and its begin, in ticks of the track; -1: nothing is shown."""
    layout = ">QqI" if table[0] else ">IiI"
    return [(length, begin) for length, begin, _ in struct.iter_unpack(layout, table[8:])]


def _changed(content: bytes, changes: dict[bytes, list[tuple[int, int]] | bytes]) -> bytes:
    result = b""
    for name, inner in _boxes(content):
        change = changes.get(name)
        if name in _OUTER:
            inner = _changed(inner, changes)
        elif isinstance(change, bytes):
            inner = change
        elif change is not None:
            patched = bytearray(inner)
            for at, value in change:
                struct.pack_into(">I", patched, at, value)
            inner = bytes(patched)
        result += struct.pack(">I4s", 8 + len(inner), name) + inner
    return result
