"""``python kill_chain.py FOLDER KILLS SEED``: trains, kills with SIGKILL and resumes until there are KILLS kills.

An undisturbed run goes first. Chains follow: in a chain, each process resumes the run and is killed, until one reaches
the end. The result is compared with the undisturbed run. The counts of kills and of what they hit are printed as JSON.

Each process of a run is a fork of this one, which has already done the one-time work: the imports, including PyTorch's
lazy ones, and oneDNN's kernels. There are three kinds of kill:

- ``time``: after a random time, anywhere in the run;
- ``file``: as soon as a temporary file appears in the folder, or up to 3 ms later;
- ``call``: the process kills itself during a random write, or before or after a random call such as fsync or replace.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from tqdm import tqdm

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.train import __main__ as train
from dfn_fast.train.folder import RunFolder
from support.runs import SMALL_RUN, differences, small_runs, timeless_metrics

KINDS = ("time", "file", "call")


class SelfKill:
    """Kills its process during a random write, or before or after a random call such as fsync or replace."""

    def __init__(self, rng: random.Random):
        name = rng.choice(["write", "fsync", "replace", "link", "unlink", "chmod"])
        self.calls, self.after = rng.randrange(500 if name == "write" else 6), rng.random() < 0.5
        if name == "write":
            fdopen = os.fdopen
            os.fdopen = lambda *a: self.file(fdopen(*a))
        else:
            setattr(os, name, self.counted(getattr(os, name)))

    def file(self, file):
        """``file``, which contains half of a write when the process dies."""

        def write(data, plain=file.write):
            half = len(data) // 2
            plain(bytes(data)[:half])
            file.flush()
            self.tick()
            return half + plain(bytes(data)[half:])

        proxy = Proxy(file)
        proxy.write = write
        return proxy

    def counted(self, call: Callable) -> Callable:
        def run(*args, **kwargs):
            if not self.after:
                self.tick()
            result = call(*args, **kwargs)
            if self.after:
                self.tick()
            return result

        return run

    def tick(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Proxy:
    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


SAVED = {0, 2, 3, 4, 6, 8, 9, 10, 12}  # the iterations after which SMALL_RUN saves


class Chain:
    """A run in ``folder``, and the processes that work on it."""

    def __init__(self, folder: Path, rng: random.Random, found: Counter):
        self.run, self.rng, self.found = RunFolder(folder), rng, found
        self.log = folder.with_suffix(".log")
        self.reached = 0  # the iteration of the newest checkpoint after a kill

    def start(self, kind: str | None = None) -> int:
        """Forks a process that begins or resumes the run."""
        resume = ["--resume"] if self.run.config_file.exists() else []
        seed = self.rng.random()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout.reconfigure(line_buffering=True)  # its output must be in the log when it dies
            if kind == "call":
                SelfKill(random.Random(seed))
            code = train.main([*SMALL_RUN.split(), "--output-dir", str(self.run.path), *resume])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def disturbed(self, kind: str, longest: float) -> bool:
        """Lets a process work until it is killed. Returns False if it finished the run first."""
        before = self.leftovers()
        process = self.start(kind)
        kill_at = time.monotonic() + self.rng.uniform(0, longest)
        if kind == "file":
            kill_at = self.see_write(process, kill_at, before) + self.rng.choice([0, self.rng.uniform(0, 0.003)])
        while kind != "call" and time.monotonic() < kill_at and not ended(process):
            time.sleep(0.0005)
        if kind != "call":
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.waitstatus_to_exitcode(status) == 0, self.log.read_text()
        if killed:
            self.found["kills"] += 1
            self.found[f"{kind} kills"] += 1
            self.found["in a write"] += bool(self.leftovers() - before)
        return killed

    def see_write(self, process: int, from_then: float, before: set[str]) -> float:
        """Waits for a temporary file, at ``from_then`` or later, or for the end of the process. Returns the time."""
        while not ended(process):
            if time.monotonic() >= from_then and self.leftovers() - before:
                break
        return time.monotonic()

    def leftovers(self) -> set[str]:
        return {path.name for path in self.run.path.glob(".*.tmp")}

    def check_after_kill(self) -> None:
        """Checks that a whole checkpoint exists once the run has said that it trains, and that none is damaged."""
        names = [path for path in (self.run.last, self.run.previous) if path.exists()]
        said_so = self.log.exists() and "training FastDFN" in self.log.read_text()
        assert names or not said_so, "no checkpoint"
        self.found["before the first checkpoint"] += not names
        self.found["between two names"] += len(names) == 2 and os.path.samefile(*names)
        saved = [read_file(path)["position"]["iteration"] for path in names]
        assert set(saved) <= SAVED, "an iteration at which nothing is saved"
        assert max(saved, default=0) >= self.reached, "a checkpoint is lost"
        self.reached = max(saved, default=0)


def ended(process: int) -> bool:
    """Whether a child has ended. Leaves it for ``waitpid``."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def compare(run: RunFolder, straight: RunFolder) -> None:
    for name in ("last", "best"):
        found = differences(read_file(getattr(straight, name)), read_file(getattr(run, name)))
        assert found == [], f"{name}: {found}"
    assert timeless_metrics(run) == timeless_metrics(straight)
    assert set(os.listdir(run.path)) == set(os.listdir(straight.path))
    summaries = [json.loads(r.summary_file.read_text()) for r in (run, straight)]
    assert summaries[0]["per_class_iou"] == summaries[1]["per_class_iou"]


def timed_run(chain: Chain) -> float:
    """How long an undisturbed run takes, in seconds."""
    start = time.monotonic()
    _, status = os.waitpid(chain.start(), 0)
    assert status == 0, chain.log.read_text()
    return time.monotonic() - start


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # a fork loses its parent's threads, so there must be none
    cv2.setNumThreads(0)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its default is a semaphore that forks share: a killed one would keep it
    rng, found = random.Random(seed), Counter()
    straight = Chain(folder / "straight", rng, found)
    with contextlib.redirect_stdout(sys.stderr):
        assert train.main([*SMALL_RUN.split(), "--output-dir", str(straight.run.path)]) == 0
    assert len(os.listdir("/proc/self/task")) == 1
    duration = timed_run(Chain(folder / "again", rng, found))
    chains = 0
    while found["kills"] < kills:
        chains += 1
        chain = Chain(folder / f"chain-{chains}", rng, found)
        while chain.disturbed(rng.choice(KINDS), 0.6 * duration):
            chain.check_after_kill()
        compare(chain.run, straight.run)
    print(json.dumps({**found, "chains": chains, "seconds of the run": duration}))


if __name__ == "__main__":
    with small_runs():
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
