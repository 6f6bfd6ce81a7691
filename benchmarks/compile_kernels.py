"""Cross-compiles every kernel with every entry of the tuning tables, without a GPU, and prints the compiler's report.

``python -m benchmarks.compile_kernels [--op NAME] [--target sm_90] [--json FILE]``; exit code 1 if a rule is broken:

- no spills to memory (``LDL``/``STL`` in the machine code; on gfx942 ``scratch_*``: a scalar register that is kept in a
  lane of a vector register stays on the chip),
- shared memory within what one block may have on that chip,
- no atomics (sums are gathered in a fixed order),
- every access to a streaming operand moves 16 bytes or more.

The last rule is checked per operand, in the PTX (``harness/ptx.py``). An access whose operand is unknown counts for
every streaming operand. The machine code (``LDG``, ``LDGSTS``, ``STG``) shows whether the assembler keeps the widths.
On gfx942 the rule is not applied: a kernel must compile and fit.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.ptx import UNTRACED, operand_accesses
from dfn_kernels.common.compile_cases import CompileCase, operators

KIB = 1024
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
STREAMING_BYTES = 16
# Matches the notes of cases that DFN-R101 launches in bfloat16, and of those that spilled registers under some version
# of Triton until their tile was changed.
NETWORK = re.compile(r"bf16, (512 channels|(1|21) classes, 128 -> 512|512 pixels)|21 classes, 2 maps bf16")
ONCE_SPILLED = {"focal_loss": re.compile(r"256 classes, 128 -> 512, u8|21 classes.* weights of pixels")}


@dataclass
class Record:
    """The compiler's report on one case. Widths are ``{bytes: accesses in the code}``."""

    operator: str
    kernel: str
    note: str
    target: str
    streaming: list[str] = field(default_factory=list)
    registers: int = 0
    shared_bytes: int = 0
    spills: int = 0
    local_bytes: int = 0
    instructions: int = 0
    atomics: int = 0
    tensor_core: int = 0
    widths: dict[str, int] = field(default_factory=dict)  # machine code: "LDG.128" -> count
    operands: dict[str, dict[str, int]] = field(default_factory=dict)  # argument -> {"load 16": count}
    error: str = ""

    def problems(self) -> list[str]:
        """The rules that this case breaks, each as a sentence that names kernel, case and target."""
        if self.error:
            found = [f"does not compile: {self.error}"]
        else:
            found = [*self._broken_limits(), *self._narrow_operands()]
        return [f"{self.operator}: {self.kernel} ({self.note}) on {self.target} {text}" for text in found]

    def _broken_limits(self) -> Iterator[str]:
        if self.spills:
            yield f"spills registers: {self.spills} accesses, {self.local_bytes} bytes of local memory"
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            yield f"needs {self.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[self.target]}"
        if self.atomics:
            yield f"has {self.atomics} atomic operations"

    def _narrow_operands(self) -> Iterator[str]:
        if self.target == "gfx942":
            return
        for name in self.streaming:
            accesses = self.operands.get(name, {}) | self.operands.get(UNTRACED, {})
            narrow = {access: n for access, n in accesses.items() if int(access.split()[1]) < STREAMING_BYTES}
            if name not in self.operands:
                yield f"never accesses its streaming operand {name}"
            elif narrow:
                yield f"moves its streaming operand {name} in accesses below 16 bytes: {narrow}"
        if self.streaming:
            in_ptx = {access for accesses in self.operands.values() for access in accesses}
            split = {opcode: n for opcode, n in self.widths.items() if _access(opcode) not in {*in_ptx, ""}}
            if split:
                yield f"has accesses in its machine code that its PTX has not: {split}"


def _access(opcode: str) -> str:
    """A width of the machine code in the form of the PTX's: "load 16" for "LDG.128"; empty for a bulk copy."""
    base, _, bits = opcode.partition(".")
    return f"{'store' if base == 'STG' else 'load'} {int(bits) // 8}" if bits else ""


