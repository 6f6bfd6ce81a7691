"""The error that a user can mend: its text names the file or option, what was expected, what came and the remedy."""

import reprlib
from typing import Any


class UserError(Exception):
    """Bad input. The command lines print its text alone, without a traceback, and exit with code 2."""


class DataError(UserError):
    """An image, a label or a data set's layout is not what it should be; the text names the file."""


class CheckpointError(UserError):
    """A weights file cannot be read, written or fitted to the model; the text names it."""


class OutputError(UserError):
    """A file of a run cannot be written; the text names it."""


class ConfigError(UserError):
    """An option or a configuration file is wrong; the text names it and, for a misspelt name, the nearest one."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def brief(value: Any) -> str:
    """``repr(value)``, cut short: what stands in a broken file may be millions of characters, or hold itself."""
    return _SHORT.repr(value)
