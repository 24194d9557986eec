"""The house: rooms that import only from those before them, and ideas that one file owns."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "shrank"
# Each may import from those before it; docs/architecture.md says what each is for.
ROOMS = [
    "util",
    "linalg",
    "ops",
    "layers",
    "fusing",
    "model",
    "calibration",
    "data",
    "planning",
    "compression",
    "healing",
    "saving",
    "streaming",
    "measuring",
    "serving",
    "reporting",
    "cli",
]
FRONT = {"__init__", "__main__", "lr_module", "version"}  # files beside the rooms; all rooms may ask for the version
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of shrank that a file imports, at its top or inside a function, and not for annotations alone."""
    package, found = path.relative_to(ROOT).parts[:-1], set()
    tree = ast.parse(path.read_text())
    for branch in [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
        tree.body.remove(branch)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("shrank.")):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        base = ".".join((*base, *([(node.module or "").removeprefix("shrank.")] if node.module else [])))
        for alias in node.names:
            full = f"{base}.{alias.name}".lstrip(".")
            found.add(full if full in MODULES else base)
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_file_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, *FRONT}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_before_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "version"}
    for module, path in MODULES.items():
        if room_of(module) == room:
            above = {other for other in imports_of(path) if room_of(other) not in allowed}
            assert not above, f"{module} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert text and text.endswith(".") and len(text) > 60


def test_there_is_no_circle() -> None:
    # An import from a package is one of its __init__.
    imports = {
        module: {f"{other}.__init__" if f"{other}.__init__" in MODULES else other for other in imports_of(path)}
        for module, path in MODULES.items()
    }
    left = dict(imports)
    while ready := [module for module, others in left.items() if not others & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, f"circles among {', '.join(sorted(left))}"


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ("nn.Conv2d", {"layers/plain.py"}),
        ("safe_open", {"util/tensor_file.py"}),
        ("except Exception", set()),
        ("setattr(", {"model/surgery.py", "layers/two_stage.py"}),
    ],
)
def test_ideas_have_one_owner(text: str, owners: set[str]) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in FILES if text in path.read_text()}
    assert found == owners


def test_the_library_does_not_print() -> None:
    for path in FILES:
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path.name


def statements(tree: ast.AST) -> int:
    """Statements count, and not lines, so that nothing is gained by packing them."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_and_no_function_outgrows_its_room(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert statements(tree) <= 170
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert statements(node) - 1 <= 32, node.name