def _leaves(kind: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Paths and types of the numbers and pointers in an argument: several if it is a tuple."""
    if isinstance(kind, str):
        yield path, kind
    else:
        for i, part in enumerate(kind):
            yield from _leaves(part, (*path, i))


def compile_case(case: CompileCase, target: str, operator: str = "", disassemble: bool = True) -> Record:
    """Compiles one case for one target and reads the compiler's report; a failure to compile goes into ``error``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    record = Record(operator, case.kernel.__name__, case.note, target, list(case.streaming))
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    leaves = [(i, *leaf) for i, kind in enumerate(signature.values()) for leaf in _leaves(kind) if kind != "constexpr"]
    fixed = {p.name for p in case.kernel.params if p.do_not_specialize}  # unknown to the compiler at a launch
    divisible = set(case.divisible) - fixed
    attributes = {(i, *path): [["tt.divisibility", 16]] for i, path, _ in leaves if names[i] in divisible}
    chip = TARGETS[target]
    gpu = GPUTarget("hip", chip, 64) if target == "gfx942" else GPUTarget("cuda", chip, 32)
    # AMD has no 3 x tf32; the launchers ask for exact float32 there.
    constexprs = {k: "ieee" if v == "tf32x3" and target == "gfx942" else v for k, v in case.constexprs.items()}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    try:
        source = ASTSource(case.kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever the compiler raises is this case's result
        record.error = f"{type(error).__name__}: {str(error).strip()[-800:]}"
        return record
    record.shared_bytes = compiled.metadata.shared
    if target == "gfx942":
        _read_amdgcn(compiled.asm["amdgcn"], record)
    else:
        pointers = [names[i] if kind.startswith("*") else "" for i, _, kind in leaves]
        record.operands = operand_accesses(compiled.asm["ptx"], pointers)
        record.atomics = len(re.findall(r"\b(?:atom|red)\.(?:async\.)?global", compiled.asm["ptx"]))
        _read_cubin(compiled.asm["cubin"], record, disassemble)
    return record


def _cuobjdump(cubin: bytes, flag: str) -> str:
    """The output of the disassembler that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([str(tool), flag, str(file)], capture_output=True, text=True, check=True).stdout


def _read_cubin(cubin: bytes, record: Record, disassemble: bool) -> None:
    """Reads registers, local memory and, if ``disassemble`` is set or there may be spills, the machine code."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _cuobjdump(cubin, "-res-usage"))
    if usage is None:
        raise RuntimeError(f"cuobjdump gave no resource usage for {record.kernel} on {record.target}")
    record.registers = int(usage.group(1))
    record.local_bytes = int(usage.group(2)) + int(usage.group(3))
    if not disassemble and not record.local_bytes:
        return
    sass = _cuobjdump(cubin, "-sass")
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    record.instructions = sum(opcodes.values())
    for opcode, count in opcodes.items():
        base, *modifiers = opcode.split(".")
        if base in ("LDL", "STL"):
            record.spills += count
        elif base.endswith("MMA"):
            record.tensor_core += count
        elif base in ("LDG", "STG", "LDGSTS"):
            bits = next((m for m in modifiers if m in ("U8", "S8", "U16", "S16", "64", "128", "256")), "32")
            name = f"{base}.{bits.lstrip('US')}"
            record.widths[name] = record.widths.get(name, 0) + count
        elif base.startswith(("UTMA", "UBLKCP")):
            record.widths[base] = record.widths.get(base, 0) + count


def _read_amdgcn(assembly: str, record: Record) -> None:
    """Reads registers, spills and global accesses from AMD's assembly and its metadata."""

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]

    record.registers = value("vgpr_count")
    record.local_bytes = value("private_segment_fixed_size")
    opcodes = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", assembly, re.MULTILINE)
    record.instructions = len(opcodes)
    record.spills = sum(opcode.startswith("scratch_") for opcode in opcodes)
    record.atomics = sum("_atomic_" in opcode for opcode in opcodes)
    record.tensor_core = sum(opcode.startswith("v_mfma") for opcode in opcodes)
    moves = Counter(o for o in opcodes if re.match(r"(global|buffer)_(load|store)_", o))
    record.widths = dict(sorted(moves.items()))


@functools.cache
def _cases(operator: str) -> list[CompileCase]:
    return operators()[operator].compile_cases()


def _compile_job(job: tuple[str, int, str, bool]) -> Record:
    """Runs in a worker process, which finds the case again by operator and position."""
    operator, index, target, disassemble = job
    return compile_case(_cases(operator)[index], target, operator, disassemble)


def in_turns(cases: list[CompileCase], targets: list[str]) -> set[tuple[int, str]]:
    """Positions of cases and the targets to compile them for. Every case is compiled for ``sm_90``, every second one of
    a kernel also for one of the other targets, in turn. A kernel with few cases is compiled for all targets."""
    others = [target for target in targets if target != "sm_90"]
    by_kernel: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        by_kernel.setdefault(case.kernel.__name__, []).append(i)
    chosen = {(i, "sm_90") for i in range(len(cases)) if "sm_90" in targets}
    for positions in by_kernel.values():
        for turn, i in enumerate(positions):
            few = len(positions) < 2 * len(others)
            chosen |= {(i, target) for j, target in enumerate(others) if few or turn % (2 * len(others)) == 2 * j}
    return chosen


def of_the_network(operator: str) -> set[tuple[int, str]]:
    """Positions of an operator's cases that a quick check compiles, for ``sm_90``: each kernel's first case that the
    network launches, or else its first case, and those that were once at fault."""
    first: dict[str, int] = {}
    for i, case in sorted(enumerate(_cases(operator)), key=lambda item: NETWORK.search(item[1].note) is None):
        first.setdefault(case.kernel.__name__, i)
    spilled = ONCE_SPILLED.get(operator)
    more = {i for i, case in enumerate(_cases(operator)) if spilled and spilled.search(case.note)}
    return {(i, "sm_90") for i in {*first.values(), *more}}


def chosen(operator: str, targets: list[str], share: str) -> set[tuple[int, str]]:
    """Positions of an operator's cases and the targets to compile them for. ``share``: "all"; "network", those of
    :func:`of_the_network`; "rest", those of :func:`in_turns` without these."""
    if share == "all":
        return {(i, target) for i in range(len(_cases(operator))) for target in targets}
    quick = {(i, target) for i, target in of_the_network(operator) if target in targets}
    return quick if share == "network" else in_turns(_cases(operator), targets) - quick


def compile_all(
    names: list[str], targets: list[str], disassemble: list[str], processes: int = 2, share: str = "all"
) -> list[Record]:
    """A share of the named operators' cases, see :func:`chosen`, in parallel.

    ``disassemble``: the only targets whose streaming kernels are disassembled. If empty, everything is.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    shares = {name: chosen(name, targets, share) for name in names}
    jobs = [
        (name, i, target, not disassemble or (target in disassemble and bool(case.streaming)))
        for name in names
        for i, case in enumerate(_cases(name))
        for target in targets
        if (i, target) in shares[name]
    ]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_job, jobs, chunksize=4))


def table(records: list[Record]) -> str:
    """One line a record: registers, shared bytes, spills, accesses by width, accesses of each streaming operand."""
    header = ["kernel", "case", "target", "regs", "shared", "spills", "instr", "mma", "accesses", "streaming operands"]
    rows = [header]
    for r in records:
        widths = " ".join(f"{name}x{count}" for name, count in sorted(r.widths.items()))
        streams = "; ".join(
            f"{name}: {', '.join(f'{a} B x{n}' for a, n in r.operands.get(name, {}).items())}" for name in r.streaming
        )
        counts = (r.registers, r.shared_bytes, r.spills, r.instructions, r.tensor_core)
        rows.append([r.kernel, r.note, r.target, *map(str, counts), "FAILED" if r.error else widths, streams])
    columns = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, [*columns, 0], strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 if any case breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=sorted(operators()), help="operator; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="architecture; default: all")
    parser.add_argument(
        "--disassemble",
        action="append",
        choices=TARGETS,
        help="disassemble only the streaming kernels of this architecture, to save time (default: everything)",
    )
    parser.add_argument(
        "--share",
        choices=("all", "network", "rest"),
        default="all",
        help="network: the cases of DFN-R101, for sm_90; rest: the others for sm_90, and some for the other targets",
    )
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    targets, names = options.target or list(TARGETS), options.op or sorted(operators())
    records = compile_all(names, targets, options.disassemble or [], options.processes, options.share)
    print(table(records), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) | {"problems": r.problems()} for r in records], indent=1))
    problems = [problem for record in records for problem in record.problems()]
    print(*problems, sep="\n", file=sys.stderr, flush=True)
    print(f"{len(records)} compilations, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
