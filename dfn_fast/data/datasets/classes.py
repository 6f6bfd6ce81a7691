"""Tables of classes: classes.txt, and what labelling tools write in its place.

A table has a class on each line, in the order of their ids. These are read as what they are, whatever their name::

    road                           a name
    road 128 64 128                a name and R G B, also as road,128,64,128 or 128 64 128 road
    "car, parked",0,0,142          quotes around a name with a comma
    # label:color_rgb:parts:actions
    road:128,64,128::              CVAT's labelmap.txt
    name,r,g,b                     class_dict.csv: columns in any order, known by their header
    Pixel Value, Class             Roboflow's _classes.csv
    __ignore__                     LabelMe's labels.txt: its first line is 255, the next is class 0
    __ignore__ 0 0 0               the same, with the colour of ignored pixels

Lines that begin with ``# `` are comments. A row with id 255 is no class either, and may have a colour.
"""

import contextlib
import csv
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfn_fast.data.base import IGNORE
from dfn_fast.data.datasets.voc import voc_palette
from dfn_fast.errors import ConfigError, DataError, brief, listed
from dfn_fast.files import MAX_TEXT, require_regular
from dfn_fast.media.formats import IMAGE_SUFFIXES

TABLES = ("classes.txt", "labelmap.txt", "label_colors.txt", "labels.txt", "_classes.csv", "class_dict.csv")
MAX_NAME = 200  # characters of a class's name
MAX_LINE = 10_000

Colour = tuple[int, int, int]

_COLUMNS = {  # of a table with a header
    "name": ("name", "class", "label", "classname", "labelname", "category"),
    "id": ("id", "pixelvalue", "value", "index", "classid", "labelid"),
    "r": ("r", "red"),
    "g": ("g", "green"),
    "b": ("b", "blue"),
}
_COLUMN_OF = {name: column for column, names in _COLUMNS.items() for name in names}


class ClassTable(NamedTuple):
    """Classes in the order of their ids."""

    names: tuple[str, ...]
    palette: np.ndarray  # [K, 3] RGB uint8: the given colours, and VOC's for the other classes
    colours: dict[int, Colour]  # the given ones, also of 255
    source: str  # a file, or the option


class _Row(NamedTuple):
    """A line of a table."""

    name: str
    colour: list[str]  # R, G, B, or nothing
    id: str = ""
    number: int = 0  # of the line


def class_table(folders: Iterable[Path], num_classes: int | None, classes: str | Path | None) -> ClassTable:
    """The table in the file ``classes``, else the one in ``folders``, else ``num_classes`` numbered classes.

    Raises :class:`DataError` if ``folders`` hold two tables that disagree.
    """
    folders = list(folders)
    paths = [Path(classes)] if classes is not None else _tables(folders)
    if not paths:
        if num_classes is None:
            raise ConfigError(
                f"{folders[0] / 'classes.txt'}: this file is missing, so the classes are not known; "
                "write one name per line, or give --num-classes or --classes"
            )
        if not 2 <= num_classes <= IGNORE:
            raise ConfigError(f"--num-classes {num_classes}: expected 2..{IGNORE}")
        names = tuple(f"class {i}" for i in range(num_classes))
        return ClassTable(names, voc_palette(num_classes), {}, f"--num-classes {num_classes}")
    table = read_table(paths[0])
    for path in paths[1:]:
        table = _agreeing(table, read_table(path))
    if num_classes not in (None, len(table.names)):
        raise ConfigError(
            f"--num-classes {num_classes}: {table.source} has {len(table.names)} classes; leave out one of the two"
        )
    return table


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The names and the ``[K, 3]`` RGB uint8 palette of a table; a class without a colour gets VOC's."""
    return read_table(path)[:2]


def read_table(path: Path) -> ClassTable:
    """A table in one of the forms in this file's docstring."""
    require_regular(path, ConfigError, "table of classes", MAX_TEXT)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a text file with one class per line ({error})") from error
    rows, void = _with_ids(path, _rows(path, [line.strip() for line in lines]))
    if rows and rows[0].name == "__ignore__":
        rows, void = rows[1:], rows[:1]
    if not 2 <= len(rows) <= IGNORE:
        raise ConfigError(f"{path}: expected 2..{IGNORE} classes, one per line, got {len(rows)}")
    names: list[str] = []
    colours: dict[int, Colour] = {}
    for row in rows:
        require_name(row.name, names, f"{path}:{row.number}")
        names.append(row.name)
    for i, row in [*enumerate(rows), *((IGNORE, row) for row in void)]:
        if row.colour:
            colours[i] = _colour(row, f"{path}:{row.number}")
    _require_distinct(colours, names, path)
    return ClassTable(tuple(names), _palette(len(names), colours), colours, str(path))


