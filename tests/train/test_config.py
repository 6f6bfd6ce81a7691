import dataclasses
import json
import os
import sys

import pytest

from dfn_fast.config import RECIPES, TrainConfig, load_config, recipe
from dfn_fast.errors import ConfigError
from dfn_fast.train.options import new_config, overrides, parser, resumed_config


def parse(*words):
    return parser().parse_args(list(words))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preset", ["paper", "torchseg"])
def test_every_recipe_survives_its_file(name, preset, tmp_path):
    config = recipe(name, preset)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert load_config(file) == config


def test_recipes_have_the_published_numbers():
    paper, torchseg = recipe("voc"), recipe("voc", "torchseg")
    assert (paper.lr, paper.power, paper.momentum, paper.weight_decay) == (4e-3, 0.9, 0.9, 1e-4)
    assert (paper.batch_size, paper.crop, paper.scales) == (32, (512, 512), (0.5, 0.75, 1, 1.5, 1.75))
    assert (paper.border_weight, paper.focal_alpha, paper.focal_gamma) == (0.1, 0.25, 2)
    assert (torchseg.lr, torchseg.new_layer_lr, torchseg.focal) == (8e-4, 10, "torchseg")


CONSTANTS = {
    "synthetic": {"crop": (96, 96), "border_width": 3, "batch_size": 16, "epochs": 11, "backbone": "resnet18"},
    "camvid": {"crop": (352, 480), "border_width": 5, "batch_size": 8, "epochs": 200, "pretrained": None},
    "voc": {"crop": (512, 512), "border_width": 11, "batch_size": 32, "epochs": 80, "train_split": "train_aug"},
    "cityscapes": {"crop": (800, 800), "border_width": 7, "batch_size": 32, "epochs": 240, "pretrained": "resnet101s"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_constants_of_a_recipe(name):
    assert {field: getattr(recipe(name), field) for field in CONSTANTS[name]} == CONSTANTS[name]
    assert recipe(name).val_split == "val"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--lr", "0.5"], {"lr": 0.5}),
        (["--crop", "96"], {"crop": (96, 96)}),
        (["--crop", "96x128"], {"crop": (96, 128)}),
        (["--scales", "0.5", "2"], {"scales": (0.5, 2.0)}),
        (["--no-flip"], {"flip": False}),
        (["--deterministic"], {"deterministic": True}),
        (["--iterations", "7"], {"iterations": 7}),
        (["--no-border"], {"border": False}),
        (["--root", "somewhere"], {"root": "somewhere"}),
        (["--model", "reference"], {"model": "reference"}),
        (["--compile"], {"compile": True}),
        (["--no-compile"], {"compile": False}),
        (["--memory", "norm"], {"memory": "norm"}),
        (["--cuda-graph"], {"cuda_graph": True}),
    ],
)
def test_an_option_changes_its_field_alone(words, changes):
    assert new_config(parse("camvid", *words)) == dataclasses.replace(recipe("camvid"), **changes)


@pytest.mark.parametrize("name", ["pretrained", "weights"])
def test_none_is_no_file(name):
    assert recipe("voc").pretrained == "resnet101s"
    assert getattr(new_config(parse("voc", f"--{name}", "none")), name) is None
    assert getattr(new_config(parse("voc", f"--{name}", "./none")), name) == "./none"


def test_every_field_is_an_option():
    text = parser().format_help()
    for field in dataclasses.fields(TrainConfig):
        if field.name != "recipe":
            assert f"--{field.name.replace('_', '-')}" in text


NUMBERS = [f for f in dataclasses.fields(TrainConfig) if not isinstance(f.default, str | bool | None)]
NUMBERS += [f for f in dataclasses.fields(TrainConfig) if f.name in ("num_classes", "iterations")]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_the_same_limits_on_the_command_line_and_in_a_file(field, tmp_path):
    option, largest, file = f"--{field.name.replace('_', '-')}", field.metadata["maximum"], tmp_path / "config.json"
    assert largest <= 1 << 62
    many = isinstance(field.default, tuple)
    too_large = str(int(largest) + 1)
    file.write_text(json.dumps({field.name: [int(too_large)] * 2 if many else int(too_large)}))
    for make in (lambda: new_config(parse(option, too_large)), lambda: load_config(file)):
        with pytest.raises(ConfigError, match=rf"{option} must be at most|field '{field.name}' expects"):
            make()
    file.write_text(json.dumps({field.name: [True, True] if many else True}))
    with pytest.raises(ConfigError, match=rf"field '{field.name}' expects .*, got .*True"):
        load_config(file)


