"""``python -m benchmarks.learning RECIPE [--root DIR] [options of training]``: trains the plain network and ours, and
compares what each learns in its time.

Both start from the same seed, and so from the same weights and the same order of images. ``compile`` is
``ReferenceDFN`` compiled (on a CPU ``eager``, which is faster there), ``ours`` is ``FastDFN`` with its defaults. Each
run keeps the validation mIoU after every epoch with the seconds of training until then (compiling included), and the
mIoU of its last checkpoint at one scale, and at the paper's five with flip. The rows go to ``benchmarks/results/``;
``python -m benchmarks.report`` puts them into ``RESULTS.md``.
"""

import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import DEVICE
from benchmarks.reporting.results import RESULTS, machine_facts, merge, rounded
from dfn_fast import cli
from dfn_fast.errors import UserError
from dfn_fast.train.folder import RunFolder

FIVE_SCALES = ["--scales", "0.5", "0.75", "1", "1.5", "1.75", "--flip"]
CPU = DEVICE.type == "cpu"
RUNS = {
    "eager" if CPU else "compile": ["--model", "reference", "--no-compile" if CPU else "--compile"],
    "ours": ["--model", "fast"],
}


def learn(recipe: str, options: list[str], runs: Path) -> list[dict[str, Any]]:
    """Trains and evaluates each run in a process of its own. Returns their rows."""
    rows = []
    for name, how in RUNS.items():
        folder = RunFolder(runs / name)
        call("train", recipe, "--output-dir", str(folder.path), *how, *options)
        rows.append(row_of(name, folder))
        shutil.rmtree(folder.path)  # its checkpoints are large
    return rows


def row_of(name: str, folder: RunFolder) -> dict[str, Any]:
    """The row of a finished run."""
    config, summary = folder.config(), json.loads((folder.path / "summary.json").read_text())
    validations = [found for found in folder.metrics() if found["kind"] == "val"]
    return {
        "group": f"{config.recipe} DFN-R{config.backbone[6:]} {len(validations)} epochs",
        "implementation": name,
        "mean_iou": evaluate(folder, []),
        "mean_iou_five_scales": evaluate(folder, FIVE_SCALES),
        "best_mean_iou": summary["best_mean_iou"],
        "seconds": summary["seconds"],
        "images_per_s": summary["images_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "execution": ", ".join(f"{key} {value}" for key, value in summary["execution"].items()),
        "curve": [[found["epoch"], round(found["seconds"], 2), round(found["mean_iou"], 5)] for found in validations],
    }


def evaluate(folder: RunFolder, options: list[str]) -> float:
    """mIoU of the last checkpoint on the validation split."""
    config, scores = folder.config(), folder.path / "scores.json"
    root = ["--root", config.root] if config.root else []
    split = ["--split", config.val_split, "--no-boundary", "--json", str(scores)]
    call("evaluate", str(folder.last), *root, *split, *options)
    return json.loads(scores.read_text())["mean_iou"]


def call(module: str, *words: str) -> None:
    """Runs one of our command lines. Raises UserError if it fails."""
    command = [sys.executable, "-m", f"dfn_fast.{module}", *words]
    print("+", *command[1:], flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"python -m dfn_fast.{module} ended with exit code {code}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.learning",
        usage="%(prog)s RECIPE [--root DIR] [options of dfn_fast.train]",
        description="Train the plain network and ours, and compare what each learns in its time.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe, as for `python -m dfn_fast.train`")
    arguments, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as runs:
        rows = learn(arguments.recipe, options, Path(runs))
    for row in rows:
        print(
            f"{row['group']}, {row['implementation']}: mIoU {row['mean_iou']:.4f}, five scales and flip "
            f"{row['mean_iou_five_scales']:.4f}, {row['seconds']:.0f} s, {row['images_per_s']:.1f} images/s"
        )
    rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
    path = merge(machine_facts(), datetime.date.today().isoformat(), {"learning": rows})
    print(path.relative_to(RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    cli.run(main)
