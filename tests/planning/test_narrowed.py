"""Blocks in plans: as values, in JSON, in tables."""

from __future__ import annotations

import json

import pytest

from shrank.linalg import Options, Shape, allocate, combined
from shrank.planning.narrowed import NarrowedBlock
from shrank.planning.plan import LayerPlan, RankPlan

UNITS = 64


def plan() -> RankPlan:
    """A gated block of 64 units on 32 features, and another layer."""
    layers = [
        LayerPlan("mlp.gate", "Linear", 32 * UNITS, Shape(UNITS, 32)),
        LayerPlan("mlp.up", "Linear", 32 * UNITS, Shape(UNITS, 32, pivoted=True), rank=8),
        LayerPlan("mlp.down", "Linear", 32 * UNITS, Shape(32, UNITS)),
        LayerPlan("head", "Linear", 320, Shape(10, 32)),
    ]
    blocks = [
        NarrowedBlock("mlp", ("mlp.gate", "mlp.up"), "mlp.down", UNITS),
        NarrowedBlock("other", ("mlp.down",), "head", 32, reason="meet each other", able=False),
    ]
    return RankPlan(tuple(layers), 100, narrowed=tuple(blocks))


def test_a_width_changes_its_layers() -> None:
    narrow = plan().with_width("mlp", 24)
    assert [str(x.shape) for x in narrow] == ["24x32", "24x32", "32x24", "10x32"]
    assert [x.rank for x in narrow] == [None] * 4 and [x.narrowed for x in narrow] == [True] * 3 + [False]
    assert narrow.params_after == 100 + 3 * 24 * 32 + 320
    assert narrow["mlp.up"].bytes() == 2 * 24 * 32
    assert plan().diff(narrow) == {"mlp.up": (8, None), "mlp: width": (None, 24)}
    assert not narrow.does_nothing and narrow.narrower[0].width == 24
    back = narrow.with_width("mlp.down", None)
    assert [str(x.shape) for x in back] == ["64x32", "64x32", "32x64", "10x32"] and back.does_nothing


def test_what_cannot_be_set() -> None:
    with pytest.raises(KeyError, match=r"no block of units 'head\.0'"):
        plan().with_width("head.0", 8)
    with pytest.raises(ValueError, match=r"width must lie in 1..63, got 64"):
        plan().with_width("mlp", 64)
    with pytest.raises(ValueError, match="'other' cannot be narrowed: meet each other"):
        plan().with_width("other", 8)


def test_json_keeps_blocks() -> None:
    for each in (plan(), plan().with_width("mlp", 24)):
        assert RankPlan.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    without = plan().to_dict()
    del without["narrowed"]
    assert RankPlan.from_dict(without).narrowed == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(narrowed={}), "'narrowed' must be a list"),
        (lambda d: d["narrowed"].append(3), "must be an object"),
        (lambda d: d["narrowed"][0].update(colour="red"), "block 'mlp': unknown keys colour"),
        (lambda d: d["narrowed"][0].update(producers=[]), "producers must be a list of names"),
        (lambda d: d["narrowed"][0].update(units=0), "units must be at least 1"),
        (lambda d: d["narrowed"][0].update(width=64), "width must be below its 64 units"),
        (lambda d: d["narrowed"][0].update(width=0), "width must be at least 1"),
        (lambda d: d["narrowed"][0].update(width=True), "width must be a whole number"),
        (lambda d: d["narrowed"][0].update(stacked=1), "'stacked' must be true or false"),
        (lambda d: d["narrowed"][0].update(able=1), "able must be true or false"),
        (lambda d: d["narrowed"][0].update(error="much"), "error must be a number"),
        (lambda d: d["narrowed"][0].update(consumer="mlp.low"), "the plan lists no layer mlp.low"),
        (lambda d: d["narrowed"][0].update(consumer="mlp.up"), "in two of its places"),
        (lambda d: d["narrowed"].append(d["narrowed"][0]), "listed twice"),
        (lambda d: d["narrowed"][1].update(width=8), "in another narrowed block"),
        (lambda d: d["narrowed"][0].update(width=20), "'mlp.gate': its block is 20 wide, and it is 24x32"),
        (lambda d: d["narrowed"][0].update(width=None), "of which no block is narrowed: mlp.down, mlp.gate, mlp.up"),
        (lambda d: d["narrowed"].clear(), "of which no block is narrowed: mlp.down"),
        (lambda d: d["layers"][0].update(narrowed=False), "'mlp.gate': its block 'mlp' is narrowed, and it is not"),
        (lambda d: d["layers"][0].update(narrowed="yes"), "narrowed must be true or false"),
        (lambda d: d["layers"][0].update(shape=None), "'mlp.gate': its block is 24 wide, and it is None"),
    ],
)
def test_a_damaged_plan_is_refused(change, message) -> None:
    data = json.loads(json.dumps(plan().with_width("mlp", 24).to_dict()))
    change(data)
    with pytest.raises(ValueError, match=message):
        RankPlan.from_dict(data)


def test_tables_and_summaries_tell_of_blocks() -> None:
    narrow = plan().with_width("mlp", 24)
    text = str(narrow)
    assert "1 of 2 blocks narrowed" in narrow.summary
    assert "64 units" in text and "narrow" in text and "meet each other" in text
    assert "narrowed" not in plan().summary


def test_items_as_one_are_as_good_as_each() -> None:
    """At every budget where the relaxed problem turns."""
    items = [Options([1, 2, 4], [9, 4, 0]), Options([1, 3], [5, 0])]
    one = combined(items)
    for cost, error in zip(one.costs, one.errors, strict=True):
        assert allocate(items, cost).error <= error + 1e-12
