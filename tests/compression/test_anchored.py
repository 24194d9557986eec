"""Anchored calibration: every block is fitted to the dense outputs at what the compressed blocks before it give."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import Budget, Calibrate, RankPlan, auto_fact, calibrate, make_plan
from shrank.calibration.batches import as_batches
from shrank.calibration.sharing import observe_calls
from shrank.calibration.streams import Masking
from shrank.compression.anchored import _stages, apply_anchored, carry_out_anchored
from shrank.model.blocks import blocks_of
from shrank.model.survey import Survey
from tests.common.models import (
    HF_MODELS,
    WIDTH,
    SharedLayer,
    assert_untouched,
    draw,
    fingerprint,
    hf_inputs,
    hf_model,
    hf_outputs,
    mlp,
    seeded,
)
from tests.common.tolerances import assert_close

ROWS = 1000


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.GELU(),
        nn.Conv2d(32, 16, 1, bias=False),
    )


def deep() -> nn.Module:
    layers = [module for _ in range(6) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH, bias=False))


@pytest.mark.parametrize(
    "build, x", [(deep, draw(ROWS, WIDTH)), (convolutions, draw(64, 16, 8, 8))], ids=["linear", "convolutions"]
)
def test_the_model_comes_nearer_than_with_layers_fitted_alone(build: Callable[[], nn.Module], x: Tensor) -> None:
    model = seeded(build)
    plan = make_plan(model, 0.5, errors=False, allow_slower=True)
    error = lambda m: (m(x) - model(x)).norm().item()  # noqa: E731
    alone = auto_fact(copy.deepcopy(model), plan, calibrate=Calibrate([x], loss="none"))
    anchored = auto_fact(copy.deepcopy(model), plan, calibrate=Calibrate([x], loss="none"), anchored=1.0)
    assert error(anchored) < 0.97 * error(alone)
    assert {x.fqn: x.rank for x in anchored.shrank_plan} == {x.fqn: x.rank for x in plan}


@pytest.mark.filterwarnings("ignore:.*fewer than 10 tokens")
@pytest.mark.parametrize("family", HF_MODELS)
def test_transformers(family: str) -> None:
    model = hf_model(family)
    dense = hf_outputs(model)
    small = auto_fact(model, Budget(keep_params=0.5), calibrate=[hf_inputs(model)], anchored=True)
    assert small.shrank_plan.low_rank and all(x.error is not None for x in small.shrank_plan.low_rank)
    assert hf_outputs(small).isfinite().all() and hf_outputs(small).shape == dense.shape
    assert not any(m._forward_hooks for m in small.modules())


def test_full_rank_is_exact() -> None:
    model, x = mlp(3).train(), draw(ROWS, WIDTH)
    small = auto_fact(copy.deepcopy(model), WIDTH, calibrate=[x], anchored=1.0, allow_growth=True)
    assert small.training and len(small.shrank_plan.low_rank) == 3
    assert_close(small(x), model(x))


def test_layers_are_taken_block_by_block_in_the_order_of_execution() -> None:
    def stages(model: nn.Module, call: object) -> list[list[str]]:
        sites = {s.fqn: s for s in Survey(model).sites() if isinstance(s.module, nn.Linear)}
        masking = Masking(model, {name: site.module for name, site in sites.items()})
        shared = observe_calls(model, list(sites.values()), as_batches([call]), masking).shared
        found = _stages(blocks_of(model), [[sites[name] for name in names] for names in shared])
        return [sorted(site.fqn for sharing in stage for site in sharing) for stage in found]

    bert = hf_model("bert")
    blocks = stages(bert, hf_inputs(bert))
    assert [len(block) for block in blocks] == [6, 6, 1, 1]  # two layers, the pooler, the classifier
    assert all(name.startswith("bert.encoder.layer.1.") for name in blocks[1])
    # A list that holds a whole model in one entry is looked into.
    wrapped = nn.Sequential(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))), nn.Linear(WIDTH, 8))
    assert stages(wrapped, draw(5, WIDTH)) == [["0.0"], ["0.1"], ["0.2"], ["1"]]


def test_runs_end_where_nothing_is_left_to_see() -> None:
    model, calls = mlp(4), []
    plan = make_plan(model, 8, errors=False)
    batches = as_batches([draw(ROWS, WIDTH)] * 3)
    found = calibrate(model, batches)
    model[3].register_forward_hook(lambda *_: calls.append(1))
    apply_anchored(model, plan, batches, found)
    # To see who shares an input; whether it does by itself what it does in the model; then once in both models.
    assert len(calls) == 3 + 1 + 2 * 3


def test_a_layer_used_twice() -> None:
    small = auto_fact(seeded(SharedLayer), Budget(keep_params=0.6), calibrate=[draw(ROWS, WIDTH)], anchored=True)
    assert small.first is small.blocks["again"] and small.shrank_plan["first"].rank


class Routed(nn.Module):
    """Sends a row to the second layer by the sign of a feature that the first one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        chosen = h[:, 0] > 0
        return h.masked_scatter(chosen[:, None], self.second(h[chosen]))


def test_layers_that_see_other_tokens_now_are_fitted_alone_and_named() -> None:
    with pytest.warns(UserWarning, match="not anchored, as the dense model calls them otherwise: second"):
        small = auto_fact(seeded(Routed), 4, calibrate=[draw(ROWS, WIDTH)], anchored=True)
    assert small.shrank_plan["second"].rank == 4


