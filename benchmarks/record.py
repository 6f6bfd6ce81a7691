"""``python -m benchmarks.record FILE...``: keeps the figures of benchmark runs under ``benchmarks/results/``.

Takes the files that ``--benchmark-json`` wrote and adds their rows to ``results/MACHINE/DATE.json``. Rows of a group
that is there already are replaced, so a suite may be run in parts.
"""

import json
from pathlib import Path

from benchmarks.reporting.results import RESULTS, compact, merge
from dfn_fast import cli
from dfn_fast.errors import ConfigError


def add(files: list[Path], results: Path = RESULTS) -> list[Path]:
    """Adds the rows of ``files`` to the result files of their machines; returns those. Raises ConfigError."""
    written = []
    for file in files:
        try:
            machine, date, suites = compact(json.loads(file.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: expected a file that pytest --benchmark-json wrote ({error!r})") from error
        written.append(merge(machine, date, suites, results))
    return written


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.record",
        usage="%(prog)s FILE...",
        description="Keep the figures of benchmark runs under benchmarks/results/.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by pytest --benchmark-json FILE")
    for path in add(parser.parse_args(argv).files):
        print(path.relative_to(RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    cli.run(main)
