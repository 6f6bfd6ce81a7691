"""The examples run as they are: the three scripts, each in an empty folder, and the notebook from its first cell."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from dfn_fast.data.datasets.synthetic import SyntheticScenes
from dfn_fast.media.images import read_image, write_image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example script as a command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return call


def test_train_loop_then_segment_an_image_with_what_it_wrote(run, tmp_path, capsys):
    run("train_loop.py", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["step", "1"], ["step", "2"]]
    assert all(np.isfinite(float(line.split()[3])) for line in lines[:2])
    assert (tmp_path / "dfn-synthetic" / "model.safetensors").is_file()

    scene = SyntheticScenes("val")[0].image
    write_image(tmp_path / "scene.png", scene)
    run("segment.py", "dfn-synthetic", "scene.png")
    shown = capsys.readouterr().out
    assert shown.startswith("scales 0.75 1 1.25, flip, whole image")
    assert any(line.split()[0] in SyntheticScenes.classes for line in shown.splitlines()[1:-1])
    assert shown.endswith("wrote scene_overlay.png\n")
    drawn = read_image(tmp_path / "scene_overlay.png")
    assert drawn.shape == scene.shape
    assert (drawn != scene).any()


def test_segment_without_arguments_says_how_to_call_it(run):
    with pytest.raises(SystemExit, match="CHECKPOINT IMAGE"):
        run("segment.py")


def test_own_dataset_draws_its_images_and_batches_class_ids(run, tmp_path, capsys):
    run("own_dataset.py", "mine")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("[4, 3, 64, 64]" in line and line.endswith(("[0, 1]", "[0, 1, 255]")) for line in lines)
    assert len(list((tmp_path / "mine" / "photos").iterdir())) == 8


def test_the_notebook_stores_no_outputs():
    cells = json.loads((EXAMPLES / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_on(monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason='nbclient is missing: pip install -e ".[test]"')
    pytest.importorskip("ipykernel", reason='ipykernel is missing: pip install -e ".[test]"')
    import nbformat

    # The kernel imports this checkout, whether or not it is installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for one another are slow while other tests run
    notebook = nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert "mIoU" in "".join(output.get("text", "") for output in outputs)
