"""The house: rows of modules that import only from lower rows, and owners that no other file copies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "shrank"
ROWS = {
    "_native": 0, "bench_plot": 0, "files": 0, "hooks": 0, "latency": 0, "linalg": 0, "masks": 0, "media": 0,
    "merged_weight": 0, "model_inputs": 0, "names": 0, "nested": 0, "parallel": 0, "peft_hook": 0, "plain": 0,
    "processors": 0, "progress": 0, "references": 0, "seal": 0, "spill": 0, "stages": 0, "timing": 0, "version": 0,
    "data_files": 1, "fingerprint": 1, "low_rank": 1, "ops": 1, "rank": 1, "report": 1, "roofline": 1,
    "subclasses": 1, "tensor_file": 1, "traits": 1,
    "batches": 2, "ced": 2, "explain_plain": 2, "led": 2, "plan": 2,
    "cli_common": 3, "explain": 3, "lora": 3, "losses": 3, "lr_module": 3, "schedule": 3, "streams": 3, "targets": 3,
    "token_batches": 3,
    "distillation": 4, "evaluate": 4, "file_batches": 4, "measure": 4, "saving": 4, "surgery": 4,
    "dense": 5, "diffusers_hook": 5, "fitting": 5, "layer_times": 5, "passes": 5, "transformers_hook": 5,
    "budget": 6, "collect": 6, "storage": 6,
    "calibration": 7, "heal": 7,
    "apply": 8, "planning": 8,
    "anchored": 9, "checkpoint": 9, "diffusers_models": 9, "hf_loading": 9, "model_card": 9,
    "auto_fact": 10, "folders": 10, "hf_models": 10, "hf_saving": 10, "safetensors_hook": 10,
    "hf": 11,
    "bench": 12, "cli_eval": 12, "cli_models": 12,
    "cli": 13,
    "__init__": 14, "__main__": 14,
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
