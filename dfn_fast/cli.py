"""Shared by all command lines: readable help, the nearest option for a misspelt one, errors without a traceback."""

import argparse
import errno
import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dfn_fast.errors import ConfigError, UserError, brief, nearest, printable

# tqdm's settings for a progress bar of images: always images/s, however slow.
IMAGES_BAR: dict[str, Any] = {
    "unit": " images",
    "dynamic_ncols": True,
    "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
}


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that answers an unknown option or choice with the nearest known one.

    Options cannot be abbreviated: a prefix that is unique today may not be tomorrow.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in unknown if option.startswith("-")] or unknown
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown option {options[0]}" + nearest(options[0].split("=")[0], known))
        return arguments

    def _print_message(self, message, file=None):
        super()._print_message(as_called(message), file)

    def _get_value(self, action, arg_string):
        if not arg_string.strip() and arg_string != action.default:
            raise argparse.ArgumentError(
                action, "expected a value, got an empty text; is a variable of the shell unset?"
            )
        return super()._get_value(action, arg_string)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of {', '.join(choices)}" + nearest(str(value), choices)
            )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Puts option names in a column of 28 characters."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)


def as_called(text: str) -> str:
    """Names our commands in ``text`` as the user calls them: ``dfn train`` if this process is the script ``dfn``."""
    program = Path(sys.argv[0])
    if program.stem == "dfn":
        return text.replace("python -m dfn_fast.", "dfn ")
    if program.match("dfn_fast/__main__.py"):
        return text.replace("python -m dfn_fast.", "python -m dfn_fast ")
    return text


def dashed(name: str) -> str:
    """The option name of a field, without the leading ``--``."""
    return name.replace("_", "-")


def size(text: str) -> tuple[int, int]:
    """``"512"`` or ``"512x1024"`` (height x width) as ``(height, width)``."""
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512 or 512x1024 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def require_range(option: str, value: Any, minimum: float | None, maximum: float | None) -> None:
    """Raises :class:`ConfigError` unless a number, or each of a tuple of numbers, is finite and between the two."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{option} must be finite, got {number}")
        if minimum is not None and number < minimum:
            raise ConfigError(f"{option} must be at least {minimum:.15g}, got {brief(number)}")
        if maximum is not None and number > maximum:
            raise ConfigError(f"{option} must be at most {maximum:.15g}, got {brief(number)}")


class _Printable:
    """A stream that writes control characters out, except for ``moves``, which a progress bar needs."""

    def __init__(self, stream: TextIO, moves: tuple[str, ...] = ()):
        self._stream, self._moves = stream, moves

    def write(self, text: str) -> int:
        parts = re.split(f"({'|'.join(map(re.escape, self._moves))})", text) if self._moves else [text]
        return self._stream.write("".join(part if part in self._moves else printable(part) for part in parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main`` and exits with its code. Prints a :class:`UserError` as text and exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may not know every character
    sys.stdout = _Printable(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _Printable(sys.stderr, moves=("\r", "\x1b[A"))  # type: ignore[assignment]
    try:
        code = main()
    except UserError as error:
        print(as_called(f"error: {error}"), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141  # the reader of our output has gone, as in `... | head`
        sys.stderr.close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
