"""Every kernel with every entry of the tuning tables compiles for every architecture, and the compiler's report is
as required. This stands in for a GPU."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dfn_kernels
from dfn_kernels import tuning
from dfn_kernels.common.compile_cases import operators

pytest.importorskip("triton", reason="compiles with Triton")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(dfn_kernels.__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run_compiler(*arguments: str) -> subprocess.CompletedProcess:
    """``python ARGUMENTS`` in a process whose Triton compiles: this one's may interpret, decided at its start."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DFN_KERNELS")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, PACKAGE.parent)))
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run_script(text: str, folder: Path) -> Any:
    """What the script, given a file's name, writes there as JSON."""
    script, report = folder / "script.py", folder / "report.json"
    script.write_text(text)
    result = run_compiler(str(script), str(report))
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(report.read_text())


def reports(folder: Path, share: str, processes: int) -> list[dict[str, Any]]:
    """The compiler's report on a share of all cases."""
    file = folder / "records.json"
    arguments = ("--share", share, "--disassemble", "sm_90", "--processes", str(processes), "--json", str(file))
    result = run_compiler("-m", "benchmarks.compile_kernels", *arguments)
    assert file.exists(), result.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def network_records(tmp_path_factory) -> list[dict[str, Any]]:
    """The compiler's report on every kernel for ``sm_90``, in the cases that the network launches."""
    return reports(tmp_path_factory.mktemp("network"), "network", processes=1)


@pytest.fixture(scope="module")
def other_records(tmp_path_factory) -> list[dict[str, Any]]:
    """The compiler's report on every other case for ``sm_90``, and on every kernel for the other targets with some of
    its cases: all take minutes. ``python -m benchmarks.compile_kernels`` is for those, after a change of a kernel."""
    return reports(tmp_path_factory.mktemp("compile"), "rest", processes=2)


def assert_what_it_must_be(records: list[dict[str, Any]], operator: str, target: str, share: str) -> None:
    """No spills, shared memory within the limit, no atomics, 16-byte accesses of streaming operands."""
    from benchmarks.compile_kernels import chosen

    found = [r for r in records if (r["operator"], r["target"]) == (operator, target)]
    cases = operators()[operator].compile_cases()
    expected = [cases[i] for i, wanted in sorted(chosen(operator, list(TARGETS), share)) if wanted == target]
    assert [(r["kernel"], r["note"]) for r in found] == [(case.kernel.__name__, case.note) for case in expected]
    problems = [problem for record in found for problem in record["problems"]]
    assert not problems, "\n".join(problems)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operator", operators())
def test_every_kernel_of_the_network_compiles_as_it_must(network_records, operator):
    assert_what_it_must_be(network_records, operator, "sm_90", "network")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", operators())
def test_the_compilers_report_is_what_it_must_be(other_records, operator, target):
    assert_what_it_must_be(other_records, operator, target, "rest")


@pytest.mark.parametrize("operator", operators())
def test_both_tiers_compile_what_the_tables_give(operator):
    """Every kernel in the first, and every case for ``sm_90`` and every kernel for every target in both."""
    from benchmarks.compile_kernels import chosen

    cases = operators()[operator].compile_cases()
    kernels = {case.kernel.__name__ for case in cases}
    quick, rest = (chosen(operator, list(TARGETS), share) for share in ("network", "rest"))
    assert {cases[i].kernel.__name__ for i, _ in quick} == kernels
    assert {i for i, target in quick | rest if target == "sm_90"} == set(range(len(cases)))
    for wanted in TARGETS:
        positions = [i for i, target in quick | rest if target == wanted]
        assert {cases[i].kernel.__name__ for i in positions} == kernels
        assert len(positions) >= len(cases) // 8


