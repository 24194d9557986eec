"""The JSON of a plan: exact round trips, and hostile files refused by name."""

from __future__ import annotations

import json

import pytest
from torch import nn

import shrank
from shrank import RankPlan
from tests.common.models import Mixed, TiedLM, seeded


def test_plan_round_trips_through_json(tmp_path):
    plan = shrank.make_plan(nn.ModuleDict({"a": seeded(Mixed), "b": seeded(TiedLM)}), 0.5)
    for field in ("rank", "shape", "error"):  # the plan has both kinds of every field
        assert {getattr(layer, field) is None for layer in plan} == {True, False}
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan


LAYER = {"fqn": "0", "kind": "Linear", "size": 4}
JSON = {
    "empty": "", "binary": b"\xff\xfe\x00", "deep": "[" * 10**5, "list": "[]", "null": "null",
    "no-layers": {"format": 1}, "version": {"format": 2, "layers": []},
    "layer-no-object": {"format": 1, "layers": [3]},
    "negative-size": {"format": 1, "layers": [LAYER | {"size": -1}]},
    "no-size": {"format": 1, "layers": [{"fqn": "0", "kind": "Linear"}]},
    "rank-without-shape": {"format": 1, "layers": [LAYER | {"rank": 2}]},
    "error-text": {"format": 1, "layers": [LAYER | {"error": "x"}]},
    "twice": {"format": 1, "layers": [LAYER, LAYER]}, "other": {"format": 1, "layers": [], "other_params": "9"},
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_hostile_plans_are_refused_with_the_files_name(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(ValueError, match=r"plan\.json: ."):
        RankPlan.load(path)
