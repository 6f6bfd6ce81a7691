"""The folder of a training run: configuration, metrics, checkpoints, summary. No run overwrites another.

::

    runs/voc/
      config.json          the configuration: `--config` starts another run from it
      last.pth  best.pth   checkpoints: `--resume` continues from last.pth
      previous.pth         the checkpoint before last.pth, used if that is damaged
      metrics.jsonl        a line every few iterations, and one per validation
      summary.json  curves.png  predictions.png      at the end
      run.lock             the process that trains, while it does
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
from dfn_fast.config import LARGEST, TrainConfig, load_config
from dfn_fast.errors import CheckpointError, ConfigError, OutputError, listed
from dfn_fast.files import MAX_TEXT, clear_leftovers, finite, require_regular, write_json, write_text
from dfn_fast.runtime.lock import locked

MAX_METRICS = 1 << 30  # bytes: seven million lines


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
        self.curves = self.path / "curves.png"
        self.predictions = self.path / "predictions.png"
        self.lock_file = self.path / "run.lock"
        self._written = [self.config_file, self.last, self.previous, self.best, self.metrics_file, self.summary_file]
        self._written += [self.curves, self.predictions, self.path / "trace.json.gz"]
        self.last_is_whole = True  # False if it was found damaged: it must not replace previous.pth

    @property
    def read(self) -> Path:
        """The checkpoint that :meth:`read_last` read."""
        return self.last if self.last_is_whole else self.previous

    def require_no_run(self) -> None:
        """Raises :class:`ConfigError` if the folder holds a file that a run would write."""
        held = [path.name for path in self._written if os.path.lexists(path)]
        if held:
            raise ConfigError(
                f"--output-dir {self.path} holds a run already ({listed(held)}); add --resume to continue it, or "
                "choose another folder"
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from training in this folder, which is made if it is missing.

        Raises :class:`ConfigError` if one does, if the folder cannot be written, or if one of its files is a pipe, a
        device, a folder or far too large.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._require_regular_files()
                stack.enter_context(locked(self.lock_file, self._in_use))
            except OSError as error:
                raise ConfigError(
                    f"--output-dir {self.path} cannot be written ({error.strerror}); choose another folder"
                ) from error
            yield

    def _in_use(self, holder: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: {holder} trains in this folder; wait until it ends, stop it, or choose another --output-dir"
        )

    def _require_regular_files(self) -> None:
        for path in (self.config_file, self.summary_file):
            require_regular(path, ConfigError, "file of a run", MAX_TEXT)
        require_regular(self.metrics_file, ConfigError, "file of a run", MAX_METRICS)
        for path in (*self._written, self.lock_file):
            require_regular(path, ConfigError, "file of a run")

    def start(self, config: TrainConfig) -> None:
        """Begins a new run. Raises :class:`ConfigError` if the folder holds one or cannot be written."""
        self.require_no_run()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.config_file, config.to_dict())
        except OSError as error:
            raise ConfigError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        if not self.config_file.exists():
            raise ConfigError(f"--resume: {self.path} holds no run (no config.json); start it without --resume")
        return load_config(self.config_file)

    def save_last(self, content: dict[str, Any]) -> None:
        """Writes ``content`` to last.pth and keeps the old file as previous.pth. One of the two is always whole."""
        save_atomic(content, self.last, self.previous if self.last_is_whole else None)
        self.last_is_whole = True

    def read_last(self) -> dict[str, Any] | None:
        """The content of last.pth, or of previous.pth, with a message, if last.pth is missing or damaged.

        None if the run was killed before its first checkpoint. Raises :class:`CheckpointError` if neither can be used.
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
            raise CheckpointError("\n".join([*errors, "start a new run from best.pth with --weights"]))
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Appends ``record`` to metrics.jsonl; a value that is not finite becomes null."""
        require_regular(self.metrics_file, OutputError, "file of a run")  # it may have been replaced since the start
        with naming(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. A line that is truncated or not a record is left out, with a message."""
        require_regular(self.metrics_file, OutputError, "file of a run", MAX_METRICS)
        try:
            lines = self.metrics_file.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{self.metrics_file} cannot be read ({error.strerror})") from error
        records = [record for line in lines if (record := _record(line)) is not None]
        if len(records) < len(lines):
            print(f"{self.metrics_file}: left out {len(lines) - len(records)} damaged lines", file=sys.stderr)
        return records

    def forget_after(self, iteration: int, epochs: int) -> None:
        """Drops the metrics that are later than a checkpoint at ``iteration`` steps and ``epochs`` epochs.

        A run that continues from this checkpoint writes them again.
        """
        clear_leftovers(self.path)  # of a run that was killed while writing
        limits = {"train": ("iteration", iteration), "val": ("epoch", epochs)}
        kept = []
        for record in self.metrics():
            name, limit = limits[record["kind"]]
            if record[name] <= limit:
                kept.append(record)
        with naming(self.metrics_file):
            write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        with naming(self.summary_file):
            write_json(self.summary_file, summary)


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, if it is one that :meth:`RunFolder.log` could have written for a run."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in ("train", "val"):
        return None
    counts = all(type(record.get(name)) is int and 0 <= record[name] <= LARGEST for name in ("epoch", "iteration"))
    values = (record.get(name) for name in ("loss", "lr", "mean_iou"))
    numbers = all(value is None or (type(value) in (int, float) and abs(value) <= 1e300) for value in values)
    return record if counts and numbers else None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` in the block into an :class:`OutputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); free some space, or make the folder "
            "exist and writable, then continue with --resume"
        ) from error


def training_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that a run can continue from."""
    content = read_file(path)
    if "position" not in content or "optimizer" not in content:
        raise CheckpointError(f"{path}: expected a training checkpoint, got only weights; use --weights")
    return content


def _is_taken(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def default_folder(recipe: str, resume: bool) -> Path:
    """``runs/RECIPE``, or the next ``runs/RECIPE-N`` if taken; with ``resume``, the one that was saved to last."""
    runs = Path("runs")
    taken = []
    if runs.is_dir():
        taken = [p for p in runs.iterdir() if re.fullmatch(rf"{re.escape(recipe)}(-\d+)?", p.name) and _is_taken(p)]
    if resume:
        files = ("last.pth", "previous.pth", "config.json")
        saved = [p / name for p in taken for name in files if (p / name).exists()]
        if not saved:
            raise ConfigError(f"--resume: no run of recipe {recipe!r} below {runs}/; name its folder with --output-dir")
        return max(saved, key=os.path.getmtime).parent
    numbers = [int(p.name[len(recipe) + 1 :] or 1) for p in taken]
    return runs / (f"{recipe}-{max(numbers) + 1}" if numbers else recipe)
