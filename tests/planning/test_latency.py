"""Latency tables: interpolation, files, and times of the layers of a model."""

from __future__ import annotations

import json

import pytest
import torch

from shrank import Budget, LatencyTable, make_plan
from shrank.measuring.layer_times import measure_layers
from tests.common.models import Mixed, draw, fingerprint, hf_inputs, hf_model, seeded

ENTRY = {"dense": 9.0, "plain": {"4": 1.0, "8": 3.0, "16": 5.0}, "pivoted": {}}


@pytest.mark.parametrize("rank, seconds", [(None, 9.0), (1, 1.0), (4, 1.0), (6, 2.0), (8, 3.0), (12, 4.0), (40, 5.0)])
def test_between_ranks_the_time_is_interpolated(rank, seconds) -> None:
    assert LatencyTable({"a": ENTRY}, {}).seconds("a", rank, pivoted=False) == seconds


def test_what_was_not_measured_is_no_faster_than_dense() -> None:
    assert LatencyTable({"a": ENTRY}, {}).seconds("a", 4, pivoted=True) == 9.0
    with pytest.raises(ValueError, match="no layer 'b'"):
        LatencyTable({"a": ENTRY}, {}).seconds("b", 4, pivoted=False)


def test_a_file_gives_the_same_table(tmp_path) -> None:
    table = LatencyTable({"a": ENTRY}, {"device": "cpu"})
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=9),
        lambda data: data["layers"]["a"].pop("dense"),
        lambda data: data["layers"]["a"]["plain"].update({"4": -1}),
        lambda data: data.update(layers=[]),
        lambda data: data["layers"].update(a=3),
    ],
)
def test_damaged_files_are_named(change, tmp_path) -> None:
    path = tmp_path / "table.json"
    LatencyTable({"a": json.loads(json.dumps(ENTRY))}, {}).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"table\.json"):
        LatencyTable.load(path)


@pytest.mark.parametrize("build", [lambda: hf_model("bert"), lambda: hf_model("gpt2")], ids=["bert", "gpt2"])
def test_every_layer_of_a_model_is_timed_and_the_model_is_as_before(build) -> None:
    model = build()
    before = fingerprint(model)
    table = measure_layers(model, lambda: model(**hf_inputs(model)), rounds=2)
    assert fingerprint(model)["types"] == before["types"] and not any(m._forward_hooks for m in model.modules())
    plan = make_plan(model, 4)
    assert {x.fqn for x in plan.low_rank} <= table.layers.keys()
    assert all(entry["dense"] > 0 and entry["plain"] for entry in table.layers.values())
    made = make_plan(
        model,
        Budget(
            keep_latency=0.99,
            table=LatencyTable({name: {**entry, "dense": 1e3} for name, entry in table.layers.items()}, {}),
        ),
    )  # anything is faster
    assert made.low_rank


def test_convolutions_are_timed_at_ranks_of_their_groups() -> None:
    model, x = seeded(Mixed), draw(2, 16, 8, 8)
    table = measure_layers(model, lambda: model(x), rounds=2)
    assert {"stem", "grouped", "mixer", "head"} == table.layers.keys()
    assert all(int(rank) % 2 == 0 for rank in table.layers["grouped"]["plain"])
    assert not table.layers["grouped"]["pivoted"] and table.layers["stem"]["pivoted"]
    with pytest.raises(ValueError, match="reaches no layer"):
        measure_layers(model, lambda: None)
    assert torch.is_grad_enabled()
