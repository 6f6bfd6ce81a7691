"""What the project promises, and the tests that keep each promise: the table of ``docs/promises.md``.

``python tests/promises.py`` writes that file, its numbers from pytest's own collection; test_promises.py fails if they
no longer fit.
"""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "promises.md"
HEAD = """\
# What is promised

<!-- made by python tests/promises.py: do not edit -->

Each row is a promise, the tests that keep it, and how many cases they have. Paths are below `tests/`; the last column
counts cases that need a GPU.
"""


@dataclass(frozen=True)
class Promise:
    """A promise, the tests that keep it (``file`` or ``file::function``, below tests/), and what one of them counts."""

    text: str
    tests: tuple[str, ...]
    within: str = ""  # what a single test goes through


PROMISES = [
    Promise("every operator equals its definition in float64, gradients included", (
        "kernels/test_channel_attention.py", "kernels/test_upsample_add.py", "kernels/test_cross_entropy.py",
        "kernels/test_focal_loss.py", "kernels/test_multiscale_argmax.py", "kernels/test_resize_normalize.py",
        "kernels/test_conv3x3.py",
    )),
    Promise("sides of 0 and 1, gaps, odd offsets, any strides: the right result, or an error with the operand's name", (
        "kernels/test_edges.py", "system/test_arrays.py",
    )),
    Promise("every kernel compiles for four architectures without spills", ("kernels/test_compile.py",)),
    Promise("debug mode names the operator of a device's error", (
        "kernels/test_debug.py", "kernels/test_sanitizer.py",
    )),
    Promise("the fast network equals the plain one: scores, losses, gradients, labels", (
        "network/test_fast.py", "network/test_fused.py", "trainer/test_step.py",
    )),
    Promise("a module that was changed after it was built has its effect, and its hooks fire, in every network", (
        "network/test_changed.py",
    )),
    Promise("a checkpoint, a run folder and a saved folder of an older layout load and resume", (
        "checkpoint/test_written_before.py",
    )),
    Promise("published checkpoints load; weights go to the plain network and back bit for bit", (
        "checkpoint/test_weights.py",
    )),
    Promise("a killed run continues, and ends with the bits of an undisturbed one", (
        "system/test_crash.py::test_ten_kills_change_no_bit",
        "system/test_crash.py::test_a_hundred_kills_change_no_bit",
        "system/test_crash.py::test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew",
    ), "100 kills"),
    Promise("a damaged checkpoint is named, and the one before taken", (
        "system/test_crash.py::test_a_damaged_last_checkpoint_is_named_and_the_one_before_continues",
        "system/test_crash.py::test_two_damaged_checkpoints_are_both_named", "checkpoint/test_checkpoint.py",
        "checkpoint/test_saving.py", "checkpoint/test_loading.py",
    )),
    Promise("a full disk, a read-only or removed folder is named, and the checkpoint stays", (
        "system/test_crash.py::test_a_file_that_cannot_be_written_is_named_and_the_checkpoint_stays",
        "system/test_crash.py::test_a_picture_that_cannot_be_written_is_named",
        "system/test_crash.py::test_a_folder_that_is_removed_during_the_run_is_named",
        "system/test_crash.py::test_a_checkpoint_that_meets_the_limit_midway_leaves_the_one_before",
    )),
    Promise("every broken file is read or refused by name, in bounded time and memory", (
        "system/test_fuzz.py",
    ), "3,000 files"),
    Promise("hostile images, lists, names and checkpoints are refused by name", ("data/test_hostile.py",)),
    Promise("a loading process that dies or hangs is reported with its sample", ("data/test_loader.py",)),
    Promise("N processes compute what one does, and go on after one is killed", ("system/test_distributed.py",)),
    Promise("the same bits twice with `--deterministic`", ("system/test_determinism.py",)),
    Promise("memory, file handles and threads stay flat", ("system/test_long_runs.py",), "2,000 steps, 500 images"),
    Promise("losses, gradients and weights that are not finite stop the run, with a diagnosis", (
        "trainer/test_training.py", "trainer/test_step.py",
    )),
    Promise("one window or batch or graph more or less changes no label", (
        "inference/test_predictor.py", "inference/test_windows.py", "inference/test_engine.py",
        "runtime/test_graph_cache.py", "runtime/test_graph_cache_on_a_gpu.py",
    )),
    Promise("exported programs compute what the network does", ("export/test_export.py",)),
]  # fmt: skip


def belongs(node: str, test: str) -> bool:
    """Whether a collected ``tests/file.py::name[case]`` is one of a test's cases."""
    return node.split("[")[0].startswith(f"tests/{test}::") or node.split("[")[0] == f"tests/{test}"


def table(cases: Iterable[str], on_a_gpu: Iterable[str]) -> str:
    """Markdown, from the names of all cases and of those that want a GPU."""
    gpu = set(on_a_gpu)
    cases = list(cases)
    lines = ["| promise | kept by | cases | on a GPU |", "|---|---|---:|---:|"]
    for promise in PROMISES:
        found = [node for node in cases if any(belongs(node, test) for test in promise.tests)]
        more = len([node for node in found if node in gpu])
        files = ", ".join(dict.fromkeys(f"`{test.split('::')[0]}`" for test in promise.tests))
        within = f" ({promise.within})" if promise.within else ""
        lines.append(f"| {promise.text} | {files} | {len(found) - more:,}{within} | {more or '-'} |")
    return "\n".join(lines)


def collected(marks: str = "") -> list[str]:
    """The names of the tests that pytest finds, of both tiers: all of them, or those with ``marks``."""
    listing = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def page(cases: Iterable[str], on_a_gpu: Iterable[str]) -> str:
    """The whole file."""
    return f"{HEAD}\n{table(cases, on_a_gpu)}\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(collected(), collected("gpu")), encoding="utf-8")
