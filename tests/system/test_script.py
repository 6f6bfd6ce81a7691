"""The console script ``dfn``, and the help of a recipe."""

import dataclasses
import sys

import pytest

from dfn_fast import __main__ as script
from dfn_fast import cli
from dfn_fast.config import RECIPES, recipe
from dfn_fast.errors import ConfigError
from dfn_fast.files import write_json
from dfn_fast.train.options import new_config, parse


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as ended:
        script.script()
    return ended.value.code


@pytest.mark.parametrize("command", script.COMMANDS)
def test_the_script_runs_each_command(monkeypatch, capsys, command):
    assert call(monkeypatch, "/usr/bin/dfn", command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: dfn {command}")
    assert "python -m" not in shown.replace("torchrun --nproc_per_node=8 -m", "")


def test_errors_name_the_command_as_it_was_called(monkeypatch, capsys):
    assert call(monkeypatch, "dfn", "trian") == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert call(monkeypatch, "dfn", "predict", "--outputdir", "x") == 2
    assert "\ndfn predict: error:" in capsys.readouterr().err
    assert call(monkeypatch, "dfn", "train", "voc") == 2
    assert capsys.readouterr().err.startswith("error: --root is missing")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/bin/dfn", "dfn train voc"),
        ("/src/dfn_fast/__main__.py", "python -m dfn_fast train voc"),
        ("/src/dfn_fast/train/__main__.py", "python -m dfn_fast.train voc"),
    ],
)
def test_our_commands_are_named_as_the_user_calls_them(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program])
    assert cli.as_called("python -m dfn_fast.train voc") == expected


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        parse([*words, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_of_a_recipe_shows_its_defaults(capsys, name):
    shown = help_of(capsys, name)
    config = recipe(name)
    assert f"those of the recipe {name};" in shown
    assert f"passes over the training images (default: {config.epochs})" in shown
    assert f"(default: {'x'.join(map(str, config.crop))})" in shown
    assert (
        f"depth of the ResNet: resnet18, resnet34, resnet50, resnet101, resnet152 (default: {config.backbone})" in shown
    )


def test_help_counts_the_preset_and_a_configuration_file(capsys, tmp_path):
    assert "formula of the focal loss; torchseg" in help_of(capsys, "voc")
    assert "retinanet, torchseg (default: torchseg)" in help_of(capsys, "voc", "--preset", "torchseg")
    file = tmp_path / "config.json"
    config = dataclasses.replace(recipe("camvid"), epochs=77)
    write_json(file, config.to_dict())
    assert "passes over the training images (default: 77)" in help_of(capsys, "--config", str(file))
    with pytest.raises(ConfigError, match="does not exist"):
        parse(["--config", str(tmp_path / "none.json"), "--help"])


def test_without_help_the_recipe_is_what_is_trained():
    assert new_config(parse([])) == recipe("synthetic")
    assert new_config(parse(["camvid", "--epochs", "3"])).epochs == 3
