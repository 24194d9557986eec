"""The study of quality at a size: what it counts is what layers store, and every method has its line in the picture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from benchmarks.quality import sizes
from benchmarks.quality.baselines import Statistics, layers, split
from benchmarks.quality.tasks import Task
from shrank import Budget, Grid, Storage
from shrank.linalg import Shape
from tests.common.models import WIDTH, draw, mlp
from tests.common.tolerances import assert_close


class Outputs(Task):
    """How near outputs are to those of the dense model."""

    name = "outputs"

    def model(self) -> nn.Module:
        return mlp(3)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = draw(50, WIDTH)
        with torch.no_grad():
            return {"cosine": torch.cosine_similarity(model(x), mlp(3)(x)).mean().item()}


def bench() -> sizes.Bench:
    dense = mlp(3)
    plan = shrank.make_plan(dense, {"*": None}, errors=False)
    return sizes.Bench(Outputs(), dense, {name: plan[name].shape for name in layers(dense, ())})


def test_sizes_are_those_of_the_layers() -> None:
    made = bench()
    small = shrank.auto_fact(copy.deepcopy(made.dense), Budget(keep_bytes=0.1, group_sizes=(8,), correction_ranks=(2,)))
    plan = small.shrank_plan
    row = made.planned("shrank", plan, small)
    assert row["bytes"] == pytest.approx(sum(x.bytes() for x in plan) / sum(2 * x.size for x in plan), abs=1e-4)
    assert row["weights"] == pytest.approx(sum(x.params_after for x in plan) / sum(x.size for x in plan), abs=1e-4)
    assert sum(row["forms"].values()) == len(made.shapes)
    whole = made.uniform("RTN int8", made.dense, Storage(Grid(8)))
    assert whole["weights"] == whole["FLOPs"] == 1.0 and 0.5 < whole["bytes"] < 0.6 and whole["cosine"] > 0.9999
    corrected = made.corrected("int4", made.dense, Storage(Grid(4, 8), True, Grid(8)), 2)
    assert corrected["weights"] == corrected["FLOPs"] > 1.0


@pytest.mark.parametrize("grid", [None, Grid(8), Grid(4, 32)], ids=str)
def test_factors_of_the_whitened_svd_on_a_grid(grid: Grid | None) -> None:
    made, x = bench(), draw(400, WIDTH).double()
    seen = {name: Statistics(len(x), x.T @ x) for name in made.shapes}
    found = {name: lambda rank, m=module: _truncated(m, rank) for name, module in layers(made.dense, ()).items()}
    model = sizes._svd_llm_on(made, found, seen, 0.99, grid)
    for name, module in layers(model, ()).items():
        wanted = _truncated(made.dense.get_submodule(name), 32)
        error = (module.weight - wanted).norm() / wanted.norm()
        assert error < {None: 1e-6, Grid(8): 0.02, Grid(4, 32): 0.3}[grid]


def _truncated(module: nn.Module, rank: int) -> torch.Tensor:
    up, down = split(module.weight.detach().double(), rank)
    assert_close(up.T @ up, torch.eye(rank).double())
    return up @ down


def test_ranks_are_multiples_of_groups() -> None:
    assert sizes._rank(Shape(128, 128), None) is None
    assert sizes._rank(Shape(128, 128), 0.8) == 32 and sizes._rank(Shape(512, 512), 0.8) == 192


def test_every_method_has_a_line(tmp_path) -> None:
    methods = ("dense, 16 bits", "shrank", "shrank, bits alone", "GPTQ int4 g32", "GPTQ + EoRA, int4 g32 + rank 16")
    rows = [
        {
            "method": name,
            "bytes": 0.5 - 0.05 * i,
            "weights": 1.0,
            "FLOPs": 1.0,
            "cosine": 0.99 - 0.01 * i,
            "budget": 0.3,
        }
        for i, name in enumerate(methods)
    ]
    sizes.draw("minilm", rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert [sizes._series(name) for name in methods[3:]] == ["GPTQ", "GPTQ + EoRA"]
    lines = sizes.table(rows[::-1]).splitlines()
    assert len(lines) == 2 + len(rows) and lines[2].startswith("| dense, 16 bits | 0.5 ")
    assert "budget" not in lines[0]
