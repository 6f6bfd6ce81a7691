"""The wait before the first result: import, first step, compilation, graph capture.

``pytest benchmarks/test_startup.py --benchmark-only``. Each is measured in a process of its own, where nothing is
loaded, compiled or captured yet; torch's own import is timed separately. On a CPU a short run measures :data:`SHORT`.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
PROGRAMS = {
    "import torch": "import torch",
    "import dfn_fast, after torch": "import torch\nSTART()\nimport dfn_fast",
    "first training step": """
        from dfn_fast.trainer.trainer import Trainer
        from dfn_fast import FastDFN
        from dfn_fast.config import TrainConfig
        from dfn_fast.data.loader import Batch
        import torch
        device = torch.device(DEVICE)
        config = TrainConfig(backbone="resnet18", crop=(64, 64), batch_size=2, channels=64, compile=False)
        batch = Batch(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), *torch.zeros(2, 2, 64, 64, dtype=torch.uint8), [])
        START()
        Trainer(FastDFN(21, **config.network_arguments()), config, 10, device).step([batch], 0).item()
    """,
    "first image": """
        from dfn_fast import FastDFN, Predictor
        import numpy as np
        model = FastDFN(21, backbone="resnet18", channels=64)
        START()
        Predictor(model, device=DEVICE, graphs=False)(np.zeros((64, 64, 3), np.uint8))
    """,
    "folding DFN-R101": """
        from dfn_fast import FastDFN
        model = FastDFN(21)
        START()
        model.fuse()
    """,
    "compiling a training step": """
        from dfn_fast.trainer.trainer import Trainer
        from dfn_fast import FastDFN
        from dfn_fast.config import TrainConfig
        from dfn_fast.data.loader import Batch
        import torch
        config = TrainConfig(backbone="resnet18", crop=(64, 64), batch_size=2, channels=64, compile=True)
        batch = Batch(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), *torch.zeros(2, 2, 64, 64, dtype=torch.uint8), [])
        trainer = Trainer(FastDFN(21, **config.network_arguments()), config, 10, torch.device(DEVICE))
        START()
        trainer.step([batch], 0).item()
    """,
}
if CUDA:
    PROGRAMS["capturing a graph"] = """
        from dfn_fast import FastDFN, Predictor
        import numpy as np
        predictor = Predictor(FastDFN(21, backbone="resnet18", channels=64), device=DEVICE)
        START()
        predictor.warm_up([(64, 64)])
        predictor(np.zeros((64, 64, 3), np.uint8))
    """

SHORT = ("import dfn_fast, after torch", "first image")


def seconds_of(program: str, cache: Path) -> float:
    """Seconds from the program's ``START()``, or from its beginning, to its end."""
    text = f"""
import json, time
DEVICE = {"cuda" if CUDA else "cpu"!r}
begin = [time.perf_counter()]
def START():
    begin[0] = time.perf_counter()
{textwrap.dedent(program)}
print(json.dumps(time.perf_counter() - begin[0]))
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in SHORT else [pytest.mark.full]) for what in PROGRAMS]
)
def test_startup(what, benchmark, notes, tmp_path):
    seconds: list[float] = []
    benchmark.group = "start-up"
    rounds = 1 if "compil" in what else 3
    benchmark.pedantic(lambda: seconds.append(seconds_of(PROGRAMS[what], tmp_path)), rounds=rounds, iterations=1)
    median = sorted(seconds)[len(seconds) // 2]
    benchmark.extra_info.update({"what": what, "seconds": median})
    notes.append(f"{what}: {median:.2f} s")