class Repeated(nn.Module):
    """A layer that runs as often as there are rows, the second layer only on batches of more than two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.first(row[None]) for row in x]
        return torch.cat([self.second(torch.tanh(row)) for row in rows] if len(rows) > 2 else rows)


def test_every_call_of_every_batch_is_anchored(monkeypatch) -> None:
    anchored, found = importlib.import_module("shrank.compression.anchored"), {}
    observe = anchored.observed
    monkeypatch.setattr(anchored, "observed", lambda *args: found.update(seen := observe(*args)) or seen)
    model, calls = seeded(Repeated), [draw(2, WIDTH), draw(5, WIDTH) + 1, draw(3, WIDTH) * 2, draw(1, WIDTH)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*fewer than 10 tokens")
        small = auto_fact(copy.deepcopy(model), 4, calibrate=Calibrate(calls, loss="none"), anchored=1.0)
    inputs = {"first": torch.cat(calls), "second": torch.tanh(small.first(torch.cat([calls[i] for i in (1, 2)])))}
    dense = torch.cat([torch.tanh(model.first(calls[i])) for i in (1, 2)]).detach().double()
    for name, seen in inputs.items():
        x, got = seen.detach().double(), found[name]
        assert got.of_inputs and got.tokens == len(x)
        assert_close(got.data[0], x.T @ x / len(x))
    assert_close(found["second"].anchor[0], dense.T @ x / len(x))


class Loops(nn.Module):
    """The second layer runs once for every row that the first sends to it."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.first, self.second, self.sign = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), sign

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cat([h, *(self.second(row[None]) for row in h if self.sign * row[0] > 0)])


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_layers_that_run_more_or_less_often_now_are_named(sign: int, batches: int) -> None:
    model = seeded(lambda: Loops(sign))
    with pytest.warns(UserWarning, match="not anchored, as the dense model calls them otherwise: second"):
        small = auto_fact(copy.deepcopy(model), 1, calibrate=draw(200, WIDTH).chunk(batches), anchored=True)
    assert len(small(draw(200, WIDTH))) != len(model(draw(200, WIDTH)))


def test_padding_is_not_anchored() -> None:
    model = hf_model("bert")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 3:] = 0
    inputs = {"input_ids": hf_inputs(model)["input_ids"], "attention_mask": mask}
    changed = inputs | {"input_ids": torch.where(mask == 0, 5, inputs["input_ids"])}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than 10 tokens")
        one, other = (
            auto_fact(hf_model("bert"), 4, calibrate=Calibrate([x], loss="none"), anchored=True)
            for x in (inputs, changed)
        )
    layer = "bert.encoder.layer.1.output.dense"
    assert_close(
        one.get_submodule(layer).up @ one.get_submodule(layer).down,
        other.get_submodule(layer).up @ other.get_submodule(layer).down,
    )


def test_what_is_not_finite_behind_compressed_layers_stays_dense() -> None:
    model = mlp(2)
    plan = make_plan(model, 8)
    overflowing = lambda module, args: (args[0] * torch.inf,) if shrank.describe(model).low_rank else None  # noqa: E731
    model[1].register_forward_pre_hook(overflowing)
    with pytest.warns(UserWarning, match="1 stays dense: what it sees behind compressed layers holds NaN or infinity"):
        small = auto_fact(model, plan, calibrate=[draw(ROWS, WIDTH)], anchored=True)
    assert small.shrank_plan["0"].rank == 8 and small.shrank_plan["1"].rank is None


def test_few_tokens_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"2 layers saw fewer than 10 tokens .* such as 0 \(30 for 32 inputs\)"):
        auto_fact(mlp(2), 8, calibrate=[draw(30, WIDTH)], anchored=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto_fact(mlp(2), 8, calibrate=[draw(ROWS, WIDTH)], anchored=True)


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    model, x = mlp(2), draw(ROWS, WIDTH)
    before = fingerprint(model)
    with pytest.raises(TypeError, match="anchored: only together with calibrate=data"):
        auto_fact(model, 8, calibrate=calibrate(model, [x]), anchored=True)
    with pytest.raises(ValueError, match=r"anchored must lie in \(0, 1\], got 1.5"):
        auto_fact(model, 8, calibrate=[x], anchored=1.5)
    plan = make_plan(mlp(3), 8)
    with pytest.raises(ValueError, match="'2': the model has no such layer"):
        auto_fact(model, RankPlan(plan.layers), calibrate=[x], anchored=True)
    assert_untouched(model, before)


def test_a_search_for_what_is_good_enough_is_anchored_too(monkeypatch) -> None:
    model, x, shares = mlp(2), draw(ROWS, WIDTH), []

    def noted(survey, plan, batches, calibration, how):
        shares.append(how.share)
        return carry_out_anchored(survey, plan, batches, calibration, how)

    monkeypatch.setattr(importlib.import_module("shrank.compression.auto_fact"), "carry_out_anchored", noted)
    auto_fact(model, Budget(eval_fn=lambda m: 0.0), calibrate=[x], anchored=0.5)
    assert len(shares) > 2 and set(shares) == {0.5}
