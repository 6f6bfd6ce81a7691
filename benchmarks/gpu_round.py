"""``python -m benchmarks.gpu_round --output DIR [--minutes M] [--steps NAME...]``: all that needs a GPU, in order.

First come correctness tests, then the parts that decide the speed, block sizes, speeds, and training runs. A GPU is
often lent for minutes: no step begins that is expected to end after ``--minutes``, and each is stopped at its own limit
(its measurements until then are kept). The last lines name the remaining steps, as the options of the next call.
``DIR`` gets ``STEP.log``, ``STEP.json`` (for ``python -m benchmarks.record``), ``results`` (the step's files from
``benchmarks/results/``) and ``round.json``.

``--list`` shows the steps; ``--dry-run`` runs them as they are on a machine without a GPU, where tests are skipped and
benchmarks take a CPU's sizes.
"""

import contextlib
import dataclasses
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.results import RESULTS
from dfn_fast import cli
from dfn_fast.errors import ConfigError
from dfn_fast.files import write_json

ROOT = RESULTS.parent.parent
GRACE = 30.0  # seconds to end after the request to stop, in which pytest still writes its results


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, the minutes that it should take, those after which it is stopped, and the question it answers."""

    name: str
    minutes: float
    answers: str
    command: str  # {json} and {camvid} are filled in
    limit: float = 0.0  # minutes; 0: twice those expected

    @property
    def stopped_after(self) -> float:
        return self.limit or 2 * self.minutes


TESTS = "pytest -q -rfE"
BENCH = "pytest --benchmark-only -q --benchmark-json {json}"
QUICK = BENCH + " --compile-mode default"
LEARN = "python -m benchmarks.learning camvid --root {camvid} --epochs 40"
SANITIZER = "tests/kernels/test_sanitizer.py"
COMPILING = "tests/kernels/test_compile.py"  # minutes, and asks no GPU
R101 = '"R101 and bfloat16 and 512x512 and not scales"'
STEPS = [
    Step("tests", 2.5, "parity, capture, determinism, 2^31 elements", TESTS + ' {parallel} -m "gpu and not slow"'),
    Step(
        "kernels",
        2,
        "the kernels' other tests, not in the interpreter",
        f'{TESTS} {{parallel}} -m "not gpu" tests/kernels --ignore {COMPILING}',
    ),
    Step("step", 3, "DFN-R101, batch 32, bf16", BENCH + ' benchmarks/test_training_step.py -k "R101 and bf16"'),
    Step("inference", 2, "DFN-R101, batch 1 and 16, bf16", f"{QUICK} benchmarks/test_inference.py -k {R101}"),
    Step("convolutions", 1.5, "in bf16", BENCH + ' benchmarks/test_convolutions.py -k "bfloat16 or algorithms"'),
    Step("search", 4, "block sizes", "python -m benchmarks.search_blocks --minutes 3", 6),
    Step("operators", 2, "each beside torch.compile as it comes", QUICK + " benchmarks/test_operators.py", 5),
    Step("breakdown", 1.5, "where the time goes", "python -m benchmarks.breakdown"),
    Step("scales", 1.5, "five scales and their mirror images", BENCH + " benchmarks/test_inference.py -k scales"),
    Step("waterfall-inference", 2, "batch 16", "python -m benchmarks.waterfall --only inference"),
    Step("waterfall-single", 2, "batch 1", "python -m benchmarks.waterfall --only inference --batch 1"),
    Step("waterfall-training", 4, "batch 32", "python -m benchmarks.waterfall --only training"),
    Step("learning-r18", 4, "CamVid, ours against the compiled reference", LEARN + " --backbone resnet18"),
    Step("sanitizer", 3, "memcheck and racecheck", f"{TESTS} {SANITIZER}"),
    Step("slow-tests", 4, "long runs", f'{TESTS} -m "gpu and slow" --ignore {SANITIZER}'),
    Step("learning-r101", 8, "the same with DFN-R101", LEARN),
    Step("float16", 4, "the training step in fp16", "python -m benchmarks.waterfall --only training --amp fp16"),
    Step("all-steps", 8, "every training step", BENCH + " benchmarks/test_training_step.py"),
    Step("all-inference", 8, "every inference", BENCH + " benchmarks/test_inference.py"),
    Step("all-operators", 8, "beside all that torch.compile can try", BENCH + " benchmarks/test_operators.py"),
    Step("rest", 8, "loader and start-up", BENCH + " benchmarks/test_data.py benchmarks/test_startup.py"),
]


def command_of(step: Step, output: Path, camvid: str) -> str:
    """The step's command line, in shell syntax."""
    words = {
        "json": shlex.quote(str(output / f"{step.name}.json")),
        "camvid": shlex.quote(camvid),
        "parallel": "-n 6" if importlib.util.find_spec("xdist") else "",
    }
    program, rest = step.command.format(**words).split(" ", 1)
    return f"{shlex.quote(sys.executable)} {'-m pytest ' if program == 'pytest' else ''}{rest}"


