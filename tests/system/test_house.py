"""The code keeps its plan: which room may import which, no import cycles, no imports in functions to avoid one."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "dfn_fast": ROOT / "dfn_fast",
    "dfn_kernels": ROOT / "kernels/dfn_kernels",
    "benchmarks": ROOT / "benchmarks",
}

# From the bottom up. A file imports from its own room and from the rows below.
ROWS = [
    {"dfn_kernels", "errors", "version"},
    {"cli", "files", "runtime"},
    {"checkpoint", "media"},
    {"data", "network"},
    {"config", "inference"},
    {"evaluate", "export", "predict", "trainer"},
    {"train"},
    {"__main__"},
]
ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by name. A room's ``__init__`` has the room's name."""
    folder = PACKAGES[package]
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}


def imports(path: Path, inside_functions: bool = False) -> Iterator[str]:
    """Our modules that a file imports: all of them, or only those imported inside a function or under a condition."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if inside_functions and node in tree.body:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def room(module: str) -> str:
    """The room of a module. The package itself, whose names are for users, is the topmost room."""
    package, *rest = module.split(".")
    return package if package != "dfn_fast" or not rest else rest[0]


FILES = sorted(name for name in MODULES if name.startswith("dfn_fast."))


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_from_its_own_room_and_from_lower_rows(module):
    own = room(module)
    for other in imports(MODULES[module]):
        assert room(other) in ROW_OF, f"{module} imports {other}, which is in no room"
        assert room(other) == own or ROW_OF[room(other)] < ROW_OF[own], f"{module} imports {other}"


def test_the_plan_and_the_folders_agree():
    assert {room(name) for name in FILES} == set(ROW_OF) - {"dfn_kernels"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_itself_by_way_of_others(package):
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items() if name.split(".")[0] == package}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


# Benchmarks are left out: search_blocks.py must first set Triton's interpreter, by its option.
@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("benchmarks.")))
def test_every_import_of_ours_stands_at_the_top_of_its_file(module):
    assert list(imports(MODULES[module], inside_functions=True)) == []


@pytest.mark.parametrize("module", FILES)
def test_inside_the_package_names_come_from_files_and_never_from_a_room(module):
    own = MODULES[module]
    if own.name == "__init__.py":
        return
    rooms = {name for name in FILES if MODULES[name].name == "__init__.py"} | {"dfn_fast"}
    assert not rooms & set(imports(own))


def test_kernels_import_nothing_of_ours():
    for name in modules("dfn_kernels"):
        assert {other.split(".")[0] for other in imports(MODULES[name])} <= {"dfn_kernels"}


def test_no_tool_of_the_benchmarks_imports_a_test():
    for name in modules("benchmarks"):
        assert not [other for other in imports(MODULES[name]) if other.split(".")[-1].startswith("test_")]


@pytest.mark.parametrize("name", [name for name in FILES if MODULES[name].name == "__init__.py"])
def test_every_room_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
