"""Searches the block sizes of ``dfn_kernels.tuning`` on this GPU and prints the tables to put there.

``python -m benchmarks.search_blocks [--table POOL] [--dry-run]``. Each entry of a table starts from its present value;
its neighbours (a number halved or doubled, or one halved and another doubled) are timed at every shape of DFN-R101
that reads the entry, the best becomes the start of the next step, until none is better by two percent. A candidate
that does not compile or gives another result than the definition is left out. ``--dry-run`` tries three neighbours at
tiny shapes in Triton's interpreter: its times mean nothing, it shows that the search works.
"""

import argparse
import datetime
import itertools
import math
import os
import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.measure import Case, Trial

GAIN = 0.98  # a candidate replaces the present tile if it takes less than this share of its time
WARPS = 16
Path = tuple[Any, ...]  # a table's name, then the keys that lead to a tile


class EntryReadError(Exception):
    """A call has read the entry that was replaced by a probe."""


class Probe:
    """Stands in for a tile: whatever is read of it shows that it is used."""

    def __getattr__(self, name: str) -> Any:
        raise EntryReadError

    def __iter__(self) -> Iterator[Any]:
        raise EntryReadError


def is_tile(value: Any) -> bool:
    """Whether a value is an entry: a named tuple of numbers."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def entries(value: Any, path: Path) -> Iterator[Path]:
    """Paths to the tiles in a table."""
    if is_tile(value):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from entries(item, (*path, key))


def entry(path: Path) -> Any:
    """The tile at a path."""
    from dfn_kernels import tuning

    value = getattr(tuning, path[0])
    for key in path[1:]:
        value = value[key]
    return value


def replaced(table: Any, keys: Path, tile: Any) -> Any:
    """A table with one entry replaced."""
    return table | {keys[0]: replaced(table[keys[0]], keys[1:], tile)} if keys else tile


def override(path: Path, tile: Any) -> Any:
    """Context manager: the kernels launch with ``tile`` at ``path``."""
    from dfn_kernels import tuning

    return mock.patch.object(tuning, path[0], replaced(getattr(tuning, path[0]), path[1:], tile))


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles with one number doubled, one halved, or one doubled and another halved."""
    names = tile._fields
    moves = [{name: factor} for factor in (2.0, 0.5) for name in names]
    moves += [{up: 2.0, down: 0.5} for up, down in itertools.permutations(names, 2)]
    for move in moves:
        other = tile._replace(**{name: int(getattr(tile, name) * factor) for name, factor in move.items()})
        if min(other) >= 1 and other._asdict().get("num_warps", 1) <= WARPS:
            yield other


def users(paths: list[Path], cases: list[tuple["Case", bool]]) -> dict[Path, list[tuple["Case", bool]]]:
    """For each entry the cases, and directions, that read it."""
    from benchmarks.measure import Trial

    found: dict[Path, list[tuple[Case, bool]]] = {path: [] for path in paths}
    for case, backward in cases:
        trial = Trial(case, backward)
        for path in paths:
            try:
                with override(path, Probe()):
                    trial.run("ours")
            except EntryReadError:
                found[path].append((case, backward))
    return found


def time_ratio(trial: "Trial", path: Path, tile: Any, rounds: int) -> float:
    """The time with ``tile`` over that with the present one, measured in turns; inf for a tile that will not do."""
    from benchmarks import measure

    def candidate() -> None:
        with override(path, tile):
            trial.run("ours")

    try:
        with override(path, tile):
            trial.check("ours")
        times = measure.alternate({"present": lambda: trial.run("ours"), "candidate": candidate}, rounds)
    except Exception as error:  # too much shared memory, a tile that the kernel cannot take, a wrong result
        measure.synchronize()  # raises if the failure was a crash that the device does not survive
        print(f"  left out: {type(error).__name__}: {str(error)[:100]}")
        return math.inf
    return measure.median_ratio(times["candidate"], times["present"])


def search(path: Path, trials: list["Trial"], steps: int, rounds: int, most: int | None = None) -> Any:
    """The best tile for an entry, by the geometric mean over the trials of its time over the present tile's.

    ``most`` limits the neighbours that are tried in a step.
    """
    best, best_score = entry(path), 1.0
    seen = {best}
    for _ in range(steps):
        start = best
        for tile in [t for t in neighbours(start) if t not in seen][:most]:
            seen.add(tile)
            ratios = [time_ratio(trial, path, tile, rounds) for trial in trials]
            score = math.inf if math.inf in ratios else statistics.geometric_mean(ratios)
            print(f"  {tile}: {score:.3f}", flush=True)
            if score < GAIN * best_score:
                best, best_score = tile, score
        if best == start:
            break
    return best


def dry_run_cases() -> list["Case"]:
    """Every operator at a size that the interpreter runs in a second."""
    from benchmarks import operator_cases as cases

    return [
        cases.channel_attention(1, 24, 6, 3, True),
        cases.upsample_add(1, 24, 6, 3, True),
        cases.cross_entropy(1, 5, 3, 8),
        cases.focal_loss(1, 3, 8),
        cases.multiscale_argmax(1, 5, 8, 16),
        cases.resize_normalize(1, (8, 12), (6, 10)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_blocks", description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="append", help="name of a table in tuning.py; default: all")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=30, help="calls timed for each candidate and shape")
    options = parser.parse_args()
    os.environ["DFN_KERNELS"] = "triton"
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from dfn_kernels import tuning

    from benchmarks import machine, measure, operator_cases

    if measure.DEVICE.type != "cuda" and not options.dry_run:
        parser.error("the search needs a GPU; --dry-run shows that it works")
    tables = {n: t for n, t in vars(tuning).items() if n.isupper() and (isinstance(t, dict) or is_tile(t))}
    chosen = options.table or list(tables)
    if unknown := set(chosen) - set(tables):
        parser.error(f"no table named {', '.join(unknown)} in tuning.py; it has {', '.join(tables)}")
    cases = dry_run_cases() if options.dry_run else list(operator_cases.gpu_cases())
    directions = [(case, backward) for case in cases for backward in ((False, True) if case.training else (False,))]
    paths = [path for name in chosen for path in entries(tables[name], (name,))]
    results = dict(tables)
    unread = []
    for path, used_by in users(paths, directions).items():
        print(f"{path}: {entry(path)}, read by {len(used_by)} calls", flush=True)
        if not used_by:
            unread.append(path)
            continue
        trials = [measure.Trial(*user) for user in used_by[: 1 if options.dry_run else None]]
        best = search(path, trials, 1, 1, 3) if options.dry_run else search(path, trials, 8, options.rounds)
        results[path[0]] = replaced(results[path[0]], path[1:], best)
    facts = machine.environment()
    print(f"\n# {facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {datetime.date.today()}")
    if options.dry_run:
        print("# A dry run: these times mean nothing, do not put the tables anywhere.")
    print(f"# Not searched, for no shape reads them: {', '.join(map(str, unread)) or 'none'}")
    for name in chosen:
        print(f"{name} = {results[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