def run(step: Step, output: Path, camvid: str, seconds: float) -> dict[str, Any]:
    """Runs a step for at most ``seconds``. Returns its exit code, time and last line."""
    log = output / f"{step.name}.log"
    start = time.monotonic()
    stopped = False
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command_of(step, output, camvid)),  # no shell: it would end at the signal, before the step does
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            stop(process)
        except BaseException:
            stop(process)
            raise
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = {"step": step.name, "exit_code": process.returncode, "stopped": stopped}
    return found | {"minutes": round((time.monotonic() - start) / 60, 2), "last_line": lines[-1] if lines else ""}


def stop(process: subprocess.Popen) -> None:
    """Asks the step to end, as Ctrl-C does, waits up to :data:`GRACE` seconds, and kills the rest of it."""
    send(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    send(process, signal.SIGKILL)
    process.wait()


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to the step and to every process that it started and that still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def copy_results(output: Path, since: float) -> None:
    """Copies the steps' result files to a folder beside the logs."""
    for path in RESULTS.rglob("*"):
        if path.is_file() and path.stat().st_mtime >= since:
            target = output / "results" / path.relative_to(RESULTS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def go(steps: list[Step], output: Path, minutes: float, camvid: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs the steps that fit into ``minutes``. Returns the result of each, and the names of the others."""
    start, begun = time.monotonic(), time.time()
    output.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    left: list[str] = []
    for step in steps:
        remaining = minutes - (time.monotonic() - start) / 60
        if step.minutes > remaining or ("{camvid}" in step.command and not camvid):
            left.append(step.name)
            continue
        print(f"{step.name}: {step.answers}, about {step.minutes:g} minutes", flush=True)
        found = run(step, output, camvid, 60 * min(step.stopped_after, remaining))
        done.append(found)
        how = "stopped" if found["stopped"] else f"exit {found['exit_code']}"
        print(f"  {how} after {found['minutes']:.1f} minutes: {found['last_line'][:200]}", flush=True)
        copy_results(output, begun)
        write_json(output / "round.json", {"steps": done, "left": left})
    return done, left


def listed() -> str:
    return "\n".join(f"{step.name:20} {step.minutes:4g} min  {step.answers}" for step in STEPS)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.gpu_round",
        usage="%(prog)s --output DIR [options]",
        description="Tests, searches, benchmarks and training runs that need a GPU, the most important first.",
    )
    add = parser.add_argument
    names = [step.name for step in STEPS]
    add("--output", type=Path, metavar="DIR", help="folder of logs and results")
    add(
        "--minutes",
        type=float,
        default=60.0,
        metavar="M",
        help="limit for all steps together, plus half a minute to end the last (default: 60)",
    )
    add("--steps", nargs="+", metavar="NAME", help="run only these, in this order (default: all)")
    add("--camvid", default="", metavar="DIR", help="folder of the CamVid images; without it nothing is trained")
    add("--list", action="store_true", help="show the steps and what each answers")
    add("--dry-run", action="store_true", help="run the steps without a GPU, to see that they run")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(listed())
        return 0
    if unknown := set(arguments.steps or []) - set(names):
        raise ConfigError(f"--steps {' '.join(sorted(unknown))}: no such step; there are {', '.join(names)}")
    if arguments.output is None:
        parser.error("--output DIR is missing: a folder for logs and results")
    if not torch.cuda.is_available() and not arguments.dry_run:
        raise ConfigError("PyTorch finds no GPU here; --dry-run runs the steps without one")
    by_name = {step.name: step for step in STEPS}
    steps = [by_name[name] for name in arguments.steps or names]
    done, left = go(steps, arguments.output.resolve(), arguments.minutes, arguments.camvid)
    failed = [found["step"] for found in done if found["exit_code"] or found["stopped"]]
    print(f"failed or stopped: {', '.join(failed) or 'none'}")
    if left:
        print(f"left: --steps {' '.join(left)}")
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main)
