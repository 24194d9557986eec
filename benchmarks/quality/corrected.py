"""Weights of 4 bits and what corrects them, against the published methods: benchmarks/results/corrected_minilm.json.

python -m benchmarks.quality.corrected [--groups 32 64 128] [--ranks 8 16 32] [--factors int8 bf16] [--table]

Rows are added to those that were measured before, or take their places.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import shrank
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality.baselines import layers, statistics
from benchmarks.quality.rounded import METHODS, Rounded
from benchmarks.quality.tasks import MiniLM
from benchmarks.speed.turns import THREADS
from shrank import RankPlan
from shrank.linalg import Grid, Storage

PATH = RESULTS / "corrected_minilm.json"
OURS = "shrank"
FACTORS = {"int8": Grid(8), "bf16": None}  # how factors are stored; those that are not rounded compute in float32


def planned(dense: nn.Module, names: list[str], storage: Storage, rank: int | None) -> RankPlan:
    """The same storage and rank for all of these layers."""
    plan = shrank.make_plan(dense, {"*": None})
    return RankPlan(
        tuple(replace(layer, rank=rank, storage=storage) if layer.fqn in names else layer for layer in plan),
        plan.other_params,
    )


def bytes_of(plan: RankPlan, names: list[str]) -> float:
    """Of the weights of these layers, relative to dense ones in bfloat16."""
    chosen = [layer for layer in plan if layer.fqn in names]
    return sum(layer.bytes() for layer in chosen) / sum(2 * layer.size for layer in chosen)


def rows(groups: list[int], ranks: list[int], factors: list[str]) -> Iterator[dict]:
    task = MiniLM()
    dense = task.model()
    names = list(layers(dense, task.exclude))
    calibration = shrank.calibrate(dense, task.batches(), inputs=True, layers=names)
    seen = statistics(task.model(), shrank.batches(task.batches()), None, task.exclude)
    measure = partial(_row, task, dense, names)
    for group in groups:
        grid = Grid(4, group)
        for storage, rank in _forms(grid, ranks, factors):
            plan = planned(dense, names, storage, rank)
            yield measure(OURS, plan, shrank.apply(copy.deepcopy(dense), plan, calibration))
        for name, method in METHODS.items():
            rounded = Rounded(dense, method, seen, names, group)
            for storage, rank in _forms(grid, ranks, factors):
                if (rank is None) == (method.correct is None):
                    in_int8 = storage.factor_grid is not None
                    yield measure(name, planned(dense, names, storage, rank), rounded.at(rank or 0, in_int8))


def _forms(grid: Grid, ranks: list[int], factors: list[str]) -> Iterator[tuple[Storage, int | None]]:
    yield Storage(grid), None
    for rank in ranks:
        for name in factors:
            yield Storage(grid, True, FACTORS[name]), rank


def _row(task: MiniLM, dense: nn.Module, names: list[str], method: str, plan: RankPlan, small: nn.Module) -> dict:
    layer = next(layer for layer in plan if layer.fqn in names)
    return {
        "method": method,
        "group": layer.storage.grid.group_size,
        "rank": layer.rank or 0,
        "factors": "" if layer.rank is None else next(n for n, g in FACTORS.items() if g == layer.storage.factor_grid),
        "bytes, of bfloat16 dense": round(bytes_of(plan, names), 4),
        **task.evaluate(small),
    }


def table(found: list[dict]) -> str:
    """A line for each method, a column for each form."""
    forms = list(dict.fromkeys((r["group"], r["rank"], r["factors"], r["bytes, of bfloat16 dense"]) for r in found))
    lines = [
        "| group | rank | factors | bytes | " + " | ".join(methods := list(dict.fromkeys(r["method"] for r in found)))
    ]
    lines = [f"{lines[0]} |", "|---" * (4 + len(methods)) + "|"]
    for form in sorted(forms, key=lambda form: (form[0], form[3])):
        group, rank, factors, size = form
        cosines = {r["method"]: r["cosine"] for r in found if (r["group"], r["rank"], r["factors"]) == form[:3]}
        cells = [f"{cosines[m]:.4f}" if m in cosines else "" for m in methods]
        lines.append(f"| {group} | {rank or ''} | {factors} | {size:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--factors", nargs="*", default=list(FACTORS), choices=FACTORS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        print(table(json.loads(PATH.read_text())["rows"]))
        return
    before = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    found = {_key(row): row for row in before}
    results = provenance("cpu")
    for row in rows(arguments.groups, arguments.ranks, arguments.factors):
        found[_key(row)] = row
        print(json.dumps(row), flush=True)
        PATH.write_text(json.dumps({**results, "rows": list(found.values())}, indent=1) + "\n")
    print(table(list(found.values())))


def _key(row: dict) -> tuple:
    return row["method"], row["group"], row["rank"], row["factors"]


if __name__ == "__main__":
    main()
