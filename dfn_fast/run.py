"""A training run from its position on: the loop over epochs, with its metrics, validation and checkpoints."""

import dataclasses
import math
import sys
import time
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dfn_fast.checkpoint import read_file, save_atomic
from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.prefetch import on_device
from dfn_fast.data.registry import build_dataset
from dfn_fast.data.transforms import TrainTransform
from dfn_fast.errors import CheckpointError, ConfigError
from dfn_fast.interrupt import Stopped, StopRequest
from dfn_fast.loading import FORMAT
from dfn_fast.profiling import StepProfiler
from dfn_fast.regions import region
from dfn_fast.run_folder import RunFolder
from dfn_fast.run_report import TensorBoard, validate
from dfn_fast.training import LossWatch, Position, Trainer, build_model, choose_device, seed_everything


class Run:
    """One training run: its parts, and the loop that moves its position."""

    def __init__(self, config: TrainConfig, folder: RunFolder, stop: StopRequest, stop_after: int | None = None):
        self.config, self.folder, self.stop, self.stop_after = config, folder, stop, stop_after
        self.device = choose_device(config.device)
        seed_everything(config.seed, config.deterministic)
        self.train_set, self.val_set = (
            build_dataset(
                config.data,
                config.root,
                split,
                num_classes=config.num_classes,
                classes=config.classes,
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
            pin_memory=self.device.type == "cuda",
        )
        self.steps = len(self.loader) // config.accumulate
        if self.steps == 0:
            raise ConfigError(
                f"--accumulate {config.accumulate} is more than the {len(self.loader)} batches of an epoch; lower it"
            )
        self.iterations = config.iterations or config.epochs * self.steps
        self.epochs = math.ceil(self.iterations / self.steps)
        model = build_model(config, self.train_set.num_classes)
        self.trainer = Trainer(model, config, self.iterations, self.device)
        self.position = Position()
        self.profiler: StepProfiler | None = None
        # On a CPU the loss is there at once; on a GPU reading it waits for the device.
        self.read_every = 1 if self.device.type == "cpu" else config.log_every

    def profile_steps(self) -> None:
        """Asks :meth:`train` to profile a few steps on its way."""
        whole = self.trainer.compiled or self.config.cuda_graph
        self.profiler = StepProfiler(self.folder.path, self.device, regions=not whole)

    def train(self) -> None:
        """All that is left of the run, from its position on. Raises :class:`Stopped` on request, with all saved."""
        print(f"training {self.trainer.description()}")
        bar = tqdm(total=self.iterations, initial=self.position.iteration, unit="it", disable=None, dynamic_ncols=True)
        with bar, TensorBoard(self.folder.path, self.config.tensorboard) as board:
            for epoch in range(self.position.epoch, self.epochs):
                try:
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
        """The rest of the current epoch."""
        position, accumulate = self.position, self.config.accumulate
        watch = LossWatch()
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
            leaving = self.stop.requested or position.iteration == self.stop_after
            last = position.step == self.steps or position.iteration == self.iterations
            if self.profiler is not None:
                self.profiler.after(last or leaving)
            log = position.iteration % self.config.log_every == 0
            save = position.iteration % self.config.checkpoint_every == 0
            if leaving or last or log or save or position.iteration % self.read_every == 0:
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
        bar.set_postfix_str(f"loss {loss:.3f}, lr {self.trainer.lr:.2e}, {self.images_per_second:.1f} images/s")

    def log_step(self, loss: float, board: TensorBoard) -> None:
        record = {
            "kind": "train",
            "epoch": self.position.epoch + 1,
            "iteration": self.position.iteration,
            "loss": loss,
            "lr": self.trainer.lr,
            "images_per_second": self.images_per_second,
        }
        self.folder.log(record)
        board.add(record)

    def epoch_line(self) -> str:
        position = self.position
        loss = position.loss_sum / max(position.step, 1)
        done = f"epoch {position.epoch + 1:3d}/{self.epochs}  loss {loss:7.4f}  lr {self.trainer.lr:.2e}"
        return f"{done}  {self.images_per_second:6.1f} images/s"

    def validate(self, bar: tqdm, board: TensorBoard) -> None:
        """mIoU on the validation split at one scale; the best so far is kept as best.pth."""
        position = self.position
        report = validate(self.trainer, self.val_set, self.stop)
        position.last_mean_iou, position.per_class_iou = report.mean_iou, list(report.per_class_iou)
        record = {
            "kind": "val",
            "epoch": position.epoch + 1,
            "iteration": position.iteration,
            "train_loss": position.loss_sum / max(position.step, 1),
            "mean_iou": report.mean_iou,
            "per_class_iou": position.per_class_iou,
        }
        self.folder.log(record)
        board.add(record)
        best = report.mean_iou > position.best_mean_iou
        line = f"{self.epoch_line()}  {self.config.val_split} mIoU {report.mean_iou:.4f}{' (best)' if best else ''}"
        bar.write(line, file=sys.stdout)
        if best:
            position.best_mean_iou = report.mean_iou
            self.save(self.folder.best)

    def save(self, path: Path) -> None:
        """A checkpoint: everything that the run needs to continue, and that others need to use the network."""
        self.trainer.require_finite_weights(self.position.iteration)
        data = self.train_set
        settings = {"num_classes": data.num_classes, **self.config.model_settings()}
        content = {
            "format": FORMAT,
            **self.trainer.state(),
            "model_config": settings,
            "classes": list(data.classes),
            "palette": data.palette.tolist(),
            "dataset": self.config.data,
            "config": self.config.to_dict(),
            "position": dataclasses.asdict(self.position),
        }
        save_atomic(content, path)

    def resume(self) -> None:
        """Continues from last.pth."""
        content = read_file(self.folder.last)
        if "position" not in content or "optimizer" not in content:
            raise CheckpointError(
                f"{self.folder.last}: expected a training checkpoint, got weights alone; use --weights"
            )
        self.trainer.load_state(content)
        self.position = Position(**content["position"])
        self.folder.forget_after(self.position.iteration, self.position.epoch)
