"""``python -m dfn_fast.train``: options, the run, its summary and pictures."""

import argparse
import contextlib

from dfn_fast import cli
from dfn_fast.checkpoint.archive import read_file
from dfn_fast.config import TrainConfig
from dfn_fast.errors import ConfigError
from dfn_fast.runtime.device import out_of_memory
from dfn_fast.runtime.processes import Agent, World, processes
from dfn_fast.runtime.signals import Stopped, StopRequest
from dfn_fast.train.folder import RunFolder, default_folder
from dfn_fast.train.options import new_config, parse, resumed_config
from dfn_fast.train.position import NO_LABEL
from dfn_fast.train.report import draw, look_at_labels, summarise, tell_of_data
from dfn_fast.train.resume import require_same_config
from dfn_fast.train.run import Run
from dfn_fast.trainer.finite import NonFiniteLoss


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    with contextlib.ExitStack() as lock:
        with StopRequest() as stop, processes() as world:
            run = begin(arguments, stop, world, lock)
            if arguments.profile and world.is_first:
                run.profile_steps()
            folder = run.folder
            try:
                run.train()
            except Stopped:
                print(f"stopped at iteration {run.position.iteration} of {run.iterations}, saved in {folder.last}")
                again = f"python -m dfn_fast.train {run.config.recipe} --resume --output-dir {folder.path}"
                print(f"continue with: {cli.as_called(again)}")
                return stop.exit_code if stop.requested else 0
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error} (the last finite checkpoint is {folder.last})") from error
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise ConfigError(_memory_advice(run)) from error
        return finish(run) if world.is_first else 0


def begin(arguments: argparse.Namespace, stop: StopRequest, world: World, lock: contextlib.ExitStack) -> Run:
    """Returns the run that the options name, new or resumed, and makes its folder, which ``lock`` keeps for it alone.

    If torchrun restarts the run after a worker died, it continues from its last checkpoint even without ``--resume``.
    """
    agent = Agent()

    def choose() -> tuple[RunFolder, TrainConfig, bool]:
        begun = agent.folder()
        given = getattr(arguments, "output_dir", None)
        folder = RunFolder(begun or given or default_folder(arguments.recipe or "synthetic", arguments.resume))
        if not arguments.resume and begun is None:
            folder.require_no_run()
        elif folder.path.is_dir():
            lock.enter_context(folder.alone())
        config = resumed_config(folder.config(), arguments) if arguments.resume else new_config(arguments)
        return folder, config, begun is not None

    def start() -> None:
        lock.enter_context(folder.alone())
        folder.start(config)

    folder, config, begun = world.from_first(choose)
    goes_on = arguments.resume or begun
    content = folder.read_last() if goes_on else None
    if content is not None:
        require_same_config(config, content, folder.read, folder.config_file)
    run = Run(config, folder, stop, arguments.stop_after, world, resuming=content is not None)
    tell_of_data(run.train_set, run.val_set)
    if content is None:
        world.from_first(lambda: look_at_labels(run.train_set, run.val_set))
    if goes_on:
        run.resume(content)
    else:
        world.from_first(start)
    if begun:
        print(f"started again by torchrun: {folder.path} goes on from iteration {run.position.iteration}")
    if world.is_first:
        agent.keep(folder.path)
    return run


def _memory_advice(run: Run) -> str:
    config, crop = run.config, "x".join(map(str, run.config.crop))
    return (
        f"the memory of {run.device} is too small for iteration {run.position.iteration + 1}, with --batch-size "
        f"{config.batch_size} and --crop {crop}: continue with --resume --memory norm or blocks, or start a new run "
        "with less of either (--accumulate makes steps larger again), or with fewer --channels"
    )


def finish(run: Run) -> int:
    """Writes summary.json and the pictures, from the best checkpoint. Returns the exit code."""
    best = run.folder.best if run.folder.best.exists() else run.folder.last
    network = run.trainer.network(read_file(best)["model"])
    run.folder.write_summary(summarise(run.trainer, run.position, run.val_set, run.images_per_second, str(best)))
    draw(run.trainer, network, run.val_set, run.folder)
    position = run.position
    result = f"mIoU {position.last_mean_iou:.4f} (best {position.best_mean_iou:.4f})" if position.measured else NO_LABEL
    print(
        f"{run.config.val_split} {result}: "
        f"checkpoint, summary.json, curves.png and predictions.png are in {run.folder.path}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
