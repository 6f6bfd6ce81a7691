"""``python -m benchmarks.compare BASE HEAD``: times two git revisions in turns, for a change that claims speed.

Each revision is checked out in a temporary folder, with its own benchmarks. The two take turns, in processes of their
own, so that drift of the machine affects both alike. For each benchmark that both have, prints HEAD's time as a share
of BASE's: the median over the rounds, and its spread. Uncommitted changes are not included.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dfn_fast import cli
from dfn_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
Times = dict[str, float]  # seconds by the benchmark's name


@contextlib.contextmanager
def checkouts(revisions: list[str]) -> Iterator[list[Path]]:
    """A folder for each revision. Raises ConfigError for one that git does not know."""
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder, f"{i}") for i in range(len(revisions))]
        try:
            for revision, tree in zip(revisions, trees, strict=True):
                done = git("worktree", "add", "--detach", str(tree), revision)
                if done.returncode:
                    raise ConfigError(f"{revision}: git cannot check it out ({done.stderr.strip()})")
            yield trees
        finally:
            for tree in trees:
                git("worktree", "remove", "--force", str(tree))
            git("worktree", "prune")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def run(tree: Path, suites: list[str], keyword: str | None) -> Times:
    """The median times of ``ours`` in a checkout. Raises ConfigError if the run gives none."""
    result = tree / "result.json"
    command = [sys.executable, "-m", "pytest", *(f"benchmarks/{suite}.py" for suite in suites)]
    command += ["--benchmark-only", "-q", "-p", "no:cacheprovider", f"--benchmark-json={result}"]
    command += ["-k", f"ours and ({keyword})" if keyword else "ours"]
    # The checkout's packages before those that are installed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    try:
        benchmarks = json.loads(result.read_text())["benchmarks"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"the benchmarks of {tree} gave no result:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        ) from None
    return {benchmark["fullname"]: benchmark["stats"]["median"] for benchmark in benchmarks}


def ratios(base: list[Times], head: list[Times]) -> dict[str, list[float]]:
    """HEAD's share of BASE's time in each round, by benchmark, if every round has the benchmark."""
    names = [name for name in base[0] if all(name in times for times in [*base, *head])]
    return {name: [h[name] / b[name] for b, h in zip(base, head, strict=True)] for name in names}


def table(found: dict[str, list[float]]) -> str:
    """The table, largest slowdown first, with a mark if every round agrees on the direction."""
    lines = [f"{'benchmark':88} {'HEAD / BASE':>11} {'from':>6} {'to':>6}"]
    for name, values in sorted(found.items(), key=lambda item: -statistics.median(item[1])):
        low, high = min(values), max(values)
        verdict = "slower" if low > 1 else "faster" if high < 1 else ""
        lines.append(
            f"{name.split('::')[-1][:88]:88} {statistics.median(values):11.3f} {low:6.3f} {high:6.3f} {verdict}"
        )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds {arguments.rounds}: expected 1 or more")
    with checkouts([arguments.base, arguments.head]) as trees:
        times: tuple[list[Times], list[Times]] = ([], [])
        for i in range(arguments.rounds):
            for which in (0, 1)[:: -1 if i % 2 else 1]:
                times[which].append(run(trees[which], arguments.suite, arguments.keyword))
            print(f"round {i + 1} of {arguments.rounds}", file=sys.stderr)
    found = ratios(*times)
    if not found:
        raise ConfigError("the two revisions have no benchmark in common; choose others with --suite and -k")
    print(table(found))
    return 0


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(
        prog="python -m benchmarks.compare",
        usage="%(prog)s BASE HEAD [options]",
        description="Benchmark two git revisions in alternation.",
    )
    result.add_argument("base", metavar="BASE", help="revision to compare with, such as main")
    result.add_argument("head", metavar="HEAD", help="revision with the change, such as HEAD")
    result.add_argument(
        "--suite", nargs="+", default=["test_operators"], metavar="NAME", help="files (default: test_operators)"
    )
    result.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="select benchmarks, as pytest's -k does")
    result.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    return result


if __name__ == "__main__":
    cli.run(main)
