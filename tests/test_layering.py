"""The house: rows of modules that import only from lower rows, and owners that no other file copies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "shrank"
ROWS = {
    "version": 0, "files": 0, "progress": 0, "parallel": 0, "linalg": 0, "_native": 0, "merged_weight": 0, "stages": 0,
    "timing": 0, "batches": 0, "latency": 0, "hooks": 0, "plain": 0, "references": 0, "peft_hook": 0, "names": 0,
    "spill": 0,
    "media": 0, "processors": 0, "model_inputs": 0,
    "ops": 1, "roofline": 1, "tensor_file": 1, "losses": 1, "low_rank": 1, "schedule": 1,
    "data_files": 1, "token_batches": 1,
    "led": 2, "ced": 2, "file_batches": 2,
    "subclasses": 3, "lora": 3,
    "lr_module": 4, "targets": 4, "rank": 4,
    "surgery": 5, "report": 5, "distillation": 5,
    "plan": 6, "dense": 6, "passes": 6,
    "collect": 7, "fitting": 7,
    "calibration": 8,
    "apply": 9, "budget": 9,
    "planning": 10, "checkpoint": 10, "anchored": 10, "storage": 10,
    "auto_fact": 11, "heal": 11, "evaluate": 11, "measure": 11, "hf": 11, "transformers_hook": 11, "layer_times": 11,
    "explain_plain": 11,
    "bench": 12, "bench_plot": 12, "explain": 12,
    "cli_common": 13, "cli_models": 14, "cli_eval": 14, "cli": 15,
    "__init__": 16, "__main__": 16,
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of shrank that a file imports, at its top or inside a function, and not for annotations alone."""
    rooms = set()
    depth = len(path.relative_to(ROOT).parts)
    tree = ast.parse(path.read_text())
    for branch in [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
        tree.body.remove(branch)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("shrank."):
            rooms.add(node.module.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_rows(path: Path) -> None:
    here = room(path)
    for other in imported_rooms(path) - {here}:
        assert ROWS[other] < ROWS[here], f"{here} (row {ROWS[here]}) imports {other} (row {ROWS[other]})"


def test_every_file_has_a_row() -> None:
    assert {room(path) for path in FILES} == ROWS.keys()


@pytest.mark.parametrize(("text", "owners"), [
    ("nn.Conv2d", {"plain.py"}),
    ("safe_open", {"tensor_file.py"}),
    ("except Exception", set()),
    ("setattr(", {"surgery.py", "stages.py"}),
])
def test_ideas_have_one_owner(text: str, owners: set[str]) -> None:
    found = {path.name for path in FILES if text in path.read_text()}
    assert found == owners


def test_the_library_does_not_print() -> None:
    for path in FILES:
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path.name


def test_no_file_and_no_function_outgrows_its_room() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 250, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 40, f"{path.name}: {node.name} has {length} lines"
