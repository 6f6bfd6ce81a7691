"""A training run: the loop over epochs from its position, with metrics, validation and checkpoints."""

import dataclasses
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dfn_fast.checkpoint.archive import FORMAT, save_atomic
from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.prefetch import on_device
from dfn_fast.data.registry import build_dataset
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import CheckpointError, ConfigError, DataError, shortened
from dfn_fast.runtime.device import choose_device
from dfn_fast.runtime.processes import ALONE, World
from dfn_fast.runtime.profiling import StepProfiler
from dfn_fast.runtime.random_state import seed_everything
from dfn_fast.runtime.regions import region
from dfn_fast.runtime.signals import Stopped, StopRequest
from dfn_fast.train.folder import RunFolder
from dfn_fast.train.loss_watch import LossWatch
from dfn_fast.train.position import NO_LABEL, Position
from dfn_fast.train.report import TensorBoard, validate
from dfn_fast.train.resume import (
    data_record,
    machine_record,
    require_finite,
    require_same_data,
    tell_of_another_machine,
)
from dfn_fast.trainer.build import build_model, require_memory
from dfn_fast.trainer.trainer import Trainer


class Run:
    """One training run: its parts, and the loop that moves its position.

    In a ``world`` of several processes all go through the same positions, and only the first prints and writes.
    ``resuming``: weights are not read from ``--weights`` or ``--pretrained``, because :meth:`resume` sets them.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        stop: StopRequest,
        stop_after: int | None = None,
        world: World = ALONE,
        resuming: bool = False,
    ):
        self.config, self.folder, self.stop, self.stop_after, self.world = config, folder, stop, stop_after, world
        self.device = choose_device(config.device, world)
        require_memory(config, self.device, world)
        seed_everything(config.seed, config.deterministic)
        self.train_set, self.val_set = (
            build_dataset(
                config.data,
                config.root,
                split,
                num_classes=config.num_classes,
                classes=config.classes,
                ignore_value=config.ignore_value,
                label_offset=config.label_offset,
                allow_outside_root=config.allow_outside_root,
                seed=config.seed,
            )
            for split in (config.train_split, config.val_split)
        )
        self.loader = TrainLoader(
            self.train_set,
            TrainTransform(config.crop, config.scales, config.flip, config.border_width),
            batch_size=config.batch_size,
            seed=config.seed,
            workers=config.workers,
            timeout=config.loader_timeout,
            pin_memory=self.device.type == "cuda",
            share=world.share(config.batch_size),
        )
        self.data_record = data_record(self.train_set, self.val_set)
        self.steps = len(self.loader) // config.accumulate
        if self.steps == 0:
            raise ConfigError(
                f"--accumulate {config.accumulate} is more than the {len(self.loader)} batches of an epoch; lower it"
            )
        self.iterations = config.iterations or config.epochs * self.steps
        self.epochs = math.ceil(self.iterations / self.steps)
        # A checkpoint replaces every weight, and the files of the first ones may be gone.
        start = dataclasses.replace(config, pretrained=None, weights=None) if resuming else config
        model = build_model(start, self.train_set.num_classes, world)
        self.trainer = Trainer(model, config, self.iterations, self.device, world)
        self.position = Position()
        self.profiler: StepProfiler | None = None
        # On a CPU the loss is ready at once; on a GPU reading it waits for the device.
        self.read_every = 1 if self.device.type == "cpu" else config.log_every

    def profile_steps(self) -> None:
        """Makes :meth:`train` profile a few of its steps."""
        whole = self.trainer.compiled or self.config.cuda_graph
        self.profiler = StepProfiler(self.folder.path, self.device, regions=not whole)

    def train(self) -> None:
        """Trains from the position to the end of the run::

            save last.pth, if this is the start
            for epoch in the remaining epochs:
                for batches of a step: loss = trainer.step(batches); now and then read the losses, log, save
                validate, every val_every epochs and after the last; keep the best
                save last.pth

        The save at the start fails early if the folder cannot be written. From then on there is always a checkpoint.
        Raises :class:`Stopped` on request, after saving.
        """
        if self.position.iteration == 0:
            self.save(self.folder.last)
        print(f"training {self.trainer.description()}")
        first, hidden = self.position.iteration, None if self.world.is_first else True
        bar = tqdm(total=self.iterations, initial=first, unit="it", disable=hidden, dynamic_ncols=True)
        with bar, TensorBoard(self.folder.path, self.config.tensorboard and self.world.is_first) as board:
            for epoch in range(self.position.epoch, self.epochs):
                try:
                    with self.loader.watched():
                        self.train_epoch(bar, board)
                        if (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.epochs:
                            self.validate(bar, board)
                        else:
                            bar.write(self.epoch_line(), file=sys.stdout)
                except Stopped:
                    self.save(self.folder.last)
                    raise
                self.position.epoch, self.position.step, self.position.loss_sum = epoch + 1, 0, 0.0
                self.save(self.folder.last)
        if self.profiler is not None:
            self.profiler.close()

    def train_epoch(self, bar: tqdm, board: TensorBoard) -> None:
        """Trains the rest of the current epoch."""
        position, accumulate = self.position, self.config.accumulate
        watch = LossWatch(self.trainer, position)
        batches = on_device(self.loader.epoch(position.epoch, position.step * accumulate), self.device)
        for _ in range(min(self.steps - position.step, self.iterations - position.iteration)):
            if self.profiler is not None:
                self.profiler.before(self.steps - position.step, self.steps)
            start = time.perf_counter()
            with region("input"):
                group = list(islice(batches, accumulate))
            loss = self.trainer.step(group, position.iteration)
            watch.add(position.iteration, loss, [name for batch in group for name in batch.names])
            position.step += 1
            position.iteration += 1
            bar.update()
            end = position.iteration == self.stop_after
            last = position.step == self.steps or position.iteration == self.iterations
            log = position.iteration % self.config.log_every == 0
            save = position.iteration % self.config.checkpoint_every == 0
            read = end or last or log or save or position.iteration % self.read_every == 0
            # Several processes must stop together. They ask each other only when they wait for the device anyway.
            asked = (read or self.world.size == 1) and self.world.any(self.stop.requested)
            leaving = end or asked
            if self.profiler is not None:
                self.profiler.after(last or leaving)
            if read or leaving:
                losses = watch.read()
                position.loss_sum += math.fsum(losses)
                position.seconds += time.perf_counter() - start
                self.show(bar, losses[-1])
                if log:
                    self.log_step(losses[-1], board)
            else:
                position.seconds += time.perf_counter() - start
            if leaving:
                raise Stopped
            if save:
                self.save(self.folder.last)

    @property
    def images_per_second(self) -> float:
        images = self.position.iteration * self.config.batch_size * self.config.accumulate
        return images / max(self.position.seconds, 1e-9)

    def show(self, bar: tqdm, loss: float) -> None:
        speed = f"{self.images_per_second:.1f} images/s{self.skipped_text()}"
        bar.set_postfix_str(f"loss {loss:.3f}, lr {self.trainer.lr:.2e}, {speed}")

    def skipped_text(self) -> str:
        """How many steps fp16 has skipped so far, as text for the progress line."""
        return f", {self.position.skipped_steps} steps skipped" if self.position.skipped_steps else ""

    def log_step(self, loss: float, board: TensorBoard) -> None:
        record = {
            "kind": "train",
            "epoch": self.position.epoch + 1,
            "iteration": self.position.iteration,
            "loss": loss,
            "lr": self.trainer.lr,
            "images_per_second": self.images_per_second,
            "skipped_steps": self.position.skipped_steps,
        }
        self.log(record, board)

    def log(self, record: dict[str, Any], board: TensorBoard) -> None:
        """Writes ``record`` to metrics.jsonl and its floats to TensorBoard."""
        if self.world.is_first:
            self.folder.log(record)
            board.add(record)

    def epoch_line(self) -> str:
        position = self.position
        loss = position.loss_sum / max(position.step, 1)
        done = f"epoch {position.epoch + 1:3d}/{self.epochs}  loss {loss:7.4f}  lr {self.trainer.lr:.2e}"
        return f"{done}  {self.images_per_second:6.1f} images/s{self.skipped_text()}"

    def validate(self, bar: tqdm, board: TensorBoard) -> None:
        """Measures mIoU on the validation split at one scale. Saves the best network so far as best.pth.

        Without a labelled pixel there is no mIoU, and the newest network counts as the best.
        """
        position = self.position
        report = validate(self.trainer, self.val_set, self.stop)
        position.last_mean_iou, position.per_class_iou = report.mean_iou, list(report.per_class_iou)
        record = {
            "kind": "val",
            "epoch": position.epoch + 1,
            "iteration": position.iteration,
            "train_loss": position.loss_sum / max(position.step, 1),
            "seconds": position.seconds,
            "mean_iou": report.mean_iou,
            "per_class_iou": position.per_class_iou,
        }
        self.log(record, board)
        measured = not math.isnan(report.mean_iou)
        best = report.mean_iou > position.best_mean_iou
        result = f"mIoU {report.mean_iou:.4f}{' (best)' if best else ''}" if measured else NO_LABEL
        bar.write(f"{self.epoch_line()}  {self.config.val_split} {result}", file=sys.stdout)
        if best:
            position.best_mean_iou = report.mean_iou
        if best or (not measured and position.best_mean_iou < 0):
            self.save(self.folder.best)

    def save(self, path: Path) -> None:
        """Writes a checkpoint with everything needed to continue the run, and to use the network elsewhere."""
        self.trainer.require_finite_weights(self.position.iteration)
        if not self.world.is_first and not self.config.fsdp:  # FSDP's shards are gathered by all processes
            return
        data = self.train_set
        settings = {"num_classes": data.num_classes, **self.config.network_arguments()}
        content = {
            "format": FORMAT,
            **self.trainer.state(),
            "model_config": settings,
            "classes": list(data.classes),
            "palette": data.palette.tolist(),
            "dataset": self.config.data,
            "config": self.config.to_dict(),
            "position": dataclasses.asdict(self.position),
            "data": self.data_record,
            "machine": machine_record(self.trainer),
        }
        if not self.world.is_first:
            return
        if path == self.folder.last:
            self.folder.save_last(content)
        else:
            save_atomic(content, path)

    def resume(self, content: dict[str, Any] | None) -> None:
        """Continues from ``content``, which the folder read; a run without a checkpoint starts from the beginning."""
        if content is not None:
            self.load(content)
        if self.stop_after is not None and self.stop_after <= self.position.iteration:
            raise ConfigError(
                f"--stop-after {self.stop_after}: the run in {self.folder.path} is at iteration "
                f"{self.position.iteration} already; give a later one, or leave it out"
            )
        if self.world.is_first:
            self.folder.forget_after(self.position.iteration, self.position.epoch)

    def load(self, content: dict[str, Any]) -> None:
        """Loads trainer and position from a checkpoint.

        Raises :class:`CheckpointError` if it is of another network or not finite, and :class:`DataError` if it is of
        other data.
        """
        path = self.folder.read
        try:
            require_same_data(content, path, self.train_set, self.val_set, tell=self.world.is_first)
            require_finite(content, path)
            if self.world.is_first:
                tell_of_another_machine(content, path, machine_record(self.trainer))
            self.trainer.load_state(content)
            self.position = Position(**content["position"])
            kinds = {f.name: type(getattr(Position(), f.name)) for f in dataclasses.fields(Position)}
            wrong = [name for name, kind in kinds.items() if type(getattr(self.position, name)) is not kind]
            if wrong:
                raise TypeError(f"position: {', '.join(wrong)}")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: this is not the checkpoint of a run of this network "
                f"({type(error).__name__}: {shortened(str(error))}); restore the run's own checkpoint, or use --weights"
            ) from error
        position = self.position
        if position.iteration != min(position.epoch * self.steps + position.step, self.iterations):
            raise DataError(
                f"{path}: it was written at iteration {position.iteration}, epoch {position.epoch}, step "
                f"{position.step}, but an epoch of this data set has {self.steps} steps; restore the data set as it was"
            )
