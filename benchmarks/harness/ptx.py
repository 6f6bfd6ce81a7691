"""Which pointer argument a global memory access of a compiled kernel belongs to, and how many bytes it moves.

Triton writes one PTX instruction per access. The register that holds its address is traced back through the arithmetic
to the pointer arguments that it comes from.
"""

import re
from collections import Counter, defaultdict

UNTRACED = "?"  # the operand of an address that passed through memory


def operand_accesses(ptx: str, arguments: list[str]) -> dict[str, dict[str, int]]:
    """Global accesses by pointer argument: ``{argument: {"load 16": count}}``, traced through the address arithmetic.

    ``arguments`` are the names of the kernel's parameters in order, empty if it is not a pointer; further ones are
    Triton's own. A value from memory has no source: an index read from one operand does not name another.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    accesses: list[tuple[str, str]] = []  # address register, "load 16"
    for statement in re.split(r"[;\n]", re.sub(r"//.*", "", ptx)):
        match = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*)", statement)
        if not match:
            continue
        opcode, operands = match.groups()
        access = _access(opcode, operands)
        if access:
            accesses.append(access)
        elif opcode.startswith("ld.param"):
            register, parameter = re.match(r"(\S+), \[\w+_param_(\d+)", operands).groups()  # type: ignore[union-attr]
            sources[register].add(f"param {parameter}")
        elif not opcode.startswith(("ld.", "ldmatrix", "st.", "setp", "bra", "bar", "cp.", "mbarrier", "stmatrix")):
            written, _, read = operands.partition("}" if operands.startswith("{") else ",")
            for register in re.findall(r"%\w+", written):
                sources[register].update(re.findall(r"%\w+", read))

    found: dict[str, Counter[str]] = defaultdict(Counter)
    for address, moved in accesses:
        for name in _roots(address, sources, arguments):
            found[name][moved] += 1
    return {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())}


def _access(opcode: str, operands: str) -> tuple[str, str] | None:
    """Address register and "load 16" of a PTX instruction that reaches global memory, else None."""
    addresses = re.findall(r"\[\s*(%\w+)", operands)
    if re.match(r"(ld|st)\.(\w+\.)*global", opcode):
        vector = re.search(r"\.v(\d)", opcode)
        bits = int(re.search(r"[bsuf](\d+)$", opcode).group(1))  # type: ignore[union-attr]
        width = bits // 8 * (int(vector.group(1)) if vector else 1)
        return addresses[0], f"{'load' if opcode.startswith('ld') else 'store'} {width}"
    if opcode.startswith("cp.async") and ".shared.global" in opcode and "bulk" not in opcode:
        width = int(re.findall(r"\]\s*,\s*(0x[0-9a-f]+|\d+)", operands)[0], 0)
        return addresses[1], f"load {width}"
    return None


def _roots(register: str, sources: dict[str, set[str]], arguments: list[str]) -> set[str]:
    """Names of the pointer arguments that a register's value comes from; UNTRACED if it passed through memory."""
    seen, todo = {register}, [register]
    while todo:
        fresh = sources.get(todo.pop(), set()) - seen
        seen |= fresh
        todo += fresh
    parameters = [int(s.split()[1]) for s in seen if s.startswith("param")]
    pointers = {arguments[p] for p in parameters if p < len(arguments) and arguments[p]}
    return pointers or {UNTRACED}
