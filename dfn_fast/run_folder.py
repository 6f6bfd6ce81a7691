"""The folder of a training run: configuration, metrics, checkpoints, summary. No run overwrites another one's.

::

    runs/voc/
      config.json          the configuration: `--config` starts another run from it
      last.pth  best.pth   checkpoints: `--resume` continues from the last
      metrics.jsonl        a line every few iterations, a line a validation
      summary.json  curves.png  predictions.png      at the end
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from dfn_fast.atomic import write_text
from dfn_fast.config import TrainConfig, load_config
from dfn_fast.errors import ConfigError


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.last = self.path / "last.pth"
        self.best = self.path / "best.pth"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"

    def require_no_run(self) -> None:
        if self.config_file.exists() or self.last.exists():
            raise ConfigError(
                f"--output-dir {self.path} holds a run already; add --resume to continue it, or choose another folder"
            )

    def start(self, config: TrainConfig) -> None:
        """Makes the folder for a new run; one that holds a run, or cannot be written, is an error."""
        self.require_no_run()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); choose another"
            ) from error

    def config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        if not self.last.exists():
            raise ConfigError(
                f"--resume: {self.path} holds no last.pth; start the run without --resume, in a new folder"
            )
        return load_config(self.config_file)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; a value that is not finite becomes null."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut short is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
        return records

    def forget_after(self, iteration: int, epochs: int) -> None:
        """Drops metrics later than the checkpoint that a resumed run continues from: they will be made again.

        ``iteration`` steps are behind it and ``epochs`` validations.
        """
        for leftover in self.path.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        limits = {"train": ("iteration", iteration), "val": ("epoch", epochs)}
        kept = []
        for record in self.metrics():
            name, limit = limits[record["kind"]]
            if record[name] <= limit:
                kept.append(record)
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.summary_file, json.dumps(finite(summary), indent=2) + "\n")


def finite(value: Any) -> Any:
    """``value`` with every nan and infinity replaced by None, which JSON can say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_folder(recipe: str, resume: bool) -> Path:
    """``runs/RECIPE``, or the first free ``runs/RECIPE-N``; to resume, the one of these whose checkpoint is newest."""
    runs = Path("runs")
    taken = []
    if runs.is_dir():
        taken = [p for p in runs.iterdir() if re.fullmatch(rf"{re.escape(recipe)}(-\d+)?", p.name) and any(p.iterdir())]
    if resume:
        saved = [p / "last.pth" for p in taken if (p / "last.pth").exists()]
        if not saved:
            raise ConfigError(f"--resume: no run of recipe {recipe!r} below {runs}/; name its folder with --output-dir")
        return max(saved, key=os.path.getmtime).parent
    numbers = [int(p.name[len(recipe) + 1 :] or 1) for p in taken]
    return runs / (f"{recipe}-{max(numbers) + 1}" if numbers else recipe)