def require_name(name: str, others: Collection[str], where: str) -> None:
    """Raises :class:`DataError` for a name that no class has, or that one of ``others`` has."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or not re.search(r"\w", name):
        got = "an empty line" if not name else f"{len(name)} characters: {brief(name)}"
        raise DataError(f"{where}: expected a class name, or name R G B, got {got}")
    if name in others or name == "__ignore__":
        place = "occurs twice" if name in others else "stands only in the first line"
        raise DataError(f"{where}: class {name!r} {place}")


def _colour(row: _Row, where: str) -> Colour:
    if not all(value.isdecimal() and len(value) <= 9 and int(value) <= 255 for value in row.colour):
        raise DataError(f"{where}: expected a colour of 0..255, got {brief(' '.join(row.colour))}")
    r, g, b = map(int, row.colour)
    return r, g, b


def _require_distinct(colours: dict[int, Colour], names: Sequence[str], source: str | Path) -> None:
    """Raises :class:`DataError` if two classes have one colour, which a mask's pixels could not tell apart."""
    first: dict[Colour, int] = {}
    for i, colour in sorted(colours.items()):
        if (other := first.setdefault(colour, i)) != i:
            raise DataError(
                f"{source}: colour {' '.join(map(str, colour))} is that of {_named(other, names)} and of "
                f"{_named(i, names)}; give each a colour of its own, or leave the colours out"
            )


def _named(i: int, names: Sequence[str]) -> str:
    return f"class {i} ({names[i]})" if i < len(names) else f"{i} (ignored)"


def _palette(num_classes: int, colours: dict[int, Colour]) -> np.ndarray:
    palette = voc_palette(num_classes)
    for i, colour in colours.items():
        if i < num_classes:
            palette[i] = colour
    return palette


def _tables(folders: Iterable[Path]) -> list[Path]:
    """The tables in the folders by their usual names. labels.txt may be something else: a list of images."""
    paths = [folder / name for folder in dict.fromkeys(folders) for name in TABLES]
    return [path for path in paths if os.path.exists(path) and not (path.name == "labels.txt" and _names_images(path))]


def _names_images(path: Path) -> bool:
    require_regular(path, ConfigError, "table of classes", MAX_TEXT)
    line = ""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(MAX_LINE)
    return any(field.strip().lower().endswith(IMAGE_SUFFIXES) for field in re.split(r"[\t ]", line))


def _agreeing(a: ClassTable, b: ClassTable) -> ClassTable:
    """``a`` with the colours that only ``b`` has."""
    if a.names != b.names:
        i = next((i for i, (x, y) in enumerate(zip(a.names, b.names, strict=False)) if x != y), None)
        texts = [f"{len(t.names)} classes" if i is None else f"class {i} is {t.names[i]!r}" for t in (a, b)]
        what = " in one, ".join(texts)
    elif different := [i for i in a.colours.keys() & b.colours.keys() if a.colours[i] != b.colours[i]]:
        i = min(different)
        what = f"{_named(i, a.names)} has colour {a.colours[i]} in one, {b.colours[i]}"
    else:
        colours = b.colours | a.colours
        _require_distinct(colours, a.names, f"{a.source} and {b.source}")
        return a._replace(palette=_palette(len(a.names), colours), colours=colours)
    raise DataError(f"{a.source} and {b.source} disagree: {what} in the other; keep one of the two, or give --classes")


def _rows(path: Path, lines: list[str]) -> list[_Row]:
    """The lines, each in whatever form it has; a header decides the form of all that follow."""
    rows: list[_Row] = []
    header: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if len(line) > MAX_LINE or "\0" in line:
            raise DataError(f"{where}: expected a class name, or name R G B, got {len(line)} characters, {brief(line)}")
        if re.match(r"#(\s|$)", line):
            continue
        if line.startswith("#"):
            raise DataError(f"{where}: is {brief(line)} a comment or a class? Write # and a space, or quotes around it")
        if not rows and not header and (header := _header(line, where)):
            continue
        rows.append((_by_header(header, line, where) if header else _row(line, where))._replace(number=number))
    return rows


