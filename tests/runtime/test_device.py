"""The choice of device settings: the precision on a CPU."""

import warnings

import pytest
import torch

from dfn_fast.errors import ConfigError
from dfn_fast.runtime import device as execution
from dfn_fast.runtime.device import choose_amp, choose_device

CPU = torch.device("cpu")


def test_a_cpu_that_has_no_bf16_is_named_where_it_is_asked_for_it(monkeypatch):
    monkeypatch.setattr(execution, "onednn_takes_bf16", lambda: False)
    with pytest.warns(UserWarning, match="has no bf16 arithmetic, so bf16 is slower than float32; use --amp off"):
        assert choose_amp("bf16", CPU) == torch.bfloat16
    monkeypatch.setattr(execution, "onednn_takes_bf16", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_amp("bf16", CPU) == torch.bfloat16
        assert choose_amp("off", CPU) is None


@pytest.mark.parametrize("name", ["meta", "xla", "hpu", "mps", "toaster", "cuda:-1", "cuda:99"])
def test_a_device_that_cannot_compute_here_is_named(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError, match=f"--device '?{name}"):
        choose_device(name)
    assert choose_device("cpu") == CPU


def test_a_cpu_takes_bf16_by_itself_only_with_matrix_units(monkeypatch):
    for units, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(execution, "has_amx", lambda units=units: units)
        monkeypatch.setattr(execution, "onednn_takes_bf16", lambda: True)
        assert choose_amp("auto", CPU) == expected


def test_fp16_is_for_a_gpu():
    with pytest.raises(ConfigError, match="--amp fp16 needs a GPU; on a CPU use --amp bf16 or off"):
        choose_amp("fp16", CPU)
