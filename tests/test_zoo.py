"""Every transformers family that builds offline: compressed, exact at full rank, saved and loaded again.

Once with one rank for all layers, once with ranks that a budget draws from data, which are unequal, once with blocks of
fewer units besides, and once with factors of 8 bits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import shrank
from shrank.layers.quantized import packed_state
from tests.common.ops import pretend_native
from tests.common.tolerances import assert_close
from tests.common.zoo import build, families, outputs
from tests.common.zoo_tables import (
    DENSE_DOES_NOT_LOAD,
    FAST,
    FAST_CALIBRATED,
    FAST_NARROWED,
    FAST_OF_FEW_BITS,
    NO_GRADIENTS,
    NOTHING_FOR_A_BUDGET,
    NOTHING_TO_REPLACE,
    ROUNDING_DECIDES,
    SHAPE_DEPENDS_ON_WEIGHTS,
    UNBUILDABLE,
)


def every(fast: tuple[str, ...]) -> list:
    """The families that build; all but the fast ones are run by `make zoo` alone."""
    return [pytest.param(f, marks=() if f in fast else pytest.mark.slow) for f in families() if f not in UNBUILDABLE]


@pytest.mark.filterwarnings("ignore:the dense weight of a", "ignore:no layer was replaced")
@pytest.mark.parametrize("family", every(FAST))
def test_family(family: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = build(family)
    expected = outputs(dense, inputs)

    small = shrank.auto_fact(dense, 8, min_features=8, deepcopy=True)
    plan = small.shrank_plan
    assert plan.params_after <= plan.params_before
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    assert bool(plan.low_rank) == (family not in NOTHING_TO_REPLACE), str(plan)
    actual = outputs(small, inputs)
    assert all(t.isfinite().all() for t in actual)
    if family not in SHAPE_DEPENDS_ON_WEIGHTS:
        assert [t.shape for t in actual] == [t.shape for t in expected]
    _check_fused(small, inputs, actual, monkeypatch)
    if family not in (*DENSE_DOES_NOT_LOAD, *FAST_CALIBRATED):  # those of the latter are loaded with unequal ranks
        _check_round_trip(small, inputs, actual, tmp_path)
    _check_full_rank(family, dense, inputs, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few tokens, of layers that they do not reach
@pytest.mark.parametrize("family", every(FAST_CALIBRATED))
def test_family_by_data(family: str, tmp_path) -> None:
    model, inputs = build(family)
    plan = shrank.auto_fact(
        model,
        shrank.Budget(keep_params=0.6),
        min_features=8,
        calibrate=shrank.Calibrate([inputs], loss="none" if family in NO_GRADIENTS else "output"),
    ).shrank_plan
    assert plan.params_after == sum(p.numel() for p in model.parameters())
    assert (plan.params_after < plan.params_before) == bool(plan.low_rank) == (family not in NOTHING_FOR_A_BUDGET)
    assert len({layer.rank for layer in plan.low_rank}) > 1 or len(plan.low_rank) < 3, "the ranks are unequal"
    actual = outputs(model, inputs)
    assert all(t.isfinite().all() for t in actual)
    if family not in DENSE_DOES_NOT_LOAD:
        _check_round_trip(model, inputs, actual, tmp_path)


@pytest.mark.filterwarnings("ignore:the dense weight of a", "ignore:no layer was replaced")
@pytest.mark.parametrize("family", every(FAST_OF_FEW_BITS))
def test_family_of_few_bits(family: str, tmp_path) -> None:
    model, inputs = build(family)
    small = shrank.auto_fact(model, 8, bits=8, min_features=8)
    plan = small.shrank_plan
    linears = [layer for layer in plan.low_rank if layer.kind in ("Linear", "Conv1D")]
    assert all(layer.storage == shrank.Storage(shrank.Grid(8)) for layer in linears), str(plan)
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    assert shrank.describe(small).changed == tuple(replace(x, error=None, reason="") for x in plan.changed)
    actual = outputs(small, inputs)
    assert all(t.isfinite().all() for t in actual)
    if family not in DENSE_DOES_NOT_LOAD:
        _check_round_trip(small, inputs, actual, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few tokens, of layers that they do not reach
@pytest.mark.parametrize("family", every(tuple(FAST_NARROWED)))
def test_family_narrowed(family: str, tmp_path) -> None:
    """Every block that is found loses half of its units, and other layers get ranks."""
    model, inputs = build(family)
    calibration = shrank.calibrate(model, [inputs], loss="none" if family in NO_GRADIENTS else "output", narrow=True)
    if calibration.unit_blocks and family in NO_GRADIENTS:
        return  # what units are worth is known only of data and a loss
    plan = shrank.make_plan(model, 0.6, calibration=calibration, narrow=True, min_features=8)
    able = [block for block in plan.narrowed if block.able]
    assert len(able) == FAST_NARROWED.get(family, len(able)), [block.reason for block in plan.narrowed]
    for block in able:
        plan = plan.with_width(block.consumer, max(1, block.units // 2))
    small = shrank.apply(model, plan, calibration)
    assert len(small.shrank_plan.narrower) == len(able)
    actual = outputs(small, inputs)
    assert all(t.isfinite().all() for t in actual)
    if family not in DENSE_DOES_NOT_LOAD:
        _check_round_trip(small, inputs, actual, tmp_path)


def _check_fused(model: nn.Module, inputs: dict, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that run with fewer calls compute the same, by PyTorch and by the ops; the model stays fused, for all that
    comes after."""
    done = shrank.fuse(model)
    assert not done.blocks.keys() & done.left.keys()
    with monkeypatch.context() as patch:
        found = [outputs(model, inputs)]
        pretend_native(patch)
        with shrank.backend("native"):
            found += [outputs(model, inputs) for _ in range(2)]  # what was shared in the first, is so in the second
    for each in found:
        for one, other in zip(each, expected, strict=True):
            assert_close(one, other)


def _check_full_rank(family: str, dense: nn.Module, inputs: dict, expected: list) -> None:
    rounding_decides = family in ROUNDING_DECIDES
    exact = shrank.auto_fact(dense, 10**9, allow_growth=True, deepcopy=rounding_decides)
    if rounding_decides:
        for layer in exact.shrank_plan.low_rank:
            weight = dense.get_submodule(layer.fqn).weight
            assert_close(exact.get_submodule(layer.fqn).dense_weight(), weight)
        return
    for one, other in zip(outputs(exact, inputs), expected, strict=True):
        assert_close(one, other)


def _check_round_trip(model: nn.Module, inputs: dict, expected: list, folder) -> None:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert shrank.describe(loaded).low_rank == shrank.describe(model).low_rank
    here, there = packed_state(model.state_dict()), packed_state(loaded.state_dict())
    for (name, one), other in zip(there.items(), here.values(), strict=True):
        assert torch.equal(one, other), name
    # Not bit for bit: where a tensor lies in memory decides which vectorised path a kernel takes.
    for one, other in zip(outputs(loaded, inputs), expected, strict=True):
        assert_close(one, other)
