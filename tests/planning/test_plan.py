"""RankPlan: a table a person can read, edit, save and compare."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

import shrank
from shrank import RankPlan
from shrank.linalg import Grid, Storage
from tests.common.models import TiedLM, seeded


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Embedding(10, 8), nn.Conv2d(32, 64, 3, groups=2), nn.Linear(64, 4))


def plan() -> RankPlan:
    return shrank.make_plan(model(), 8)


def test_totals_are_the_models() -> None:
    made, net = plan(), model()
    assert made.params_before == sum(p.numel() for p in net.parameters())
    small = shrank.auto_fact(net, made)
    assert made.params_after == sum(p.numel() for p in small.parameters())


def test_it_is_a_collection_of_layers_by_name() -> None:
    made = plan()
    assert len(made) == 4 and [x.fqn for x in made] == ["0", "1", "2", "3"]
    assert made["0"].rank == 8 and made["2"].shape.groups == 2
    with pytest.raises(KeyError, match="no layer 'head'"):
        made["head"]


def test_the_printed_table_says_everything() -> None:
    text = str(plan())
    for word in ("2 of 4 layers", "Conv2d", "64x288/2", "break-even rank 32", "Embedding is not a", "too small"):
        assert word in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_growth_is_announced() -> None:
    grown = shrank.make_plan(model(), 64, allow_growth=True)
    assert grown["0"].grows and "grow" in grown.summary
    assert "grow" not in plan().summary


def test_edits_make_new_plans() -> None:
    made = plan()
    edited = made.with_rank("0", None).with_rank("2", 4)
    assert made["0"].rank == 8 and edited["0"].rank is None and edited["2"].rank == 4
    assert edited["2"].reason == "set by hand"
    assert made.diff(edited) == {"0": (8, None), "2": (8, 4)} and made.diff(made) == {}
    with pytest.raises(ValueError, match="'1' cannot be low-rank: Embedding"):
        made.with_rank("1", 3)


STORAGES = (Storage(Grid(8)), Storage(Grid(4, 8)), Storage(Grid(4, 8), True), Storage(Grid(4, 8), True, Grid(8)))
STORAGES += (Storage(Grid(8), activations="int8"),)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_bits_in_json_in_the_table_and_in_bytes(storage: Storage) -> None:
    made = plan()
    layer = replace(made.low_rank[0], storage=storage)
    made = replace(made, layers=(layer, *made.layers[1:]))
    assert RankPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert f" {layer.rank} {storage} " in str(made)
    assert layer.bytes() == layer.shape.bytes(layer.rank, storage) and layer.params_after >= layer.rank


def test_a_layer_of_fewer_bits_changes_without_a_rank() -> None:
    layer = replace(plan().low_rank[0], rank=None)
    assert not layer.changes and layer.bytes() == 2 * layer.size
    layer = replace(layer, storage=Storage(Grid(8)))
    assert layer.changes and layer.size < layer.bytes() < 2 * layer.size and layer.params_after == layer.size


def test_a_correction_needs_its_rank() -> None:
    made = plan()
    layer = replace(made.low_rank[0], storage=Storage(Grid(4, 8), True))
    made = replace(made, layers=(layer,)).with_rank(layer.fqn, None)
    assert made[layer.fqn].storage == Storage(Grid(4, 8))


def test_json_round_trip(tmp_path) -> None:
    made = shrank.make_plan(nn.ModuleDict({"a": model(), "b": seeded(TiedLM)}), 8)
    for field in ("rank", "shape", "error"):  # the plan has both kinds of every field
        assert {getattr(layer, field) is None for layer in made} == {True, False}
    made.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == made


BITS = {"grid": {"bits": 8, "group_size": None}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.pop("layers"), "key 'layers'"),
        (lambda d: d.update(layers={}), "must be a list"),
        (lambda d: d["layers"].append(7), "must be an object"),
        (lambda d: d["layers"][0].update(rank=0), "rank must be at least 1"),
        (lambda d: d["layers"][0].update(rank=True), "rank must be a whole number, got True"),
        (lambda d: d["layers"][0].update(rank="8"), "rank must be a whole number, got '8'"),
        (lambda d: d["layers"][0].update(rank=2.5), "got 2.5"),
        (lambda d: d["layers"][1].update(rank=2), "has a rank but no shape"),
        (lambda d: d["layers"][0].update(size=-1), "size must be a whole number, got -1"),
        (lambda d: d["layers"][0].pop("size"), "size must be a whole number, got None"),
        (lambda d: d.update(other_params="9"), "other_params must be a whole number, got '9'"),
        (lambda d: d["layers"][0].update(colour="red"), "unknown keys colour"),
        (lambda d: d["layers"][0]["shape"].update(groups=0), "groups must be at least 1"),
        (lambda d: d["layers"][0]["shape"].pop("groups"), "exactly the keys"),
        (lambda d: d["layers"][0].update(kind=3), "must be strings"),
        (lambda d: d["layers"][0].update(error="small"), "error must be a number"),
        (lambda d: d["layers"].append(d["layers"][0]), "lists layers twice: 0"),
        (lambda d: d["layers"][0].update(storage=[4]), "storage must have the keys"),
        (lambda d: d["layers"][0].update(storage={"bits": 4}), "storage must have the keys"),
        (lambda d: d["layers"][0].update(storage={"grid": {"bits": 4}}), "exactly the keys bits and group_size"),
        (lambda d: d["layers"][0].update(storage={"grid": {"bits": 5, "group_size": 8}}), "3, 4 or 8, got 5"),
        (lambda d: d["layers"][0].update(storage={"grid": {"bits": 4, "group_size": 0}}), "group_size of grid must be"),
        (lambda d: d["layers"][0].update(storage={"corrected": True}), "a correction is of a weight on a grid"),
        (lambda d: d["layers"][0].update(storage={"corrected": 1}), "corrected must be true or false"),
        (lambda d: d["layers"][1].update(storage=BITS), "has a grid but no shape"),
        (lambda d: d["layers"][0].update(storage={**BITS, "factor_grid": BITS["grid"]}), "without a correction"),
        (lambda d: d["layers"][0].update(rank=None, storage={**BITS, "corrected": True}), "a correction needs a rank"),
    ],
)
def test_foreign_json_is_refused_by_what_is_wrong(change, says: str) -> None:
    data = plan().to_dict()
    change(data)
    with pytest.raises(ValueError, match=says):
        RankPlan.from_dict(data)


NO_PLANS = {
    "empty": b"",
    "open": b"{",
    "list": b"[1]",
    "string": b'"plan"',
    "null": b"null",
    "zero": b"\x00",
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 10**5,
}


@pytest.mark.parametrize("content", NO_PLANS.values(), ids=NO_PLANS.keys())
def test_files_that_are_no_plan_are_refused_by_name(content: bytes, tmp_path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json: ."):
        RankPlan.load(tmp_path / "bad.json")


def test_a_plan_that_cannot_be_written_leaves_the_old_file(tmp_path) -> None:
    made = plan()
    made.save(tmp_path / "plan.json")
    with pytest.raises(TypeError, match="JSON"):
        replace(made, other_params=object()).save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
