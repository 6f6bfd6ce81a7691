"""Errors that a user can fix.

The message names the file or option, what was expected, what was found, and the remedy.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHOWN = 5  # names that an error lists
EXCERPT = 500  # characters of that list


# Control characters, except for tabs and line ends; line separators, marks that turn the direction of writing, and
# bytes that are no text. A terminal obeys some of them, so a file's name could hide or forge what is printed.
_UNPRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""``text`` with every control character written out, as in ``\x1b``."""
    return _UNPRINTED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Bad input. The commands print only its text, without a traceback, and exit with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(UserError):
    """An image, a label or the layout of a data set is wrong; the text names the file."""


class CheckpointError(UserError):
    """A weights file cannot be read, written or fitted to the model; the text names it."""


class OutputError(UserError):
    """A file of a run cannot be written; the text names it."""


class ConfigError(UserError):
    """An option or a configuration file is wrong; the text names it and, for a misspelt name, the nearest one."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def brief(value: Any) -> str:
    """``repr(value)``, truncated: a broken file may hold millions of characters, or a value that contains itself."""
    return _SHORT.repr(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word nearest to ``word``, or an empty string if none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """The first names, separated by commas, with ``...`` if there are more than ``most``."""
    names = list(names)
    return ", ".join(names[:most])[:EXCERPT] + (", ..." if len(names) > most else "")


def shortened(text: str | Path, most: int = 200) -> str:
    """``text``, truncated for an error: a line of a file that is not a list may have any length."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
