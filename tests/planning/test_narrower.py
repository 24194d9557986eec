"""Layers of blocks at widths that they do not have: they are those that narrowing leaves, and see what these see."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from shrank.calibration.metric_source import columns_of, metric_of
from shrank.linalg import columns, eliminate
from shrank.model.survey import Survey
from shrank.planning.narrower import Narrower
from tests.common.feed_forward import UNITS, Block, Stacked
from tests.common.tolerances import assert_close
from tests.common.units import CHANNELS, HEAD, attention_model, copy_unit, image_model, images, normed, texts
from tests.compression.test_narrow import blocks, dead, plan_of, seen

WIDTH = UNITS - 8


@pytest.mark.parametrize("make", [Block, lambda: Block(gated=True), Stacked], ids=["plain", "gated", "stacked"])
def test_they_are_those_of_the_narrowed_model(make) -> None:
    """Here without units that do nothing, so that all that is left sees and does the same."""
    dense = dead(blocks(make))
    calibration = seen(dense, inputs=True)
    small = shrank.apply(copy.deepcopy(dense), plan_of(dense, calibration, WIDTH), calibration)
    again = seen(small, inputs=True)
    sites = {site.fqn: site for site in Survey(dense).sites()}
    really = {site.fqn: site for site in Survey(small).sites()}
    for block in calibration.unit_blocks:
        weight = sites[block.consumer].module.weight.detach()[None]
        units = eliminate(columns(weight, calibration[block.consumer], True)).kept(WIDTH)
        narrower = Narrower(block, sites, calibration, units)
        assert narrower.width == WIDTH
        for fqn in block.layers:
            virtual, real = narrower.site(fqn), really[fqn]
            assert sites[fqn].shape != virtual.shape == real.shape == narrower.adapter(fqn).shape()
            assert_close(virtual.module.weight, real.module.weight)
            for name in ("data", "gradient", "mean", "inputs"):
                found, wanted = (
                    getattr(metric_of(source, site, site.adapter.matrices(site.shape)), name)
                    for source, site in ((narrower.statistics, virtual), (again, real))
                )
                # What units are shrunk towards is of all of them, and fewer are left.
                assert (found is None) == (wanted is None)
                assert found is None or (found - wanted).norm() < 0.05 * wanted.norm()
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), dead(blocks(make)).parameters(), strict=True))


def with_dead_channels() -> nn.Module:
    model = image_model(normed)
    for unit in range(CHANNELS // 2):
        copy_unit([model[2].first, *model[2].between], CHANNELS, 0, unit, dead=True)
    return model


def with_dead_heads() -> nn.Module:
    model = attention_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:HEAD] = 0
    return model


@pytest.mark.parametrize(
    ("make", "batches", "name", "width"),
    [(with_dead_channels, images, "2", CHANNELS // 2), (with_dead_heads, texts, "model.layers.0.self_attn", 3)],
    ids=["channels", "heads"],
)
def test_they_are_those_of_models_with_fewer_channels_and_heads(make, batches, name: str, width: int) -> None:
    dense = make()
    calibration = shrank.calibrate(dense, batches(), narrow=True)
    sites = {site.fqn: site for site in Survey(dense).sites()}
    block = next(block for block in calibration.unit_blocks if block.name == name)
    plan = shrank.make_plan(dense, 0.99, calibration=calibration, narrow=True, min_features=4)
    for layer in plan.changed:
        plan = plan.with_rank(layer.fqn, None)
    small = shrank.apply(copy.deepcopy(dense), plan.with_width(block.consumer, width), calibration)
    again = shrank.calibrate(small, batches(), narrow=True)
    really = {site.fqn: site for site in Survey(small).sites()}
    known = columns_of(calibration, sites[block.consumer])
    order = eliminate(known, units=block.columns_of(torch.arange(block.units), len(known.data)))
    narrower = Narrower(block, sites, calibration, order.kept(width))
    for fqn in block.layers:
        virtual, real = narrower.site(fqn), really[fqn]
        assert sites[fqn].shape != virtual.shape == real.shape == narrower.adapter(fqn).shape()
        assert_close(virtual.module.weight, real.module.weight)
        for field in ("data", "gradient", "mean"):
            found, wanted = (
                getattr(metric_of(source, site, site.adapter.matrices(site.shape)), field)
                for source, site in ((narrower.statistics, virtual), (again, real))
            )
            # What units are shrunk towards is of all of them, and fewer are left.
            assert (found is None) == (wanted is None)
            assert found is None or (found - wanted).norm() < 0.1 * wanted.norm()
