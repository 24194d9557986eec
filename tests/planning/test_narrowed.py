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


def plan_of_heads() -> RankPlan:
    """Four heads of keys and values of 8, each looked at by two of queries."""
    layers = [
        LayerPlan("attention.q", "Linear", 64 * 32, Shape(64, 32)),
        LayerPlan("attention.k", "Linear", 32 * 32, Shape(32, 32)),
        LayerPlan("attention.v", "Linear", 32 * 32, Shape(32, 32)),
        LayerPlan("attention.o", "Linear", 32 * 64, Shape(32, 64)),
    ]
    names = tuple(layer.fqn for layer in layers)
    block = NarrowedBlock("attention", names[:3], names[3], 4, rows=(16, 8, 8), columns=16)
    return RankPlan(tuple(layers), narrowed=(block,))


def plan_of_channels() -> RankPlan:
    """20 channels between convolutions of 3x3, with a batch norm and a depthwise convolution between them."""
    layers = [
        LayerPlan("first", "Conv2d", 20 * 12 * 9, Shape(20, 12 * 9)),
        LayerPlan("depthwise", "Conv2d", 20 * 9, Shape(20, 20 * 9, 20, down_groups=20), reason="depthwise"),
        LayerPlan("second", "Conv2d", 12 * 20 * 9, Shape(12, 20 * 9)),
    ]
    block = NarrowedBlock("second", ("first",), "second", 20, columns=9, carriers=("norm", "depthwise"))
    return RankPlan(tuple(layers), narrowed=(block,))


def test_units_of_several_rows_and_columns() -> None:
    heads = plan_of_heads().with_width("attention", 3)
    assert [str(x.shape) for x in heads] == ["48x32", "24x32", "24x32", "32x48"]
    assert [str(x.shape) for x in heads.with_width("attention", None)] == ["64x32", "32x32", "32x32", "32x64"]
    channels = plan_of_channels().with_width("second", 14)
    assert [x.shape for x in channels] == [
        Shape(14, 108),
        Shape(14, 126, 14, down_groups=14),
        Shape(12, 126),
    ]
    assert all(x.narrowed for x in channels) and channels["depthwise"].params_after == 14 * 9
    assert [x.shape for x in channels.with_width("second", None)] == [x.shape for x in plan_of_channels()]
    for plan in (heads, channels):
        assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("make", [lambda: plan().with_width("mlp", 24), plan])
def test_plans_that_know_one_row_and_column_only(make) -> None:
    """As they were written before units had several."""
    data = json.loads(json.dumps(make().to_dict()))
    for block in data["narrowed"]:
        for key in ("rows", "columns", "strided", "carriers"):
            del block[key]
    assert RankPlan.from_dict(data) == make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(rows=[16, 8]), "rows must be a list of 3 numbers or of none"),
        (lambda b: b.update(rows=16), "rows must be a list of 3 numbers"),
        (lambda b: b.update(rows=[16, 8, 0]), "rows must be at least 1"),
        (lambda b: b.update(rows=[16, 8, "8"]), "rows must be a whole number"),
        (lambda b: b.update(rows=[8, 8, 8]), "'attention.q': its block is 3 wide, and it is 48x32"),
        (lambda b: b.update(columns=0), "columns must be at least 1"),
        (lambda b: b.update(columns=True), "columns must be a whole number"),
        (lambda b: b.update(columns=8), "'attention.o': its block is 3 wide, and it is 32x48"),
        (lambda b: b.update(stacked=True), "'stacked' says which outputs of one producer"),
        (lambda b: b.update(strided="yes"), "strided must be true or false"),
        (lambda b: b.update(carriers="norm"), "carriers must be a list of names"),
        (lambda b: b.update(carriers=["norm", 1]), "carriers must be a list of names"),
        (lambda b: b.update(carriers=["attention.q"]), "in two of its places"),
    ],
)
def test_damaged_structures_are_refused(change, message) -> None:
    data = json.loads(json.dumps(plan_of_heads().with_width("attention", 3).to_dict()))
    change(data["narrowed"][0])
    with pytest.raises(ValueError, match=message):
        RankPlan.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["narrowed"][0].update(carriers=["norm"]), "of which no block is narrowed: depthwise"),
        (lambda d: d["layers"][1].update(narrowed=False), "'depthwise': its block 'second' is narrowed, and it is not"),
        (lambda d: d["layers"][1]["shape"].update(groups=20), "'depthwise': its block is 14 wide"),
        (lambda d: d["layers"][1]["shape"].update(out_features=0), "out_features must be at least 1"),
        (lambda d: d["layers"][1]["shape"].update(out_features=200), "'depthwise': its block is 14 wide"),
    ],
)
def test_damaged_carriers_are_refused(change, message) -> None:
    data = json.loads(json.dumps(plan_of_channels().with_width("second", 14).to_dict()))
    change(data)
    with pytest.raises(ValueError, match=message):
        RankPlan.from_dict(data)