def jit_functions() -> Iterator[str]:
    """Names of the package's ``@triton.jit`` functions that are launched: those that end in ``_kernel``."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name


def test_every_kernel_is_compiled():
    compiled = {case.kernel.__name__ for module in operators().values() for case in module.compile_cases()}
    assert set(jit_functions()) == compiled


def all_cases() -> list[tuple]:
    return [tuple(case) for module in operators().values() for case in module.compile_cases()]


def entries(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to the numbers in a table: keys of dictionaries, fields of tiles."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from entries(item, (*path, key))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield from entries(item, (*path, name))
    elif type(value) is int:
        yield path


def doubled(value: Any, path: tuple) -> Any:
    """The table with one number doubled."""
    if not path:
        return value * 2
    key, *rest = path
    if isinstance(value, dict):
        return value | {key: doubled(value[key], tuple(rest))}
    return value._replace(**{key: doubled(getattr(value, key), tuple(rest))})


TABLE_ENTRIES = [
    (name, path)
    for name, table in vars(tuning).items()
    if name.isupper() and (isinstance(table, dict | tuple) or name.endswith("_BLOCK"))
    if name != "WINOGRAD"  # a CPU's: nothing is compiled for it
    for path in entries(table)
]


def test_every_entry_of_the_tuning_tables_is_compiled(monkeypatch):
    """An entry that no case reads could be changed without any case changing."""
    cases = all_cases()
    unreached = []
    for name, path in TABLE_ENTRIES:
        with monkeypatch.context() as patch:
            patch.setattr(tuning, name, doubled(getattr(tuning, name), path))
            if all_cases() == cases:
                unreached.append(f"{name}{list(path)}")
    assert not unreached
    assert TABLE_ENTRIES


PTX = """
    ld.param.b64 %rd1, [k_param_0];  // in_ptr
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b32 %r1, [k_param_2];
    mul.wide.s32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r2, 0x0;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
    ld.global.L1::no_allocate.b32 %r6, [%rd4];
    mad.wide.s32 %rd5, %r6, 2, %rd2;
    @!%p2 st.global.v2.b16 [%rd5], {%rs1, %rs2};
    selp.b64 %rd6, %rd1, %rd2, %p3;
    ld.global.b8 %rs3, [%rd6+8];
    cvt.u32.u64 %r9, %rd2;
    ld.shared.b64 %rd7, [%r9];
    add.s64 %rd8, %rd7, %rd3;
    st.global.v8.b32 [ %rd8 + 0 ], { %r1 };
"""


def test_accesses_are_traced_to_their_operands(monkeypatch):
    """An index that was loaded names no operand, a choice of two names both, an address from memory none."""
    from benchmarks.harness.ptx import UNTRACED, operand_accesses

    assert operand_accesses(PTX, ["in_ptr", "out_ptr", ""]) == {
        "in_ptr": {"load 1": 1, "load 16": 2, "load 4": 1},
        "out_ptr": {"load 1": 1, "store 4": 1},
        UNTRACED: {"store 32": 1},
    }


BAD_KERNELS = """
import json
import sys
from pathlib import Path

from benchmarks.compile_kernels import compile_case
from dfn_kernels.common.compile_cases import CompileCase
from dfn_kernels.common.triton_or_stub import tl, triton


