"""Exported networks: each format against the model, ONNX also in ONNX Runtime, and failures."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfn_fast import cli
from dfn_fast.data.normalize import normalize
from dfn_fast.errors import ConfigError
from dfn_fast.export import __main__ as export
from dfn_fast.export import formats as export_formats
from dfn_fast.export.__main__ import main
from dfn_fast.network.fast import FastDFN
from support.networks import narrow_backbones, random_dfn

CLASSES = ["a", 'b "quoted"', "é\\"]
PALETTE = np.arange(9, dtype=np.uint8).reshape(3, 3)
has_compiler = shutil.which(torch._inductor.config.cpp.cxx[1]) is not None
old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
needs_any_size = pytest.mark.skipif(old, reason="before 2.13 PyTorch exports pooling for sizes of one parity alone")
needs_compiler = pytest.mark.skipif(not has_compiler, reason="AOTInductor needs a C++ compiler")


class TinyNetwork(nn.Module):
    """One operator of each kind that the real network has, for what does not depend on the network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate = nn.Conv2d(3, 3, 3, stride=4, padding=1), nn.Linear(3, 3)

    def forward(self, data):
        x = self.conv(data)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return F.log_softmax(F.interpolate(x, size=data.shape[2:], mode="bilinear", align_corners=True), dim=1)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """PyTorch's exporters take as long as there are operators."""
    with narrow_backbones(resnet18=1):
        yield


@pytest.fixture(scope="module")
def model():
    return random_dfn(3, FastDFN, channels=8, border_channels=4, stem="conv7").float().eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dfn")
    model.save_pretrained(folder, classes=CLASSES, palette=PALETTE)
    return str(folder)


@pytest.fixture
def tiny(monkeypatch):
    """The command line with ``TinyNetwork`` as the model, whatever CHECKPOINT is."""
    network = TinyNetwork().eval()
    loaded = SimpleNamespace(model=network, classes=tuple(CLASSES), palette=PALETTE)
    monkeypatch.setattr(export, "load_model", lambda path, device: loaded)
    monkeypatch.setattr(export, "inference_network", lambda model: model)
    return network


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(*shape):
    return torch.randint(256, (*shape, 3), dtype=torch.uint8)


def best_is_chosen(log_probabilities, labels):
    """Whether each label's log-probability is its pixel's largest, up to rounding."""
    chosen = log_probabilities.gather(1, labels[:, None].long())[:, 0]
    return (log_probabilities.amax(1) - chosen).max() < 1e-3


# Formats


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "33x64", "--batch", "2"],
        pytest.param(["--size", "65x50", "--dynamic"], marks=[needs_any_size, pytest.mark.slow]),
    ],
)
def test_a_program_gives_what_the_model_gives(model, checkpoint, here, options, capsys):
    assert main([checkpoint, "dfn.pt2", "--device", "cpu", *options]) == 0
    assert capsys.readouterr().out.count(": ok") == 1 + ("--dynamic" in options)
    extra = {export_formats.EXTRA_FILE: ""}
    exported = torch.export.load("dfn.pt2", extra_files=extra).module()
    shapes = [(3, 3, 40, 33), (1, 3, 97, 64)] if "--dynamic" in options else [(2, 3, 33, 64)]
    for shape in shapes:
        data = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(exported(data), model(data), rtol=1e-4, atol=1e-3)
    notes = json.loads(extra[export_formats.EXTRA_FILE])
    assert json.loads(notes["classes"]) == CLASSES
    assert json.loads(notes["palette"]) == PALETTE.tolist()
    assert json.loads(notes["std"]) == [0.229, 0.224, 0.225]


