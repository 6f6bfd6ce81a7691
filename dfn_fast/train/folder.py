"""The folder of a training run: configuration, metrics, checkpoints, summary. No run overwrites another one's.

::

    runs/voc/
      config.json          the configuration: `--config` starts another run from it
      last.pth  best.pth   checkpoints: `--resume` continues from the last
      previous.pth         the one before the last, for when that is damaged
      metrics.jsonl        a line every few iterations, a line a validation
      summary.json  curves.png  predictions.png      at the end
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfn_fast.checkpoint.archive import read_file, save_atomic
from dfn_fast.config import TrainConfig, load_config
from dfn_fast.errors import CheckpointError, ConfigError, OutputError
from dfn_fast.files import finite, write_json, write_text


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.last = self.path / "last.pth"
        self.previous = self.path / "previous.pth"
        self.best = self.path / "best.pth"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.last_is_whole = True  # False: it was found damaged, and must not take the place of the one before

    def require_no_run(self) -> None:
        if self.config_file.exists() or self.last.exists() or self.previous.exists():
            raise ConfigError(
                f"--output-dir {self.path} holds a run already; add --resume to continue it, or choose another folder"
            )

    def start(self, config: TrainConfig) -> None:
        """Makes the folder for a new run; one that holds a run, or cannot be written, is an error."""
        self.require_no_run()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config_file, config.to_dict())
        except OSError as error:
            raise ConfigError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); choose another"
            ) from error

    def config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        if not self.config_file.exists():
            raise ConfigError(f"--resume: {self.path} holds no run (no config.json); start it without --resume")
        return load_config(self.config_file)

    def save_last(self, content: dict[str, Any]) -> None:
        """``content`` as last.pth; what that was becomes previous.pth. At every moment one of the two is whole."""
        save_atomic(content, self.last, self.previous if self.last_is_whole else None)
        self.last_is_whole = True

    def read_last(self) -> dict[str, Any] | None:
        """The content of last.pth; where that is missing or damaged, which is said, of previous.pth. None: the run
        was killed before its first checkpoint. Raises :class:`CheckpointError` with both where neither can be used.
        """
        errors = []
        for path in (self.last, self.previous):
            try:
                content = training_checkpoint(path)
            except CheckpointError as error:
                errors.append(str(error))
                continue
            if errors:
                self.last_is_whole = False
                print(f"{errors[0]}\ncontinuing from {path}", file=sys.stderr)
            return content
        if self.last.exists() or self.previous.exists():
            raise CheckpointError("\n".join([*errors, "start a new run, from the weights of best.pth with --weights"]))
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; a value that is not finite becomes null."""
        with naming(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut short, or is no record, is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and "kind" in record:
                    records.append(record)
        return records

    def forget_after(self, iteration: int, epochs: int) -> None:
        """Drops metrics later than the checkpoint that a resumed run continues from: they will be made again.

        ``iteration`` steps are behind it and ``epochs`` validations.
        """
        for leftover in self.path.glob(".*.tmp"):  # of a run that was killed while it wrote
            with naming(leftover):
                leftover.unlink()
        limits = {"train": ("iteration", iteration), "val": ("epoch", epochs)}
        kept = []
        for record in self.metrics():
            name, limit = limits.get(str(record["kind"]), ("", 0))
            if isinstance(record.get(name), int) and record[name] <= limit:
                kept.append(record)
        with naming(self.metrics_file):
            write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        with naming(self.summary_file):
            write_json(self.summary_file, summary)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an ``OSError`` in the block an :class:`OutputError` about ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); free some space, or let the folder "
            "exist and be writable, and continue with --resume"
        ) from error


def training_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that a run can continue from."""
    content = read_file(path)
    if "position" not in content or "optimizer" not in content:
        raise CheckpointError(f"{path}: expected a training checkpoint, got weights alone; use --weights")
    return content


def default_folder(recipe: str, resume: bool) -> Path:
    """``runs/RECIPE``, or the first free ``runs/RECIPE-N``; to resume, the one of these that was saved to last."""
    runs = Path("runs")
    taken = []
    if runs.is_dir():
        taken = [p for p in runs.iterdir() if re.fullmatch(rf"{re.escape(recipe)}(-\d+)?", p.name) and any(p.iterdir())]
    if resume:
        files = ("last.pth", "previous.pth", "config.json")
        saved = [p / name for p in taken for name in files if (p / name).exists()]
        if not saved:
            raise ConfigError(f"--resume: no run of recipe {recipe!r} below {runs}/; name its folder with --output-dir")
        return max(saved, key=os.path.getmtime).parent
    numbers = [int(p.name[len(recipe) + 1 :] or 1) for p in taken]
    return runs / (f"{recipe}-{max(numbers) + 1}" if numbers else recipe)