@triton.jit
def copy_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(in_ptr + i, mask=i < n), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def unspecialised_kernel(in_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(in_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def gather_kernel(in_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(in_ptr + tl.load(index_ptr + i)))


@triton.jit
def atomic_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i % 4, tl.load(in_ptr + i))


@triton.jit
def spilling_kernel(in_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(in_ptr + i)
    tl.store(out_ptr + i, x / tl.sum(x, axis=0)[None, :] + x / tl.sum(x, axis=1)[:, None])


@triton.jit
def product_kernel(in_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)
    x = tl.load(in_ptr + i[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out_ptr + i[:, None] * ROWS + i[None, :], tl.dot(x, tl.trans(x)).to(tl.float16))


@triton.jit
def broken_kernel(in_ptr, out_ptr):
    tl.store(out_ptr, tl.no_such_function(in_ptr))


def case(kernel, constexprs, warps=4, pointer="*fp32", divisible=("in_ptr", "out_ptr", "n"), **more):
    names = [n for n in kernel.arg_names if n not in constexprs]
    signature = {n: pointer if n.endswith("_ptr") else "i32" for n in names} | more
    divisible = tuple(n for n in divisible if n in names)
    return CompileCase(kernel, signature, constexprs, divisible, warps, 2, ("in_ptr", "out_ptr"), "")


CASES = {
    "good": case(copy_kernel, {"BLOCK": 1024}),
    "narrow": case(copy_kernel, {"BLOCK": 1024}, divisible=("in_ptr", "out_ptr")),
    "unaligned": case(copy_kernel, {"BLOCK": 1024}, divisible=("out_ptr", "n")),
    "unspecialised": case(unspecialised_kernel, {"BLOCK": 1024}),
    "unused": case(copy_kernel, {"BLOCK": 1024})._replace(streaming=("in_ptr", "n")),
    "gather": case(gather_kernel, {"BLOCK": 1024}, divisible=("in_ptr", "out_ptr", "index_ptr"), index_ptr="*i32"),
    "atomic": case(atomic_kernel, {"BLOCK": 1024}),
    "spills": case(spilling_kernel, {"ROWS": 64, "COLUMNS": 128}, warps=1),
    "shared": case(product_kernel, {"ROWS": 128, "COLUMNS": 1024}, warps=16, pointer="*fp16"),
    "broken": case(broken_kernel, {}),
}

if __name__ == "__main__":
    targets = ("sm_90", "gfx942")
    problems = {t: {name: compile_case(c, t, "op").problems() for name, c in CASES.items()} for t in targets}
    Path(sys.argv[1]).write_text(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def bad_kernels(tmp_path_factory) -> dict[str, dict[str, list[str]]]:
    """What is found in kernels made to break one rule each, by target: a report without faults proves nothing."""
    return run_script(BAD_KERNELS, tmp_path_factory.mktemp("bad"))


@pytest.mark.slow
def test_the_report_names_each_broken_rule(bad_kernels):
    found = bad_kernels["sm_90"]
    assert found["good"] == []
    assert all("_kernel () on sm_90" in problem for problems in found.values() for problem in problems)
    text = {name: " ".join(problems) for name, problems in found.items()}
    assert "streaming operand in_ptr in accesses below 16 bytes: {'load 4'" in text["narrow"]
    assert "streaming operand in_ptr" in text["unaligned"]
    assert "out_ptr" not in text["unaligned"]
    assert "streaming operand in_ptr" in text["gather"]
    assert "out_ptr" not in text["gather"]
    assert "streaming operand in_ptr" in text["unspecialised"]
    assert "never accesses its streaming operand" in text["unused"]
    assert "atomic operations" in text["atomic"]
    assert "spills registers" in text["spills"]
    assert "bytes of shared memory" in text["shared"]
    assert "does not compile" in text["broken"]


@pytest.mark.slow
def test_on_gfx942_a_kernel_must_compile_and_fit(bad_kernels):
    text = {name: " ".join(problems) for name, problems in bad_kernels["gfx942"].items() if problems}
    assert text.keys() == {"atomic", "shared", "broken"}
    assert "atomic operations" in text["atomic"]
    assert "spills registers" in text["shared"]
    assert "bytes of shared memory" in text["shared"]
    assert "does not compile" in text["broken"]


def test_an_access_that_the_assembler_splits_is_told(monkeypatch):
    from benchmarks.compile_kernels import Record

    record = Record("op", "copy_kernel", "", "sm_90", ["x_ptr"], operands={"x_ptr": {"load 16": 1, "store 16": 1}})
    record.widths = {"LDG.128": 4, "STG.128": 1, "UTMALDG": 1}
    assert record.problems() == []
    record.widths["STG.32"] = 4
    assert "in its machine code that its PTX has not: {'STG.32': 4}" in record.problems()[0]


CONSTANTS = """
import json
import sys
from pathlib import Path

from benchmarks.compile_kernels import compile_case
from dfn_kernels.common.compile_cases import operators


def with_ones(case):
    integers = {p.name for p in case.kernel.params if not p.do_not_specialize and case.signature.get(p.name) == "i32"}
    signature = {name: kind for name, kind in case.signature.items() if name not in integers}
    return case._replace(signature=signature, constexprs=case.constexprs | dict.fromkeys(integers, 1))


if __name__ == "__main__":
    errors = {}
    for name, module in operators().items():
        kernels = {case.kernel.__name__: case for case in module.compile_cases()}
        records = [compile_case(with_ones(case), "sm_90", name, disassemble=False) for case in kernels.values()]
        errors[name] = [f"{r.kernel}: {r.error}" for r in records if r.error]
    Path(sys.argv[1]).write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors_with_ones(tmp_path_factory) -> dict[str, list[str]]:
    return run_script(CONSTANTS, tmp_path_factory.mktemp("constants"))


@pytest.mark.slow
@pytest.mark.parametrize("operator", operators())
def test_sizes_of_one_compile(errors_with_ones, operator):
    """A launch makes an integer argument of 1 a constant of the kernel; the interpreter does not."""
    assert errors_with_ones[operator] == []
