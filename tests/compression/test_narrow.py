"""Feed-forward blocks with fewer hidden units: planned, carried out, told again, and what forbids it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import Budget, Calibration, RankPlan
from shrank.compression.narrow import block_jobs
from shrank.layers.led import LED
from shrank.linalg import moments
from shrank.model.survey import Survey
from tests.common.feed_forward import UNITS, WIDTH, Block, Stacked, data, stack
from tests.common.models import assert_untouched, draw, fingerprint, hf_inputs, hf_model
from tests.common.tolerances import assert_close
from tests.common.units import (
    ATTENTION,
    CHANNELS,
    FILTERS,
    Gated,
    attention_model,
    copy_unit,
    image_model,
    images,
    inverted,
    normed,
    plain,
    texts,
    to_linear,
)

MADE = {
    "plain": Block,
    "gated": lambda: Block(gated=True),
    "without bias": lambda: Block(bias=False),
    "stacked": Stacked,
}


def blocks(make=Block) -> nn.Sequential:
    return stack(make, make)


def seen(model: nn.Module, **options: object) -> Calibration:
    return shrank.calibrate(model, data(), narrow=True, **options)


def plan_of(model: nn.Module, calibration: Calibration, width: int = 24) -> RankPlan:
    """Both blocks of a stack at a width."""
    plan = shrank.make_plan(model, Budget(keep_params=0.9), calibration=calibration, narrow=True, min_features=8)
    for block in plan.narrowed:
        plan = plan.with_width(block.name, width)
    return plan


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module) -> float:
    return sum((model(x) - dense(x)).square().sum().item() for x in data())


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_blocks_become_narrower_in_place(make) -> None:
    model = blocks(make)
    modules = dict(model.named_modules())
    calls = []
    model[2].down.register_forward_hook(lambda *_: calls.append(1))
    model[2].down.weight.requires_grad_(False)
    calibration = seen(model)
    calls.clear()
    small = shrank.apply(model, plan_of(model, calibration), calibration)
    assert small is model and dict(model.named_modules()) == modules
    assert (model[2].down.in_features, model[2].down.out_features) == (24, WIDTH)
    assert model[2].down.weight.shape == (WIDTH, 24) and not model[2].down.weight.requires_grad
    producer = model[2].both if make is Stacked else model[2].up
    outputs = 48 if make is Stacked else 24
    assert (
        producer.out_features == outputs and producer.weight.shape == (outputs, WIDTH) and producer.weight.requires_grad
    )
    assert (producer.bias is None) == (make is MADE["without bias"]) or producer.bias.shape == (outputs,)
    assert model(data()[0]).shape == (60, 5) and calls == [1]
    assert sum(p.numel() for p in model.parameters()) == model.shrank_plan.params_after + (
        sum(p.numel() for p in blocks(make).parameters()) - model.shrank_plan.params_before
    ) - sum(p.numel() for n, p in blocks(make).named_parameters() if n.endswith("bias")) + sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("bias")
    )


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_it_is_exact_where_units_are_dead(make) -> None:
    """Or never differ from others."""
    model = blocks(make)
    with torch.no_grad():
        for block in (model[2], model[3]):
            producer = block.both if make is Stacked else block.up
            producer.weight[4:12] = 0  # of the gate, where there is one in the layer
            if producer.bias is not None:
                producer.bias[4:12] = 0
    dense = copy.deepcopy(model)
    calibration = seen(model)
    shrank.apply(model, plan_of(model, calibration, UNITS - 8), calibration)
    with torch.no_grad():
        assert_close(model(data()[0]), dense(data()[0]))


def test_it_is_better_than_the_same_units_without_a_fit() -> None:
    dense = blocks()
    calibration = seen(dense)
    model = shrank.apply(copy.deepcopy(dense), plan_of(dense, calibration, 20), calibration)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for small, block in ((plain[2], dense[2]), (plain[3], dense[3])):
            kept = (small.up.weight[:, None] == block.up.weight).all(-1).nonzero()[:, 1]
            small.down.weight.copy_(block.down.weight[:, kept])
            small.down.bias.copy_(block.down.bias)
    assert error(model, dense) < error(plain, dense)


def test_a_budget_chooses_widths_or_ranks() -> None:
    """And keeps what it says; the errors that it adds up are not larger than with ranks alone."""
    dense = blocks()
    calibration = seen(dense)
    for keep in (0.4, 0.6, 0.8):
        plan = shrank.make_plan(dense, keep, calibration=calibration, narrow=True)
        ranks = shrank.make_plan(dense, keep, calibration=calibration)
        assert plan.spent[1] <= ranks.spent[1] and plan.spent[0] <= keep
        layers = [x for x in plan if not x.reason.startswith("too small")]
        assert sum(x.params_after for x in layers) <= keep * sum(x.size for x in layers)
        for block in plan.narrower:
            assert all(plan[fqn].narrowed and plan[fqn].reason.startswith("narrowed with") for fqn in block.layers)
    model = shrank.auto_fact(dense, 0.4, calibrate=data(), narrow=True, deepcopy=True)
    assert model.shrank_plan.narrower and error(model, dense) < error(dense, model) * 1.0001


def dead(model: nn.Sequential, units: int = 8) -> nn.Sequential:
    """With hidden units that do nothing."""
    with torch.no_grad():
        for block in (model[2], model[3]):
            for name in ("up", "both"):  # in the second, of the gate
                if (producer := getattr(block, name, None)) is not None:
                    producer.weight[:units] = 0
                    producer.bias[:units] = 0
    return model


@pytest.mark.parametrize("make", [Block, lambda: Block(gated=True), Stacked], ids=["plain", "gated", "stacked"])
def test_ranks_in_narrowed_blocks_are_those_of_the_narrowed_model(make) -> None:
    """Which is calibrated again: where the units that go do nothing, the layers see and do the same."""
    dense = dead(blocks(make))
    calibration = seen(dense)
    width, narrow = UNITS - 8, plan_of(dense, calibration, UNITS - 8)
    ranks = {fqn: 9 for block in narrow.narrower for fqn in block.layers}
    both = narrow
    for fqn, rank in ranks.items():
        both = both.with_rank(fqn, rank)
    at_once = shrank.apply(copy.deepcopy(dense), both, calibration)
    assert isinstance(at_once[2].down, LED) and at_once[2].down.in_features == width
    small = shrank.apply(copy.deepcopy(dense), narrow, calibration)
    again = shrank.calibrate(small, data())
    one_by_one = shrank.auto_fact(small, ranks, calibrate=again, min_features=8)
    with torch.no_grad():
        for x in data():
            assert_close(at_once(x), one_by_one(x))
    told = shrank.describe(at_once)
    assert [told[fqn].rank for fqn in ranks] == [9] * len(ranks) and len(told.narrower) == 2
    anchored = shrank.apply_anchored(copy.deepcopy(dense), both, shrank.batches(data()), calibration, 0.25)
    assert [x.rank for x in shrank.describe(anchored)] == [x.rank for x in told]
    assert error(anchored, dense) < 1.05 * error(at_once, dense)


def test_a_budget_takes_ranks_beside_widths_where_they_save_more() -> None:
    """Here half of the units do next to nothing, and the others have inputs of a low rank."""
    dense = blocks()
    with torch.no_grad():
        for block in (dense[2], dense[3]):
            block.up.weight[: UNITS // 2] *= 1e-3
            block.up.weight[UNITS // 2 :] = draw(UNITS // 2, 4) @ draw(4, WIDTH) + 0.02 * draw(UNITS // 2, WIDTH)
    calibration = seen(dense)
    options = {"calibration": calibration, "pivot": False, "round_to": 1, "min_features": 8}
    plan = shrank.make_plan(dense, Budget(keep_params=0.35), narrow=True, **options)
    assert any(plan[fqn].rank is not None for block in plan.narrower for fqn in block.layers)
    assert plan.spent[0] <= 0.35
    small = shrank.apply(copy.deepcopy(dense), plan, calibration)
    kept = [small.get_submodule(x.fqn) for x in plan]
    assert sum(p.numel() for m in kept for p in m.parameters() if p.dim() == 2) == plan.params_after - plan.other_params
    ranks = shrank.make_plan(dense, Budget(keep_params=0.35), **options)
    only_ranks = shrank.apply(copy.deepcopy(dense), ranks, calibration)
    assert plan.spent[1] < ranks.spent[1] and error(small, dense) < error(only_ranks, dense)


def test_bytes_buy_widths_and_bits() -> None:
    """Together."""
    dense = blocks()
    with torch.no_grad():
        for block in (dense[2], dense[3]):
            block.up.weight[: UNITS // 2] *= 1e-3
    calibration = seen(dense, inputs=True)
    budget = Budget(keep_bytes=0.1, group_sizes=(8,))
    options = {"calibration": calibration, "min_features": 8, "round_to": 8}
    plan = shrank.make_plan(dense, budget, narrow=True, **options)
    on_grids = [plan[fqn] for block in plan.narrower for fqn in block.layers if plan[fqn].storage.grid]
    assert on_grids and plan.spent[0] <= 0.1
    small = shrank.apply(copy.deepcopy(dense), plan, calibration)
    for layer in on_grids:
        assert shrank.describe(small)[layer.fqn].storage == layer.storage
    without = shrank.make_plan(dense, budget, **options)
    assert plan.spent[1] < without.spent[1]
    assert error(small, dense) < error(shrank.apply(copy.deepcopy(dense), without, calibration), dense)


def test_uniform_widths_are_one() -> None:
    model = blocks()
    plan = shrank.make_plan(model, 0.3, calibration=seen(model), narrow="uniform", pivot=False)
    assert len({block.width for block in plan.narrowed}) == 1 and len(plan.narrower) == 2


def test_flops_and_errors_can_be_the_goal() -> None:
    model = blocks(lambda: Block(gated=True))
    calibration = seen(model)
    plan = shrank.make_plan(model, Budget(keep_flops=0.3), calibration=calibration, narrow=True, pivot=False)
    assert plan.narrower and plan.spent[0] <= 0.3
    plan = shrank.make_plan(model, Budget(max_error=0.8), calibration=calibration, narrow=True, pivot=False)
    assert plan.narrower and all(block.error <= 0.8 for block in plan.narrower)


def test_the_error_is_that_of_the_outputs() -> None:
    dense = blocks()
    calibration = seen(dense)
    model = shrank.apply(copy.deepcopy(dense), plan_of(dense, calibration), calibration)
    held: list[Tensor] = []
    dense[2].down.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    for x in data():
        dense(x)
    h = torch.cat(held)
    y = h @ dense[2].down.weight.T
    kept = (model[2].up.weight[:, None] == dense[2].up.weight).all(-1).nonzero()[:, 1]
    with torch.no_grad():
        lost = y - (h[:, kept] @ model[2].down.weight.T + model[2].down.bias - dense[2].down.bias)
        measured = float(lost.norm() / (y - y.mean(0)).norm())
    # Shrinkage makes it larger than that of these very tokens.
    assert 0.8 * model.shrank_plan.narrowed[0].error < measured < 1.05 * model.shrank_plan.narrowed[0].error


def test_a_narrowed_model_tells_what_it_was() -> None:
    """And its low-rank layers, where these came later; after a copy too."""
    model = blocks()
    calibration = seen(model)
    small = shrank.apply(model, plan_of(model, calibration), calibration)
    small = shrank.auto_fact(small, {"2.down": 6})
    assert type(small[2].down) is LED
    for each in (small, copy.deepcopy(small)):
        plan = shrank.describe(each)
        assert [(b.name, b.units, b.width) for b in plan.narrowed] == [("2", UNITS, 24), ("3", UNITS, 24)]
        assert plan["2.down"].rank == 6 and plan["2.down"].narrowed and plan["2.up"].size == UNITS * WIDTH
        assert plan.params_after == sum(p.numel() for p in each.parameters())
        assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_merging_says_that_units_are_gone() -> None:
    model = blocks()
    calibration = seen(model)
    shrank.apply(model, plan_of(model, calibration), calibration)
    with pytest.warns(UserWarning, match="2 blocks, such as 2, were narrowed and stay so"):
        shrank.merge(model)
    assert model[2].up.out_features == 24 and shrank.describe(model).narrower


def test_anchored() -> None:
    dense = blocks()
    small = {
        anchored: shrank.auto_fact(dense, 0.4, calibrate=data(), narrow=True, anchored=anchored, deepcopy=True)
        for anchored in (False, 0.5)
    }
    assert small[0.5].shrank_plan.narrower
    assert error(small[0.5], dense) < 1.05 * error(small[False], dense)


def test_what_narrowing_needs() -> None:
    model = blocks()
    with pytest.raises(ValueError, match="give calibrate=data"):
        shrank.make_plan(model, Budget(keep_params=0.5), narrow=True)
    with pytest.raises(ValueError, match="a loss"):
        shrank.make_plan(model, 0.5, calibration=seen(model, loss="none"), narrow=True)
    with pytest.raises(ValueError, match=r"calibrate\(..., narrow=True\)"):
        shrank.make_plan(model, 0.5, calibration=shrank.calibrate(model, data()), narrow=True)
    with pytest.raises(ValueError, match="only a budget"):
        shrank.make_plan(model, 8, calibration=seen(model), narrow=True)
    plan = plan_of(model, seen(model))
    with pytest.raises(ValueError, match="to be narrowed, which takes the data"):
        shrank.apply(model, plan)
    with pytest.raises(TypeError, match="stream: blocks are narrowed only in memory"):
        shrank.auto_fact(shrank.Checkpoint("nowhere"), 0.5, calibrate=data(), narrow=True, stream="elsewhere")


def test_layers_that_may_not_change_keep_their_block() -> None:
    model = blocks()
    calibration = seen(model)
    plan = shrank.make_plan(
        model, Budget(keep_params=0.5, overrides={"3.up": 4}), calibration=calibration, narrow=True, exclude="2.up"
    )
    assert not plan.narrower
    assert [block.reason for block in plan.narrowed] == ["2.up: excluded", "3.up: break-even rank 15"]
    with pytest.raises(ValueError, match=r"'2' cannot be narrowed: 2\.up: excluded"):
        plan.with_width("2", 8)
    tied = Budget(keep_params=0.5, same_rank=["*.up"])
    plan = shrank.make_plan(model, tied, calibration=calibration, narrow=True)
    assert {block.reason for block in plan.narrowed} == {f"{i}.up: same_rank ties it to others" for i in (2, 3)}


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = blocks()
    calibration = seen(model)
    plan = plan_of(model, calibration)
    others = [stack(lambda: Block(gated=True), Block), stack(Block), blocks().double()]
    small = shrank.apply(blocks(), plan, calibration)
    for other, complaint in ((others[1], "the model has no layer 3"), (small, "the plan is of 40 units")):
        before = fingerprint(other)
        with pytest.raises(ValueError, match=complaint):
            shrank.apply(other, plan, calibration)
        assert_untouched(other, before)
    assert not block_jobs(Survey(others[0]), plan)[1]  # of other layers the plan says nothing
    ranked = plan.with_width("2", None).with_rank("2.up", 4)
    assert not ranked["2.up"].narrowed and ranked["2.up"].shape.out_features == UNITS


def test_moments_that_say_nothing_leave_a_block(monkeypatch) -> None:
    model = blocks()
    calibration = seen(model)
    plan = plan_of(model, calibration)
    bare = shrank.calibrate(model, data())
    with pytest.warns(UserWarning, match="2 keeps its units: the calibration did not observe them"):
        shrank.apply(model, plan, bare)
    assert model[2].up.out_features == UNITS and not model.shrank_plan.narrower
    assert model.shrank_plan["2.up"].shape.out_features == UNITS


def test_gpt2_of_transformers() -> None:
    """Whose layers store their weights transposed."""
    model = hf_model("gpt2")
    calibration = shrank.calibrate(model, [hf_inputs(model)], narrow=True)
    plan = shrank.make_plan(model, 0.6, calibration=calibration, narrow=True).with_width("transformer.h.0.mlp", 80)
    small = shrank.apply(copy.deepcopy(model), plan, calibration)
    layer = small.transformer.h[0].mlp.c_proj
    assert small.shrank_plan.narrower and (layer.nx, layer.nf) == (layer.weight.shape[0], 32)
    with torch.no_grad():
        found: Tensor = small(**hf_inputs(small))[0]
    assert found.isfinite().all() and (found - model(**hf_inputs(model))[0]).norm() < 0.5 * found.norm()


def test_healing_trains_narrowed_layers() -> None:
    model = blocks()
    calibration = seen(model)
    small = shrank.apply(copy.deepcopy(model), plan_of(model, calibration, 12), calibration)
    before = error(small, model)
    shrank.heal(small, model, data(), steps=20)
    assert error(small, model) < before


def of_width(model: nn.Module, batches: list, width: int, name: str, **options: object) -> nn.Module:
    """A copy with so many units in one block, and all else as it is."""
    calibration = shrank.calibrate(model, batches, narrow=True)
    plan = shrank.make_plan(model, Budget(max_error=1e-9), calibration=calibration, narrow=True, min_features=4)
    for layer in plan.low_rank:
        plan = plan.with_rank(layer.fqn, None)
    for block in plan.narrower:
        plan = plan.with_width(block.consumer, None)
    return shrank.apply(copy.deepcopy(model), plan.with_width(name, width), calibration)


@pytest.fixture
def no_doubt(monkeypatch) -> None:
    """Take what was seen for all there is: units that depend on each other exactly are then found to."""
    monkeypatch.setattr(moments, "_shrinkage", lambda features, tokens: 1e-7)


IMAGES = {
    "plain": (lambda: image_model(plain), "2"),
    "batch norm": (lambda: image_model(normed), "2"),
    "depthwise": (lambda: image_model(inverted), "2"),
    "gated": (lambda: image_model(Gated), "2"),
    "flattened": (to_linear, "head"),
    "by position": (lambda: to_linear(by_position=True), "head"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_channels_that_others_give_are_not_missed(name: str, no_doubt: None) -> None:
    """Those that are as others, and dead ones."""
    make, block = IMAGES[name]
    model = make()
    own = [model[2].first, *model[2].between] if block == "2" else [model.stem, model.norm]
    copy_unit(own, CHANNELS, source=3, destination=8)
    copy_unit(own, CHANNELS, source=0, destination=15, dead=True)
    small = of_width(model, images(30), CHANNELS - 2, block)
    with torch.no_grad():
        assert_close(small(images()[0]), model(images()[0]))
        assert not torch.equal(small(images()[0]), model(images()[0]))
    assert small.shrank_plan.narrower[0].error < 3e-3


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_that_others_give_are_not_missed(name: str, no_doubt: None) -> None:
    """One that is as another one, and one that says nothing."""
    model = attention_model(name)
    layer = model.bert.encoder.layer[0].attention if name == "bert" else model.model.layers[0].self_attn
    own = (
        [layer.self.query, layer.self.key, layer.self.value]
        if name == "bert"
        else [layer.q_proj, layer.k_proj, layer.v_proj]
    )
    with torch.no_grad():
        for linear in own:
            for value in linear.parameters():
                heads = value.unflatten(0, (4, -1))
                heads[3] = heads[1]
                if linear is own[2]:
                    heads[2] = 0
    block = "bert.encoder.layer.0.attention" if name == "bert" else "model.layers.0.self_attn"
    small = of_width(model, texts(), 2, block)
    with torch.no_grad():
        assert_close(small(**texts()[0])[0], model(**texts()[0])[0])
    assert [len(x.weight) for x in small.get_submodule(block).modules() if isinstance(x, nn.Linear)][:2] == (
        [16, 16] if name == "bert" else [32, 16]
    )


def test_what_carries_channels_keeps_its_numbers_of_those_that_stay() -> None:
    model = image_model(inverted)
    small = of_width(model, images(), 14, "2")
    first, norm, _, depthwise, statistics, slopes = small[2].first, *small[2].between
    kept = (first.weight[:, None] == model[2].first.weight).flatten(2).all(-1).nonzero()[:, 1]
    assert len(kept) == 14 == norm.num_features == statistics.num_features == slopes.num_parameters
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 14
    assert (small[2].second.in_channels, small[2].second.out_channels) == (14, FILTERS)
    for module, dense in ((norm, model[2].between[0]), (depthwise, model[2].between[2]), (slopes, model[2].between[4])):
        for name, value in dense.state_dict().items():
            assert torch.equal(module.state_dict()[name], value[kept] if value.dim() else value)
    assert statistics.running_var.shape == (14,) and statistics.weight is None
    small.train()(images()[0]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_memory_formats_stay() -> None:
    model = image_model(normed, inverted).to(memory_format=torch.channels_last)
    small = of_width(model, images(), 10, "2")
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in small.parameters() if p.dim() == 4)


@pytest.mark.parametrize("name", IMAGES)
def test_channels_with_a_fit_are_better_than_without(name: str) -> None:
    make, block = IMAGES[name]
    model = make()
    small = of_width(model, images(), 12, block)
    bare = copy.deepcopy(small)
    consumer, dense = (m[2].second if block == "2" else m.head for m in (bare, model))
    first, before = (m[2].first if block == "2" else m.stem for m in (bare, model))
    rows = before.weight if name != "gated" else before.weight[:CHANNELS]
    kept = (first.weight[:12, None] == rows).flatten(2).all(-1).nonzero()[:, 1]
    columns = (
        torch.arange(dense.weight.shape[1]).view(-1, CHANNELS).T
        if name == "by position"
        else torch.arange(dense.weight.shape[1]).view(CHANNELS, -1)
    )
    with torch.no_grad():
        consumer.weight.copy_(dense.weight[:, columns[kept].flatten().sort().values])
        consumer.bias is None or consumer.bias.copy_(dense.bias)
        errors = [sum((m(x) - model(x)).square().sum() for x in images()) for m in (small, bare)]
    assert errors[0] < errors[1]


def test_a_budget_chooses_channels_or_ranks() -> None:
    """And loses no more than with ranks alone; what carries channels follows, and is not paid for."""
    model = image_model(inverted, normed)
    for block in (model[2], model[3]):
        for unit in range(10):
            copy_unit([block.first, *block.between], CHANNELS, source=unit, destination=10 + unit)
    calibration = shrank.calibrate(model, images(), narrow=True)
    options = {"calibration": calibration, "min_features": 4, "allow_slower": True}
    for keep in (0.5, 0.7):
        plan = shrank.make_plan(model, keep, narrow=True, **options)
        ranks = shrank.make_plan(model, keep, **options)
        assert plan.spent[1] <= ranks.spent[1] and plan.spent[0] <= keep
    assert {block.name for block in plan.narrower} == {"2", "3"}
    depthwise = plan["2.between.2"]
    assert depthwise.narrowed and depthwise.shape.groups == plan.narrower[0].width and depthwise.rank is None
    small = shrank.apply(copy.deepcopy(model), plan, calibration)
    for layer in (layer for layer in plan if layer.narrowed):
        weights = [p for name, p in small.get_submodule(layer.fqn).named_parameters() if name.endswith("weight")]
        assert sum(p.numel() for p in weights) == layer.params_after
    with torch.no_grad():
        assert (small(images()[0]) - model(images()[0])).norm() < 0.1 * model(images()[0]).norm()
    largest = shrank.make_plan(model, Budget(max_error=0.5), narrow=True, **options)
    assert largest.narrower and all(block.error <= 0.5 for block in largest.narrower)


def test_a_budget_chooses_heads_or_ranks() -> None:
    """Where half of them say what the others do, and attention is no mean over all tokens."""
    model = attention_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                scale = 1 if linear is layer.self_attn.v_proj else 12
                linear.weight.copy_(scale * linear.weight.unflatten(0, (4, -1))[[0, 1, 0, 1]].flatten(0, 1))
    calibration = shrank.calibrate(model, texts(20), narrow=True)
    options = {"calibration": calibration, "include": "*self_attn*", "min_features": 4}
    plan = shrank.make_plan(model, 0.5, narrow=True, **options)
    assert [block.width for block in plan.narrower] == [2, 2]
    assert [plan[fqn].shape.out_features for fqn in plan.narrower[0].producers] == [32, 16, 16]
    rounded = shrank.make_plan(model, 0.5, narrow=True, round_to=16, **options)  # of 16, 8 and 8 rows for each
    assert {block.width for block in rounded.narrowed} <= {None, 2}
    uniform = shrank.make_plan(model, 0.5, narrow="uniform", **options)
    assert not uniform.narrower and "configs have no number" in uniform.narrowed[0].reason


def test_layers_between_channels_may_be_left_out() -> None:
    model = image_model(inverted)
    calibration = shrank.calibrate(model, images(), narrow=True)
    plan = shrank.make_plan(model, 0.5, calibration=calibration, narrow=True, min_features=4, exclude="2.between.2")
    assert [block.reason for block in plan.narrowed] == ["2.between.2: excluded"]


def test_narrowed_channels_and_heads_tell_what_they_were() -> None:
    """And low-rank layers on top of them; merging leaves the channels as they are."""
    for model, batches, width, name in (
        (image_model(inverted), images(), 12, "2"),
        (to_linear(by_position=True), images(), 12, "head"),
        (attention_model("llama"), texts(), 3, "model.layers.0.self_attn"),
    ):
        small = of_width(model, batches, width, name)
        planned = small.shrank_plan.narrower[0]
        for each in (small, copy.deepcopy(small)):
            plan = shrank.describe(each)
            (block,) = plan.narrowed
            assert (block.modules, block.rows, block.columns, block.strided, block.units, block.width) == (
                (planned.modules, planned.rows, planned.columns, planned.strided, planned.units, planned.width)
            )
            assert plan.params_after == sum(p.numel() for p in each.parameters())
            assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
            assert {x.fqn: x.size for x in plan} == {x.fqn: small.shrank_plan[x.fqn].size for x in plan}
        low_rank = shrank.auto_fact(small, {planned.consumer: 3}, min_features=4, allow_slower=True)
        assert shrank.describe(low_rank)[planned.consumer].rank == 3
        with pytest.warns(UserWarning, match="were narrowed and stay so"):
            shrank.merge(low_rank)
        assert [block.width for block in shrank.describe(low_rank).narrower] == [width]


@pytest.mark.parametrize(
    ("make", "batches"),
    [(lambda: image_model(normed, inverted), images), (lambda: attention_model("qwen3"), texts)],
    ids=["channels", "heads"],
)
@pytest.mark.filterwarnings("ignore:.*layers saw fewer than")
def test_anchored_channels_and_heads(make, batches) -> None:
    model = make()
    calibration = shrank.calibrate(model, batches(), narrow=True)
    plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True, min_features=4)
    for block in plan.narrowed:
        plan = plan.with_width(block.consumer, block.units // 2)
    errors = []
    for anchored in (False, True):
        small = copy.deepcopy(model)
        if anchored:
            shrank.apply_anchored(small, plan, shrank.batches(batches()), calibration, 0.5)
        else:
            shrank.apply(small, plan, calibration)
        assert [block.width for block in small.shrank_plan.narrower] == [block.width for block in plan.narrower]
        with torch.no_grad():
            outputs = [(shrank.batches([x])[0].call(m)) for x in batches() for m in (small, model)]
            outputs = [x if isinstance(x, Tensor) else x[0] for x in outputs]
        errors.append(sum((a - b).square().sum() for a, b in zip(outputs[::2], outputs[1::2], strict=True)))
    assert errors[1] < 1.2 * errors[0]


def test_channels_of_other_carriers_are_refused() -> None:
    model = image_model(normed)
    calibration = shrank.calibrate(model, images(), narrow=True)
    plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True, min_features=4).with_width("2", 12)
    wider, without, in_groups = image_model(normed), image_model(plain), image_model(normed)
    wider[2].between[0] = nn.BatchNorm2d(CHANNELS + 1)
    in_groups[2].second = nn.Conv2d(CHANNELS, FILTERS, 3, padding=1, groups=2)
    for other, complaint in (
        (wider, "2.between.0 has numbers for 21 units here, and the plan for 20"),
        (without, "2.between.0 has numbers for no units here"),
        (in_groups, "2.second cannot change: it is in groups"),
    ):
        before = fingerprint(other)
        with pytest.raises(ValueError, match=complaint):
            shrank.apply(other, plan, calibration)
        assert_untouched(other, before)