@needs_any_size
@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True], ids=["log-probabilities", "labels"])
def test_onnx_runtime_gives_what_the_model_gives_at_any_size(model, checkpoint, here, labels, capsys):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    options = ["--labels"] if labels else []
    assert main([checkpoint, "dfn.onnx", "--size", "65x50", "--dynamic", *options]) == 0
    printed = capsys.readouterr()
    assert "dfn.onnx: ONNX, opset 18" in printed.out
    assert printed.out.count(": ok") == 2
    assert printed.err == ""
    written = onnx.load("dfn.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 18)]
    assert {node.domain for node in written.graph.node} == {""}  # plain operators only
    assert not written.functions
    resizes = [node for node in written.graph.node if node.op_type == "Resize"]
    modes = [{a.name: a.s for a in node.attribute}["coordinate_transformation_mode"] for node in resizes]
    assert len(modes) >= 4
    assert set(modes) == {b"align_corners"}
    notes = {entry.key: entry.value for entry in written.metadata_props}
    assert json.loads(notes["classes"]) == CLASSES
    assert notes["input"].startswith("RGB, uint8" if labels else "RGB, (value / 255 - mean)")
    session = onnxruntime.InferenceSession("dfn.onnx", providers=["CPUExecutionProvider"])
    for shape in [(1, 33, 47), (3, 64, 97)]:  # odd ones too: no size divides the next
        image = images(*shape)
        data = normalize(image.permute(0, 3, 1, 2))
        with torch.no_grad():
            expected = model(data)
        given = image if labels else data.contiguous()
        result = torch.from_numpy(session.run(None, {"image": given.numpy()})[0])
        if labels:
            assert result.dtype == torch.uint8
            assert best_is_chosen(expected, result)
        else:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_package_gives_what_the_model_gives(tiny, here):
    """The whole network compiles for minutes on two cores: this is one of the same operators."""
    assert main(["-", "dfn.pt2", "--format", "aoti", "--size", "65x50", "--dynamic", "--device", "cpu"]) == 0
    exported = torch._inductor.aoti_load_package("dfn.pt2")
    notes = exported.get_metadata()
    assert json.loads(notes["classes"]) == CLASSES
    for shape in [(1, 33, 47), (3, 64, 97)]:
        data = normalize(images(*shape).permute(0, 3, 1, 2)).contiguous()
        with torch.no_grad():
            result, expected = exported(data), tiny(data)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_another_opset_is_what_the_file_has(tiny, here, capsys):
    onnx = pytest.importorskip("onnx")
    assert main(["-", "dfn.onnx", "--size", "64", "--opset", "21"]) == 0
    assert onnx.load("dfn.onnx").opset_import[0].version == 21
    assert "opset 21" in capsys.readouterr().out


def test_an_opset_that_pytorch_cannot_convert_to_is_an_error(tiny, here, monkeypatch):
    """PyTorch says so on the console, and writes what it had."""
    pytest.importorskip("onnx")
    monkeypatch.setattr(export, "OPSET", 9)
    with pytest.raises(ConfigError, match="--opset 10: this network could not be converted to it; use 18"):
        main(["-", "dfn.onnx", "--size", "64", "--opset", "10"])
    assert list(here.iterdir()) == []


# The check


@pytest.mark.parametrize("labels", [False, True], ids=["log-probabilities", "labels"])
def test_a_file_that_differs_exits_with_1_and_stays(tiny, here, monkeypatch, capsys, labels):
    """The weights change between the writing and the check."""
    write = export.write

    def write_then_change(*arguments, **settings):
        write(*arguments, **settings)
        with torch.no_grad():
            tiny.conv.bias += torch.tensor([0.0, 0.5, -0.5])

    monkeypatch.setattr(export, "write", write_then_change)
    assert main(["-", "dfn.pt2", "--size", "64", "--device", "cpu", *["--labels"][: int(labels)]]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "dfn.pt2 does not give the same results as the model; it is kept" in printed.err
    assert [path.name for path in here.iterdir()] == ["dfn.pt2"]


@pytest.mark.parametrize("result", [torch.zeros(1, 3, 64, 65), torch.full((1, 3, 64, 64), torch.nan)])
def test_another_shape_or_nan_fails_the_check(tiny, here, monkeypatch, result):
    monkeypatch.setattr("dfn_fast.export.check.read", lambda path, file_format: lambda image: result)
    assert main(["-", "dfn.pt2", "--size", "64", "--device", "cpu"]) == 1


def test_a_file_that_does_not_load_exits_with_1_and_stays(tiny, here, monkeypatch, capsys):
    monkeypatch.setattr(export, "write", lambda program, path, *_, **__: path.write_bytes(b"no archive"))
    assert main(["-", "dfn.pt2", "--size", "64", "--device", "cpu"]) == 1
    assert "FAILED: dfn.pt2 does not load or run" in capsys.readouterr().err
    assert (here / "dfn.pt2").read_bytes() == b"no archive"


def test_an_error_while_writing_leaves_the_old_file(tiny, here, monkeypatch):
    (here / "dfn.pt2").write_text("old")

    def fail(*_, **__):
        raise RuntimeError("no export today")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(RuntimeError, match="no export today"):
        main(["-", "dfn.pt2", "--size", "64", "--device", "cpu"])
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("dfn.pt2", "old")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
@pytest.mark.parametrize("name", ["dfn.pt2", "dfn.onnx"])
def test_a_full_disk_is_named_and_leaves_the_old_file(tiny, here, monkeypatch, name):
    (here / name).write_text("old")
    mkstemp = tempfile.mkstemp

    def full(*arguments, **settings):
        handle, path = mkstemp(*arguments, **settings)
        if settings.get("dir") == Path():
            os.close(handle)
            handle = os.open("/dev/full", os.O_WRONLY)
        return handle, path

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(ConfigError, match=f"{name} cannot be written .No space left on device"):
        main(["-", name, "--size", "64", "--device", "cpu"])
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [(name, "old")]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["dfn.bin"], r"dfn\.bin: expected a name that ends in \.onnx or \.pt2, or give --format"),
        (["dfn.onnx", "--format", "aoti"], r"--format aoti needs a name that ends in \.pt2"),
        (["dfn.pt2", "--size", "31x64"], "--size 31x64: expected at least 32 in each direction"),
        (
            ["dfn.pt2", "--size", "32", "--dynamic"],
            "--size 32x32: expected at least 33 in each direction with --dynamic",
        ),
        (["dfn.pt2", "--batch", "0"], "--batch 0: expected at least 1"),
        (["dfn.pt2", "--batch", "9" * 40], "--batch 9.*: expected at least 1 image and at most 1024"),
        (["dfn.pt2", "--size", "1000000"], "--size 1000000x1000000: expected at most 33554432 pixels"),
        (["dfn.pt2", "--opset", "18"], "--opset belongs to --format onnx"),
        (["dfn.onnx", "--opset", "17"], "--opset 17: expected 18 to 23"),
        (["missing/dfn.pt2", "--size", "64"], r"missing/dfn\.pt2 cannot be written .*choose a folder that exists"),
        (["file/dfn.onnx", "--size", "64"], r"file/dfn\.onnx cannot be written"),
    ],
)
def test_bad_arguments_are_errors(tiny, here, arguments, text):
    (here / "file").write_text("")
    with pytest.raises(ConfigError, match=text):
        main(["-", *arguments, "--device", "cpu"])


