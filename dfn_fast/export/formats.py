"""The files of :mod:`dfn_fast.export`: a network becomes a ``torch.export`` program, and that becomes a file.

``"pt2"`` is the program, ``"aoti"`` the AOTInductor package compiled from it, ``"onnx"`` one ONNX file.
"""

import contextlib
import importlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dfn_fast.errors import ConfigError
from dfn_fast.files import replacing
from dfn_fast.network.backbone import MIN_SIZE

SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
PACKAGES = {"pt2": (), "aoti": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
OPSET, LAST_OPSET = 18, 23  # PyTorch writes 18; others are converted from it
MIN_DYNAMIC = MIN_SIZE + 1  # torch.export treats a size of 1 at stride 32 as a special case
EXTRA_FILE = "dfn.json"  # the metadata of a torch.export program


def require_tools(file_format: str) -> None:
    """Raises :class:`ConfigError` if a package or the C++ compiler that the format needs is missing."""
    for package in PACKAGES[file_format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f'--format {file_format} needs {package} ({error}); install it with pip install -e ".[export]"'
            ) from error
    if file_format == "aoti":
        from torch._inductor import config

        compiler = config.cpp.cxx[1]
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"--format aoti needs a C++ compiler, but there is no {compiler}; install one (apt install g++), name "
                "yours in the variable CXX, or use --format pt2"
            )


def dynamic_shapes(image: Tensor) -> tuple[dict[int, Any]]:
    height, width = (1, 2) if image.dtype == torch.uint8 else (2, 3)
    dim = torch.export.Dim
    sizes = {height: dim("height", min=MIN_DYNAMIC), width: dim("width", min=MIN_DYNAMIC)}
    return ({0: dim("batch", min=1), **sizes},)


def export_program(network: nn.Module, image: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """Exports ``network``. Raises :class:`ConfigError` if this PyTorch, such as 2.11, cannot export dynamic sizes."""
    from torch._dynamo.exc import UserError, UserErrorType

    try:
        with torch.no_grad(), quiet():
            return torch.export.export(network, (image,), dynamic_shapes=dynamic_shapes(image) if dynamic else None)
    except UserError as error:
        if not dynamic or error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
            raise
        raise ConfigError(
            f"--dynamic: PyTorch {torch.__version__} cannot export this network for all sizes; use PyTorch 2.13 or "
            "later, or leave --dynamic out and give --size and --batch"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporters' remarks on their own code and on packages that this network does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    file_format: str,
    notes: dict[str, str],
    *,
    dynamic: bool = False,
    opset: int = OPSET,
) -> None:
    """Writes ``program`` and ``notes`` to ``path``. An old file is replaced only once the new one is whole.

    Raises :class:`ConfigError` if it cannot be written, or the network cannot be converted to ``opset``.
    """
    try:
        with replacing(path) as file, torch.no_grad(), quiet():
            if file_format == "onnx":
                _write_onnx(program, file, notes, opset, dynamic)
            elif file_format == "aoti":
                _write_aoti(program, file, notes)
            else:
                whole = io.BytesIO()  # on a full disk, PyTorch's own writer ends the process
                torch.export.save(program, whole, extra_files={EXTRA_FILE: json.dumps(notes)})
                file.write(whole.getbuffer())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder that exists and is writable"
        ) from error


def _write_aoti(program: torch.export.ExportedProgram, file: IO[bytes], notes: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = str(Path(folder, "model.pt2"))
        settings = {"aot_inductor.metadata": notes}
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        with open(package, "rb") as compiled:
            shutil.copyfileobj(compiled, file)


def _write_onnx(
    program: torch.export.ExportedProgram, file: IO[bytes], notes: dict[str, str], opset: int, dynamic: bool
) -> None:
    (image,) = program.example_inputs[0]  # type: ignore[index]
    result = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["image"],
        output_names=["labels" if image.dtype == torch.uint8 else "log_probabilities"],
        dynamic_shapes=dynamic_shapes(image) if dynamic else None,  # again, for the names of the sizes
    )
    assert result is not None
    result.model.metadata_props.update(notes)
    content = result.model_proto
    written = {entry.domain: entry.version for entry in content.opset_import}
    if written[""] != opset:  # if a conversion fails, PyTorch keeps the opset it had
        raise ConfigError(f"--opset {opset}: this network could not be converted to it; use {written['']}")
    file.write(content.SerializeToString())


def read(path: Path, file_format: str) -> Callable[[Tensor], Tensor]:
    """Loads an exported file as a function."""
    if file_format == "pt2":
        return torch.export.load(path).module()
    if file_format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
