"""Errors of layers, scaled by what compressing one alone really does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import shrank
from shrank import Budget, Calibrate, Checkpoint, auto_fact, calibrate
from shrank.compression.probe import probed
from shrank.linalg import factorize_weighted
from shrank.model.survey import Survey
from tests.common.models import WIDTH, assert_untouched, draw, fingerprint, hf_model, mlp, seeded, tokens
from tests.common.tolerances import assert_close


def saturating() -> nn.Module:
    """A layer whose outputs are large before they are squashed, so that gradients say little of its errors."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8)
        )
    )


def test_a_scale_is_what_was_measured_over_what_was_expected() -> None:
    model, data = saturating(), list(draw(400, WIDTH).split(100))
    how = Calibrate(data, probe=True)
    found = calibrate(model, data)
    before = fingerprint(model)
    scales = probed(Survey(model), found, how)
    assert_untouched(model, before)
    assert scales.keys() == {"0", "2"} and math.isclose(math.prod(scales.values()), 1, rel_tol=1e-9)
    ratios = {}
    for name in scales:
        site = next(s for s in Survey(model).sites() if s.fqn == name)
        rank, matrices = int(0.6 * site.shape.break_even_rank), site.adapter.matrices(site.shape)
        factors = factorize_weighted(matrices, found.metric(name, matrices, True), rank)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(name).weight.copy_(factors.up[0] @ factors.down[0])
            other.get_submodule(name).bias.add_(factors.shift[0])
            error = sum((other(x) - model(x)).square().sum() for x in data[::2])
        ratios[name] = error.item() / factors.tail_error**2
    assert_close(torch.tensor(scales["0"] / scales["2"]), torch.tensor(ratios["0"] / ratios["2"]))


def test_scales_decide_ranks_and_leave_factors_alone() -> None:
    model, data = mlp(3), list(draw(400, WIDTH).split(100))
    found = calibrate(model, data)
    plan = shrank.make_plan(model, Budget(keep_params=0.6), calibration=found)
    plain = shrank.apply(copy.deepcopy(model), plan, found)
    found.scales = {"0": 1e4, "2": 1e-4}
    scaled = shrank.apply(copy.deepcopy(model), plan, found)
    for one, other in zip(plain.shrank_plan.low_rank, scaled.shrank_plan.low_rank, strict=True):
        assert math.isclose(one.error, other.error, rel_tol=1e-6)
    ranks = {x.fqn: x.rank or WIDTH for x in shrank.make_plan(model, Budget(keep_params=0.6), calibration=found)}
    assert ranks["0"] > ranks["2"]


def test_language_models_are_probed_by_the_divergence_of_their_logits() -> None:
    model, data = hf_model("llama"), [{"input_ids": tokens(4, 9)}] * 3
    small = auto_fact(model, 0.6, calibrate=Calibrate(data, loss="lm", probe=True))
    assert small.shrank_plan.low_rank


def test_what_cannot_be_probed_is_refused(tmp_path) -> None:
    model, data = mlp(2), [draw(100, WIDTH)]
    with pytest.raises(ValueError, match="probe: measures what 'output', 'kl', 'lm' are about, and loss='none'"):
        auto_fact(model, 0.6, calibrate=Calibrate(data, loss="none", probe=True))
    hf_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(TypeError, match="stream: probe="):
        how = Calibrate([tokens(1, 9)], probe=True)
        auto_fact(Checkpoint(tmp_path / "dense"), 0.6, calibrate=how, stream=tmp_path / "out")