def test_dynamic_and_a_batch_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["-", "dfn.pt2", "--dynamic", "--batch", "2"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_an_error_that_says_what_to_install(tiny, here, monkeypatch, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else SimpleNamespace())
    with pytest.raises(ConfigError, match=rf'needs {package} .* pip install -e "\.\[export\]"'):
        main(["-", "dfn.onnx"])


def test_a_missing_compiler_is_an_error(tiny, here):
    # Its own patch: what monkeypatch puts back is deleted from Inductor's settings, for all tests to come.
    patch = torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler"))
    with patch, pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, but there is no no-such-compiler"):
        main(["-", "dfn.pt2", "--format", "aoti"])


def test_what_does_not_fit_one_onnx_file_is_an_error(tiny, here, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(export, "ONNX_BYTES", 100)
    with pytest.raises(ConfigError, match=r"one file holds less than .*use --format pt2 or aoti"):
        main(["-", "dfn.onnx"])


def test_labels_of_more_than_256_classes_are_an_error(tiny, here, monkeypatch):
    loaded = SimpleNamespace(model=tiny, classes=("x",) * 257, palette=PALETTE)
    monkeypatch.setattr(export, "load_model", lambda path, device: loaded)
    with pytest.raises(ConfigError, match="257 classes do not fit into uint8"):
        main(["-", "dfn.pt2", "--labels", "--device", "cpu"])


def test_help_names_the_opset_and_a_misspelt_format_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m dfn_fast.export")
    assert "18 to 23 (default: 18)" in printed
    assert max(map(len, printed.splitlines())) <= 120
    with pytest.raises(SystemExit):
        main(["-", "dfn.onnx", "--format", "onx"])
    assert "did you mean onnx?" in capsys.readouterr().err


def test_an_error_exits_with_2_and_no_traceback(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(["nowhere.pth", "dfn.pt2", "--device", "cpu"]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere.pth: this checkpoint does not exist")