@pytest.mark.parametrize(
    "words",
    [["--scales", "1", "1e300"], ["--crop", "64x1000000"], ["--channels", str(1 << 40)], ["--scales", "1e-300"]],
)
def test_a_value_that_would_exhaust_the_machine_is_refused(words):
    with pytest.raises(ConfigError, match=rf"{words[0]} must be at"):
        new_config(parse(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight-decai", "1"], "unknown option --weight-decai; did you mean --weight-decay?"),
        (["--lr=1", "--chanels=4"], "unknown option --chanels=4; did you mean --channels?"),
        (["--backbone", "resnet110"], "did you mean resnet101?"),
        (["--crop", "big"], "'big' is not a size"),
        (["--batch-size", "two"], "--batch-size"),
        (["--output-dir", ""], "--output-dir: expected a value, got an empty text"),
        (["--scales", "1", " "], "--scales: expected a value, got an empty text"),
    ],
)
def test_a_misspelt_option_names_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (31, 64)}, "--crop 31x64 is too small"),
        ({"batch_size": 1}, "--batch-size 2 or more"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"scales": ()}, "--scales must be one or more"),
        ({"scales": (1.0, -1.0)}, r"--scales must be at least 0\.01, got -1"),
        ({"border_width": 4}, "--border-width must be odd"),
        ({"lr": float("nan")}, "--lr must be finite, got nan"),
        ({"amp": "fp8"}, "--amp must be one of"),
        ({"model": "quick"}, "--model must be one of"),
        ({"memory": "block"}, "did you mean blocks"),
        ({"memory": "norm", "model": "reference"}, "--memory norm needs --model fast"),
        ({"cuda_graph": True, "accumulate": 2}, "--cuda-graph overwrites the gradients"),
    ],
)
def test_a_wrong_value_names_the_option(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_a_batch_of_one_is_allowed_without_global_context():
    assert TrainConfig(batch_size=1, global_context=False).batch_size == 1


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown recipe 'citiscapes'.*did you mean cityscapes"):
        recipe("citiscapes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"learning_rte": 1}', "unknown field"),
        ('{"weigth_decay": 1}', "did you mean weight_decay"),
        ('{"crop": [96]}', "field 'crop' expects"),
        ('{"epochs": 1.5}', "field 'epochs' expects int"),
        ('{"flip": 1}', "field 'flip' expects bool"),
        ("[]", "an object of fields"),
        ('{"lr": 1, "seed": 2, "lr": 3}', "'lr' is given twice"),
        ("{", "expected a run's config.json"),
        ("[" * 100_000, "expected a run's config.json"),
        ('{"a": ' * 100_000, "expected a run's config.json"),
        ("\0", "expected a run's config.json"),
        ('{"seed": 1' + "0" * 5000 + "}", "expected a run's config.json"),
        ('{"lr": 1' + "0" * 400 + "}", "field 'lr' expects float, got 1000"),
        ('{"seed": 1' + "0" * 40 + "}", "field 'seed' expects int"),
        ('{"lr": Infinity}', "--lr must be finite, got inf"),
        ('{"lr": NaN}', "--lr must be finite, got nan"),
        ('{"scales": [1.0, NaN]}', "--scales must be finite"),
        ('{"root": ""}', "--root must not be empty"),
        ('{"epochs": -1}', "--epochs must be at least 1, got -1"),
        ('{"model": "' + "x" * 10**6 + '"}', "--model must be one of"),
        ('{"' + "x" * 10**6 + '": 1}', "unknown field 'xxx"),
    ],
)
def test_a_wrong_configuration_file_is_named(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_configuration_that_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: expected a regular file, got a pipe"):
        load_config(tmp_path / "config.json")


def test_a_run_starts_from_another_runs_configuration(tmp_path):
    config = recipe("camvid", "torchseg")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config.to_dict(), "output_dir": "runs/first"}))
    again = new_config(parse("--config", str(file), "--epochs", "3"))
    assert again == dataclasses.replace(config, epochs=3, output_dir=None)
    with pytest.raises(ConfigError, match="takes the place of RECIPE"):
        new_config(parse("voc", "--config", str(file)))


def test_resuming_refuses_what_would_change_the_result():
    saved = recipe("camvid")
    assert resumed_config(saved, parse("camvid", "--workers", "7")).workers == 7
    assert resumed_config(saved, parse("--lr", str(saved.lr))) == saved
    with pytest.raises(ConfigError, match=r"--lr 0.5 differs from the run that --resume continues"):
        resumed_config(saved, parse("--lr", "0.5"))
    with pytest.raises(ConfigError, match="is of recipe 'camvid', not 'voc'"):
        resumed_config(saved, parse("voc"))


def test_resuming_compares_a_preset_and_a_file_too(tmp_path):
    file = tmp_path / "config.json"
    for preset, other in (("paper", "torchseg"), ("torchseg", "paper")):
        saved = dataclasses.replace(recipe("camvid", preset), epochs=3)
        assert resumed_config(saved, parse("--preset", preset)) == saved
        with pytest.raises(ConfigError, match=r"differs from the run that --resume continues"):
            resumed_config(saved, parse("--preset", other))
        file.write_text(json.dumps({**saved.to_dict(), "workers": 9}))
        assert resumed_config(saved, parse("--config", str(file))) == saved
        file.write_text(json.dumps({**saved.to_dict(), "epochs": 4}))
        with pytest.raises(ConfigError, match=r"--epochs 4 differs from the run"):
            resumed_config(saved, parse("--config", str(file)))
        assert resumed_config(saved, parse("--config", str(file), "--epochs", "3")) == saved


def test_a_run_saved_before_a_field_was_there_gets_its_default(tmp_path):
    values = recipe("camvid").to_dict()
    for name in ("model", "memory", "cuda_graph"):
        del values[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**values, "compile": False}))
    assert load_config(file) == dataclasses.replace(recipe("camvid"), compile=False)


def test_how_a_run_computes_may_change_where_its_results_do_not():
    saved = recipe("camvid")
    assert resumed_config(saved, parse("--memory", "blocks")).memory == "blocks"
    with pytest.raises(ConfigError, match=r"--model reference differs from the run"):
        resumed_config(saved, parse("--model", "reference"))
    with pytest.raises(ConfigError, match=r"--compile True differs from the run"):
        resumed_config(saved, parse("--compile"))


def test_only_what_was_given_overrides():
    assert overrides(parse("voc", "--resume", "--stop-after", "3")) == {}
