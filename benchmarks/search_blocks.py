"""Searches the block sizes of ``dfn_kernels.tuning`` on this GPU and prints the tables to put there.

``python -m benchmarks.search_blocks [--table POOL] [--minutes M] [--dry-run]``. Each entry of a table starts from its
current value. Its neighbours (a number halved or doubled, or one halved and another doubled) are timed at every shape
of DFN-R101 that reads the entry, and the best starts the next step, until none is better by two percent. A candidate
that does not compile, or whose result differs from the definition's, is left out. All entries take a step together:
several processes first compile their candidates into Triton's cache, then each is timed with the GPU to itself. The
tables so far are printed after each step, so that an interrupted search leaves something. ``--dry-run`` tries three
neighbours at tiny shapes in Triton's interpreter: its times mean nothing, but it shows that the search works.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.harness.measure import Case, Trial

GAIN = 0.98  # a candidate replaces the present tile if it takes less than this share of its time
HOPELESS = 1.15  # one that takes more than this many times its time in a few calls is not timed in more
WARPS = 16
STEPS = 8
Path = tuple[Any, ...]  # a table's name, then the keys that lead to a tile


class Watched:
    """A tile that calls ``when_read`` when any of its numbers is read."""

    def __init__(self, tile: Any, when_read: Callable[[], None]) -> None:
        self._watched = tile, when_read

    def __getattr__(self, name: str) -> Any:
        tile, when_read = self._watched
        when_read()
        return getattr(tile, name)

    def __iter__(self) -> Iterator[Any]:
        tile, when_read = self._watched
        when_read()
        return iter(tile)


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
    """A context manager in which the kernels launch with ``tile`` at ``path``."""
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
    from benchmarks.harness.measure import Trial

    found: dict[Path, list[tuple[Case, bool]]] = {path: [] for path in paths}
    for case, backward in cases:
        read: set[Path] = set()
        with contextlib.ExitStack() as watching:
            for path in paths:
                watching.enter_context(override(path, Watched(entry(path), functools.partial(read.add, path))))
            Trial(case, backward).run("ours")
        for path in read:
            found[path].append((case, backward))
    return found


def time_ratio(trial: "Trial", path: Path, tile: Any, rounds: int) -> float:
    """The time with ``tile`` over that with the present one, measured in turns; inf if the tile fails."""
    from benchmarks.harness import measure

    def candidate() -> None:
        with override(path, tile):
            trial.run("ours")

    calls = {"present": lambda: trial.run("ours"), "candidate": candidate}
    try:
        with override(path, tile):
            trial.check("ours")
        for calls_each in (max(rounds // 6, 1), rounds):
            times = measure.alternate(calls, calls_each)
            ratio = measure.median_ratio(times["candidate"], times["present"])
            if ratio > HOPELESS:
                break
    except Exception as error:  # too much shared memory, a tile that the kernel cannot take, a wrong result
        measure.synchronize()  # raises if the failure was a crash that the device does not survive
        print(f"  left out: {type(error).__name__}: {str(error)[:100]}")
        return math.inf
    return ratio


@dataclass
class Search:
    """The search for one entry's best tile, from its present one. A tile's score is its time over the present tile's,
    as a geometric mean over the calls that read the entry."""

    path: Path
    users: list[tuple["Case", bool]]
    best: Any
    score: float = 1.0
    seen: set[Any] = field(default_factory=set)

    def candidates(self, most: int | None = None) -> list[Any]:
        """The untried neighbours of the best tile, at most ``most``. If there are none, the search is over."""
        self.seen.add(self.best)
        return [tile for tile in neighbours(self.best) if tile not in self.seen][:most]

    def step(self, trials: list["Trial"], tiles: list[Any], rounds: int) -> None:
        """Times ``tiles`` and keeps the best. A step that gains nothing ends the search."""
        start = self.best
        for tile in tiles:
            self.seen.add(tile)
            ratios = [time_ratio(trial, self.path, tile, rounds) for trial in trials]
            score = math.inf if math.inf in ratios else statistics.geometric_mean(ratios)
            print(f"  {tile}: {score:.3f}", flush=True)
            if score < GAIN * self.score:
                self.best, self.score = tile, score
        if self.best == start:
            self.seen.update(neighbours(start))


def search(searches: list[Search], steps: int, rounds: int, most: int | None = None) -> Iterator[int]:
    """Advances all searches together, to their ends or for ``steps`` steps. Yields each step's number after it.

    ``most`` limits the neighbours that are tried in a step.
    """
    from benchmarks.harness.measure import Trial

    with compilers() as compile_ahead:
        for number in range(1, steps + 1):
            waiting = [(entry, entry.candidates(most)) for entry in searches]
            if not any(tiles for _, tiles in waiting):
                return
            compile_ahead([(entry.path, tile) for entry, tiles in waiting for tile in tiles])
            for entry, tiles in waiting:
                if tiles:
                    print(f"{entry.path}: {entry.best}, read by {len(entry.users)} calls", flush=True)
                    entry.step([Trial(*user) for user in entry.users], tiles, rounds)
            yield number


@contextlib.contextmanager
def compilers() -> Iterator[Any]:
    """A function that compiles candidates, ``[(path, tile)]``, in several processes; on a CPU it does nothing."""
    from benchmarks.harness.measure import DEVICE

    if DEVICE.type != "cuda":
        yield lambda candidates: None
        return
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))  # each takes some gigabytes of the GPU's memory
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield lambda candidates: list(pool.map(_compile, candidates))


def _compile(candidate: tuple[Path, Any]) -> None:
    """Runs each trial that reads an entry once with a candidate, to cache its kernels, unless they fail."""
    path, tile = candidate
    for trial in _trials_that_read(path):
        with contextlib.suppress(Exception), override(path, tile):
            trial.run("ours")


@functools.lru_cache(maxsize=1)
def _trials_that_read(path: Path) -> list["Trial"]:
    from benchmarks.harness.cases import gpu_cases
    from benchmarks.harness.measure import Trial

    return [Trial(*user) for user in users([path], directions(gpu_cases()))[path]]


def directions(cases: Iterator["Case"] | list["Case"]) -> list[tuple["Case", bool]]:
    """Each case forward, and forward with backward if it trains."""
    return [(case, backward) for case in cases for backward in ((False, True) if case.training else (False,))]


def dry_run_cases() -> list["Case"]:
    """Every operator at a size that the interpreter runs in a second."""
    from benchmarks.harness import cases as cases

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
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no step after this many minutes")
    options = parser.parse_args()
    os.environ["DFN_KERNELS"] = "triton"
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks.harness import cases as operator_cases
    from benchmarks.harness import measure
    from dfn_kernels import tuning

    if measure.DEVICE.type != "cuda" and not options.dry_run:
        parser.error("the search needs a GPU; --dry-run shows that it works")
    tables = {n: t for n, t in vars(tuning).items() if n.isupper() and (isinstance(t, dict) or is_tile(t))}
    chosen = options.table or list(tables)
    if unknown := set(chosen) - set(tables):
        parser.error(f"no table named {', '.join(unknown)} in tuning.py; it has {', '.join(tables)}")
    start = time.monotonic()
    cases = directions(dry_run_cases() if options.dry_run else operator_cases.gpu_cases())
    read = users([path for name in chosen for path in entries(tables[name], (name,))], cases)
    unread = [path for path, used_by in read.items() if not used_by]
    few = 1 if options.dry_run else None
    searches = [Search(path, used_by[:few], entry(path)) for path, used_by in read.items() if used_by]
    steps, rounds, most = (1, 1, 3) if options.dry_run else (STEPS, options.rounds, None)
    for number in search(searches, steps, rounds, most):
        minutes = (time.monotonic() - start) / 60
        print_tables({name: tables[name] for name in chosen}, searches, unread, f"step {number}, {minutes:.1f} minutes")
        if minutes > options.minutes:
            print(f"# Stopped by --minutes {options.minutes:g}: not every search has ended.")
            break
    if options.dry_run:
        print("# A dry run: these times mean nothing, do not put the tables anywhere.")
    return 0


def print_tables(tables: dict[str, Any], searches: list[Search], unread: list[Path], when: str) -> None:
    """The tables with the best tiles so far, to be put into tuning.py, and what each entry has won."""
    from benchmarks.harness import machine

    facts = machine.environment()
    results = dict(tables)
    for found in searches:
        results[found.path[0]] = replaced(results[found.path[0]], found.path[1:], found.best)
    print(f"\n# {facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {datetime.date.today()}, {when}")
    print(f"# Not searched, because no shape reads them: {', '.join(map(str, unread)) or 'none'}")
    for found in searches:
        print(f"# {found.path}: {found.score:.3f} of the time of the tile before")
    for name, table in results.items():
        print(f"{name} = {table}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