def _fields(line: str) -> list[str]:
    separator = next((s for s in ",;\t" if s in line), " ")
    return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [""])]


def _header(line: str, where: str) -> list[str]:
    """The columns that a header names, in order; none if the line is not a header."""
    fields = _fields(line)
    columns = [_COLUMN_OF.get(re.sub(r"[\s_]", "", field.lower()), "") for field in fields]
    if columns == ["name"] or fields == line.split() == ["names"]:
        raise DataError(f"{where}: is {line!r} a header or a class? Remove the line, or write quotes around the class")
    known = [column for column in columns if column]
    colour = {"r", "g", "b"} <= set(known)
    return columns if "name" in known and (colour or "id" in known) and len(set(known)) == len(known) else []


def _by_header(header: list[str], line: str, where: str) -> _Row:
    fields = _fields(line)
    if len(fields) != len(header):
        raise DataError(f"{where}: expected {len(header)} fields as in the header, got {brief(line)}")
    row = dict(zip(header, fields, strict=True))
    return _Row(row["name"], [row[c] for c in "rgb" if c in row], row.get("id", ""))


def _row(line: str, where: str) -> _Row:
    """A line by its own form: CVAT's, a name in quotes, fields with commas, or words."""
    if match := re.fullmatch(r"(.*):(?:(\d+),(\d+),(\d+))?:[^:]*:[^:]*", line):
        return _Row(match[1], [value for value in match.groups()[1:] if value])
    if match := re.fullmatch(r'"((?:[^"]|"")*)"[\s,;]*(\d+[\s,;]+\d+[\s,;]+\d+)?', line):
        return _Row(match[1].replace('""', '"'), re.findall(r"\d+", match[2] or ""))
    if not re.search("[,;]", line):
        return _words(line)
    fields = _fields(line)
    numbers = [field.isdecimal() for field in fields]
    if numbers == [False, True, True, True]:
        return _Row(fields[0], fields[1:])
    if numbers == [True, True, True, False]:
        return _Row(fields[3], fields[:3])
    if numbers == [True, False]:
        return _Row(fields[1], [], fields[0])
    if numbers == [True, False, True, True, True]:
        return _Row(fields[1], fields[2:], fields[0])
    raise DataError(
        f"{where}: expected a name, or name R G B, or name,R,G,B, got {brief(line)}; put each class on a line of its "
        'own, and quotes around a name with a comma: "a, b"'
    )


def _words(line: str) -> _Row:
    name, *colour = line.rsplit(maxsplit=3) or [""]
    if len(colour) == 3 and all(value.isdecimal() for value in colour):
        return _Row(name, colour)
    *colour, name = line.split(maxsplit=3) or [""]
    if len(colour) == 3 and all(value.isdecimal() for value in colour):
        return _Row(name, colour)
    return _Row(line, [])


def _with_ids(path: Path, rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
    """The rows in the order of their ids, if they have ids, in columns of their own or before each name; that of 255.

    Raises :class:`DataError` if they are not 0, 1, 2 and so on.
    """
    if not any(row.id for row in rows):
        matches = [re.fullmatch(r"(\d{1,3})(?:\s*[:.)=]\s*|\s+)(\D.*)", row.name) for row in rows]
        if not all(matches):
            return rows, []
        rows = [row._replace(id=m[1], name=m[2]) for row, m in zip(rows, matches, strict=True) if m]
    by_id = {int(row.id): row for row in rows if row.id.isdecimal() and len(row.id) <= 9}
    classes = [by_id[i] for i in sorted(by_id) if i != IGNORE]
    if len(by_id) < len(rows) or [int(row.id) for row in classes] != list(range(len(classes))):
        raise DataError(
            f"{path}: expected each of the ids 0..{len(classes) - 1} once, as a label's pixels hold them, got "
            + listed(row.id or "(none)" for row in rows)
        )
    return classes, [by_id[IGNORE]] if IGNORE in by_id else []
