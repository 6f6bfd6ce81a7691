"""``python -m dfn_fast.train``: options, the run, its summary and pictures."""

from dfn_fast import cli
from dfn_fast.checkpoint import read_file
from dfn_fast.interrupt import Stopped, StopRequest
from dfn_fast.options import new_config, parser, resumed_config
from dfn_fast.run import Run
from dfn_fast.run_folder import RunFolder, default_folder
from dfn_fast.run_report import draw, summarise
from dfn_fast.training import NonFiniteLoss


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    recipe_name = arguments.recipe or "synthetic"
    given_folder = getattr(arguments, "output_dir", None)
    folder = RunFolder(given_folder or default_folder(recipe_name, arguments.resume))
    config = resumed_config(folder.config(), arguments) if arguments.resume else new_config(arguments)
    with StopRequest() as stop:
        if not arguments.resume:
            folder.require_no_run()
        run = Run(config, folder, stop, arguments.stop_after)
        run.resume() if arguments.resume else folder.start(config)
        if arguments.profile:
            run.profile_steps()
        try:
            run.train()
        except Stopped:
            print(f"stopped at iteration {run.position.iteration} of {run.iterations}, saved in {folder.last}")
            print(f"continue: python -m dfn_fast.train {config.recipe} --resume --output-dir {folder.path}")
            return stop.exit_code if stop.requested else 0
        except NonFiniteLoss as error:
            kept = f"the last finite checkpoint is {folder.last}"
            kept = kept if folder.last.exists() else "no checkpoint was written yet"
            raise NonFiniteLoss(f"{error} ({kept})") from error
    return finish(run)


def finish(run: Run) -> int:
    """summary.json and the pictures, from the best checkpoint."""
    best = run.folder.best if run.folder.best.exists() else run.folder.last
    run.trainer.model.load_state_dict(read_file(best)["model"])
    draw(run.trainer, run.val_set, run.folder)
    run.folder.write_summary(summarise(run.trainer, run.position, run.val_set, run.images_per_second, str(best)))
    print(
        f"{run.config.val_split} mIoU {run.position.last_mean_iou:.4f} (best {run.position.best_mean_iou:.4f}): "
        f"checkpoint, summary.json, curves.png and predictions.png are in {run.folder.path}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
