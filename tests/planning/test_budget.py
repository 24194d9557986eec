"""Budgets: what all layers together may cost, spent where a calibration says it matters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import shrank
from shrank import Budget, LatencyTable, auto_fact, calibrate, make_plan
from shrank.linalg import BudgetTooSmall
from shrank.model.survey import Survey
from shrank.planning.forms import Form
from shrank.planning.rounding import loss
from shrank.planning.spectra import Spectra
from tests.common.models import WIDTH, Mixed, SharedLayer, TiedLM, draw, hf_inputs, hf_model, mlp, seeded, tokens


def correlated(rows: int = 200) -> torch.Tensor:
    return draw(rows, 8) @ torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3)) + 0.1 * draw(rows, WIDTH)


def wide(depth: int = 4) -> nn.Module:
    """Layers that matter very differently: the scale of each falls by ten."""
    model = mlp(depth)
    with torch.no_grad():
        for number, layer in enumerate(model):
            layer.weight *= 10.0**-number
    return model


def stored(plan: shrank.RankPlan) -> int:
    return sum(x.params_after + (x.shape.index_size if x.rank else 0) for x in plan if x.shape)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("calibrated", [False, True])
def test_no_more_is_stored_than_the_budget(keep: float, calibrated: bool) -> None:
    model = mlp(5)
    found = calibrate(model, [correlated()]) if calibrated else None
    plan = make_plan(model, Budget(keep_params=keep), calibration=found)
    dense = sum(x.size for x in plan)
    assert keep - 0.05 < stored(plan) / dense <= keep
    assert plan.spent[0] == pytest.approx(stored(plan) / dense)
    small = auto_fact(model, Budget(keep_params=keep), calibrate=found)
    assert {x.fqn: x.rank for x in small.shrank_plan} == {x.fqn: x.rank for x in plan}


def test_without_data_every_layer_keeps_the_same_share() -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((256, 384), (384, 512), (512, 128)))).eval()
    plan = make_plan(model, Budget(keep_params=0.5))
    assert all(abs(x.params_after / x.size - 0.5) < 0.07 for x in plan)  # a step of eight ranks


def test_the_budget_goes_where_the_output_feels_it() -> None:
    model = nn.ModuleDict({"loud": nn.Linear(WIDTH, WIDTH), "quiet": nn.Linear(WIDTH, WIDTH)})
    both = seeded(lambda: Sum(model))
    plan = make_plan(both, Budget(keep_params=0.5), calibration=calibrate(both, [draw(300, WIDTH)]))
    loud, quiet = plan["parts.loud"], plan["parts.quiet"]
    assert loud.params_after > 1.5 * quiet.params_after


class Sum(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.parts["loud"](x) + 0.1 * self.parts["quiet"](x)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_calibrated_outputs_are_nearer_than_plain_ones(keep: float) -> None:
    model, x, other = mlp(4), correlated(400), correlated(600)[400:]
    error = lambda m: (m(other) - model(other)).norm().item()  # noqa: E731
    plain = auto_fact(copy.deepcopy(model), keep)
    calibrated = auto_fact(copy.deepcopy(model), Budget(keep_params=keep), calibrate=[x])
    assert error(calibrated) < 0.5 * error(plain)
    assert stored(calibrated.shrank_plan) <= keep * sum(p.size for p in calibrated.shrank_plan)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama", "vit"])
def test_transformers_by_budget(family: str) -> None:
    model = hf_model(family)
    before = sum(p.numel() for p in model.parameters())
    small = auto_fact(model, Budget(keep_params=0.5), calibrate=[hf_inputs(model)])
    assert sum(p.numel() for p in small.parameters()) < before
    assert small(**hf_inputs(small))[0].isfinite().all()


def test_a_dense_option_and_plain_storage() -> None:
    model = mlp(4)
    found = calibrate(model, [draw(300, WIDTH)])
    plan = make_plan(model, Budget(keep_params=0.85), calibration=found, pivot=False)
    assert not any(x.shape.pivoted for x in plan.low_rank)
    assert 0 < len(plan.low_rank) < 4  # some are left dense, so that others may shrink
    assert "better spent elsewhere" in next(x for x in plan if x.rank is None).reason
    pivoted = make_plan(model, Budget(keep_params=0.85), calibration=found)
    assert pivoted.spent[1] < plan.spent[1]


@pytest.mark.parametrize("training", [False, True])
def test_pivots_are_for_training_and_inference(training: bool) -> None:
    model = mlp(2).train(training)
    assert all(x.shape.pivoted for x in make_plan(model, Budget(keep_params=0.5)))
    assert not any(x.shape.pivoted for x in make_plan(model, Budget(keep_params=0.5), pivot=False))


@pytest.mark.parametrize("pivot", ["auto", True, False])
@pytest.mark.parametrize("training", [False, True])
def test_measured_times_decide_where_pivots_are(training: bool, pivot: object) -> None:
    model, ranks = mlp().train(training), [str(rank) for rank in range(1, WIDTH)]
    quick, slow = ({rank: time * int(rank) for rank in ranks} for time in (0.01, 0.02))
    names = [x.fqn for x in make_plan(model, 8).low_rank]
    table = LatencyTable(
        {
            name: {"dense": 1.0, "plain": quick if i % 2 else slow, "pivoted": slow if i % 2 else quick}
            for i, name in enumerate(names)
        },
        {},
    )
    plan = make_plan(model, Budget(keep_latency=0.5, table=table), pivot=pivot)
    wanted = {"auto": names[::2], True: names, False: []}[pivot]
    assert [x.fqn for x in plan.low_rank if x.shape.pivoted] == [x.fqn for x in plan.low_rank if x.fqn in wanted]
    assert len(plan.low_rank) > 1


def test_no_pivots_on_a_gpu_unless_times_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not any(x.shape.pivoted for x in make_plan(model, Budget(keep_params=0.5)))
    assert all(x.shape.pivoted for x in make_plan(model, Budget(keep_params=0.5), pivot=True))


def test_the_trade_off_falls_and_the_plan_is_near_it() -> None:
    model = wide()
    plan = make_plan(model, Budget(keep_params=0.6), calibration=calibrate(model, [correlated()]))
    kept, errors = zip(*plan.trade_off, strict=True)
    assert list(kept) == sorted(kept) and list(errors) == sorted(errors, reverse=True) and errors[-1] < 1e-9
    nearest = max((p for p in plan.trade_off if p[0] <= 0.6), key=lambda p: p[0])
    assert plan.spent[1] <= nearest[1] + 1e-9
    assert shrank.RankPlan.from_dict(plan.to_dict()) == plan
    assert all(len(x.spectrum) > 2 and x.spectrum[0] == 1 for x in plan.low_rank)


def test_overrides_are_paid_but_not_chosen() -> None:
    model = mlp(4)
    plan = make_plan(model, Budget(keep_params=0.5, overrides={"0": 3, "3": None}), pivot=False)
    assert plan["0"].rank == 3 and plan["3"].rank is None
    assert stored(plan) <= 0.5 * sum(x.size for x in plan)
    assert plan["1"].rank < 8  # what the dense one took is missing here


def test_layers_of_one_group_get_one_rank() -> None:
    model = wide()
    found = calibrate(model, [correlated()])
    ranks = lambda plan: [x.rank for x in plan]  # noqa: E731
    free = make_plan(model, Budget(keep_params=0.5), calibration=found)
    tied = make_plan(model, Budget(keep_params=0.5, same_rank=["[0-3]"]), calibration=found)
    pairs = make_plan(model, Budget(keep_params=0.5, same_rank=[["0", "3"], ["1", "2"]]), calibration=found)
    assert len(set(ranks(free))) > 1 and len(set(ranks(tied))) == 1
    assert pairs["0"].rank == pairs["3"].rank and pairs["1"].rank == pairs["2"].rank
    assert tied.spent[1] >= free.spent[1] - 1e-9
    with pytest.raises(ValueError, match="same_rank: nothing matches no layer"):
        make_plan(model, Budget(keep_params=0.5, same_rank=["nothing"]))


@pytest.mark.parametrize("options", [{"round_to": 4}, {"max_rank": 6}, {"min_rank": 5}], ids=str)
def test_ranks_keep_to_the_options(options: dict) -> None:
    ranks = [x.rank for x in make_plan(mlp(4), Budget(keep_params=0.6), **options).low_rank]
    assert ranks and all(
        r % options.get("round_to", 1) == 0 and r <= options.get("max_rank", r) and r >= options.get("min_rank", r)
        for r in ranks
    )


def test_wide_layers_get_multiples_of_eight() -> None:
    plan = make_plan(nn.Sequential(nn.Linear(200, 160), nn.Linear(160, 40)).eval(), Budget(keep_params=0.5))
    assert plan["0"].rank % 8 == 0 and plan["1"].rank % 8


def test_flops_count_how_often_a_layer_is_used() -> None:
    model, x = seeded(Mixed), draw(4, 16, 8, 8)
    found = calibrate(model, [x])
    plan = make_plan(model, Budget(keep_flops=0.6), calibration=found, allow_slower=True, groups_out=True)
    used = {x.fqn: found.tokens(x.fqn) for x in plan if x.fqn in found}
    flops = sum(plan[n].shape.flops(plan[n].rank) * t for n, t in used.items())
    dense = sum(plan[n].shape.flops(None) * t for n, t in used.items())
    assert 0.4 < flops / dense <= 0.6 and used["stem"] == 4 * 64 and used["grouped"] == 4 * 16
    with pytest.raises(ValueError, match="stem: keep_flops needs a calibration"):
        make_plan(model, Budget(keep_flops=0.6))


def test_the_largest_error_of_any_layer() -> None:
    model = wide()
    found = calibrate(model, [correlated()])
    plan = make_plan(model, Budget(max_error=0.1), calibration=found)
    assert plan.low_rank and all(x.error <= 0.1 for x in plan.low_rank)
    looser = make_plan(model, Budget(max_error=0.3), calibration=found)
    assert looser.params_after < plan.params_after


def test_time_is_read_from_a_table() -> None:
    model = mlp(3)
    times = {str(rank): 0.1 + 0.05 * rank for rank in (4, 8, 16, 31)}
    entry = {"dense": 1.0, "plain": times, "pivoted": times}
    table = LatencyTable({"0": entry, "1": entry, "2": entry}, {})
    plan = make_plan(model, Budget(keep_latency=0.5, table=table))
    seconds = [table.seconds(x.fqn, x.rank, x.shape.pivoted) for x in plan]
    assert 1.2 < sum(seconds) <= 1.5
    with pytest.raises(ValueError, match="no layer '2'"):
        make_plan(model, Budget(keep_latency=0.5, table=LatencyTable({"0": entry, "1": entry}, {})))


def test_the_smallest_model_that_is_good_enough() -> None:
    model, x, tried = mlp(4), draw(200, WIDTH), []
    dense = model(x).detach()

    def score(candidate: nn.Module) -> float:
        tried.append(candidate)
        return -((candidate(x) - dense).norm() / dense.norm()).item()

    small = auto_fact(copy.deepcopy(model), Budget(eval_fn=score, tolerated_drop=0.1), calibrate=[x])
    assert score(small) >= -0.1 and small.shrank_plan.low_rank and len(tried) < 12
    kept = small.shrank_plan.spent[0]
    assert score(auto_fact(copy.deepcopy(model), Budget(keep_params=kept - 0.05), calibrate=[x])) < -0.1
    untouched = copy.deepcopy(model)
    with pytest.raises(ValueError, match="the model is as it was"):
        auto_fact(untouched, Budget(eval_fn=lambda m: float(m is untouched), tolerated_drop=0.0), calibrate=[x])
    assert not shrank.describe(untouched).low_rank


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({}, "exactly one of"),
        ({"keep_params": 0.5, "keep_flops": 0.5}, "exactly one of"),
        ({"keep_params": 1.2}, r"keep_params must lie in \(0, 1\), got 1.2"),
        ({"keep_latency": 0.5}, "go together"),
        ({"max_error": 0.0}, "max_error must lie"),
        ({"keep_bytes": 1.0}, r"keep_bytes must lie in \(0, 1\), got 1.0"),
        ({"keep_bytes": 0.5, "bits": (2,)}, "bits must be 3, 4 or 8, got 2"),
        ({"keep_bytes": 0.5, "group_sizes": (0,)}, "group_sizes must be whole numbers of at least 1, got 0"),
        (
            {"keep_bytes": 0.5, "correction_ranks": (2.5,)},
            "correction_ranks must be whole numbers of",
        ),
    ],
)
def test_bad_budgets_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Budget(**arguments)


def test_too_small_a_budget_says_what_is_possible() -> None:
    with pytest.raises(BudgetTooSmall, match="the least possible is"):
        make_plan(mlp(2), Budget(keep_params=0.01))


def test_layers_of_no_consequence_and_without_data_stay_dense() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.lost, self.unused = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.lost(x)
            return self.used(x)

    with pytest.warns(UserWarning, match="unused"):
        model = seeded(Half)
        found = calibrate(model, [draw(40, WIDTH)])
    plan = make_plan(model, Budget(keep_params=0.5), calibration=found)
    assert plan["used"].rank and plan["lost"].rank is None and "does not depend on it" in plan["lost"].reason
    assert "saw no data" in plan["unused"].reason
    with pytest.warns(UserWarning, match="lost stays dense: the loss does not depend on it"):
        small = auto_fact(model, make_plan(model, 8), calibrate=found)
    assert small.shrank_plan["lost"].rank is None and small.shrank_plan["used"].rank == 8


def test_shared_and_tied_layers() -> None:
    small = auto_fact(seeded(SharedLayer), Budget(keep_params=0.6), calibrate=[draw(30, WIDTH)])
    assert small.first is small.blocks["again"] and isinstance(small.first, shrank.LED)
    tied = auto_fact(seeded(TiedLM), Budget(keep_params=0.6), calibrate=[tokens(4, 9)])
    assert "tied" in tied.shrank_plan["head"].reason and tied.shrank_plan["body"].rank


def test_data_options_need_data() -> None:
    with pytest.raises(TypeError, match="anchored: only together with calibrate"):
        auto_fact(mlp(), 0.5, anchored=True)
    with pytest.raises(TypeError, match=r"no option 'loss'; did you mean calibrate=shrank.Calibrate\(data, loss=\)"):
        auto_fact(mlp(), 0.5, calibrate=[draw(9, WIDTH)], loss="lm")


def test_ranks_and_plans_take_a_calibration_too() -> None:
    model, x = mlp(3), correlated()
    found = calibrate(model, [x])
    error = lambda m: (m(x) - model(x)).norm().item()  # noqa: E731
    assert error(auto_fact(copy.deepcopy(model), 8, calibrate=found)) < error(auto_fact(copy.deepcopy(model), 8))
    plan = make_plan(model, 8, calibration=found)
    again = auto_fact(copy.deepcopy(model), plan, calibrate=found)
    assert all(math.isclose(x.error, y.error, rel_tol=0.5) for x, y in zip(plan, again.shrank_plan, strict=True))


def test_a_budget_can_be_kept_from_leaving_layers_dense() -> None:
    model = mlp(4)
    found = calibrate(model, [draw(300, WIDTH)])
    plan = make_plan(model, Budget(keep_params=0.85), calibration=found, allow_dense=False)
    assert len(plan.low_rank) == 4 and stored(plan) <= 0.85 * sum(x.size for x in plan)
    largest = make_plan(model, Budget(max_error=1e-9), allow_dense=False, pivot=False)
    assert all(x.rank is not None and x.params_after < x.size and x.error > 1e-9 for x in largest)
    assert all(x.rank is None for x in make_plan(model, Budget(max_error=1e-9), pivot=False))


class Uncentred(shrank.LayerStatistics):
    """What a calibration found, with errors of the mean counted."""

    def __init__(self, calibration: shrank.Calibration) -> None:
        self.calibration, self.asked = calibration, []

    @property
    def has_gradients(self) -> bool:
        return self.calibration.has_gradients

    def __contains__(self, fqn: str) -> bool:
        return fqn in self.calibration

    def tokens(self, fqn: str) -> int:
        return self.calibration.tokens(fqn)

    def metric(self, fqn: str, matrices: torch.Tensor, centred: bool) -> shrank.Metric | None:
        self.asked.append(fqn)
        return self.calibration.metric(fqn, matrices, centred=False)


def test_plans_and_factors_ask_whatever_says_how_errors_count() -> None:
    model, x = mlp(2), draw(300, WIDTH) + 3
    found = calibrate(model, [x])
    seen = Uncentred(found)
    plan = make_plan(model, Budget(keep_params=0.6), calibration=seen)
    assert sorted(seen.asked) == ["0", "1"]
    plain = shrank.apply(copy.deepcopy(model), plan, seen)
    centred = shrank.apply(copy.deepcopy(model), plan, found)
    assert sorted(seen.asked) == ["0", "0", "1", "1"]
    for name in ("0", "1"):  # only where the mean error is free do biases make up for it
        assert torch.equal(plain.get_submodule(name).bias, model.get_submodule(name).bias)
        assert not torch.equal(centred.get_submodule(name).bias, model.get_submodule(name).bias)


def few_bits(keep: float, **options) -> Budget:
    return Budget(keep_bytes=keep, group_sizes=(8, 16), correction_ranks=(2, 4), **options)


def bytes_stored(plan: shrank.RankPlan) -> int:
    return sum(x.bytes(4) for x in plan if x.shape)


@pytest.mark.parametrize("keep", [0.07, 0.12, 0.2, 0.5])
@pytest.mark.parametrize("calibrated", [False, True])
def test_no_more_bytes_are_stored_than_the_budget(keep: float, calibrated: bool) -> None:
    model = wide(5)
    found = calibrate(model, [correlated()], inputs=True) if calibrated else None
    plan = make_plan(model, few_bits(keep), calibration=found)
    dense = sum(4 * x.size for x in plan)
    assert 0.75 * keep < bytes_stored(plan) / dense <= keep
    assert plan.spent[0] == pytest.approx(bytes_stored(plan) / dense)
    small = auto_fact(copy.deepcopy(model), few_bits(keep), calibrate=found)
    assert [(x.rank, x.storage) for x in small.shrank_plan] == [(x.rank, x.storage) for x in plan]


def test_bits_beat_low_rank_alone_at_the_same_bytes() -> None:
    model, x = mlp(4), correlated()
    dense = model(x)
    lost = {}
    for name, options in {"all": {}, "low rank": {"bits": ()}}.items():
        small = auto_fact(copy.deepcopy(model), few_bits(0.3, **options), calibrate=[x])
        lost[name] = (small(x) - dense).norm() / dense.norm()
    assert lost["all"] < 0.2 * lost["low rank"]


@pytest.mark.parametrize("keep", [0.09, 0.15])
def test_all_forms_together_are_as_good_as_any_alone(keep: float) -> None:
    model, x = wide(5), correlated()
    found = calibrate(model, [x], inputs=True)
    errors = {
        name: make_plan(model, few_bits(keep, **{} if options is None else options), calibration=found).spent[1]
        for name, options in {"all": {}, "4 bits": {"bits": (4,)}, "4 and 3 bits": {"bits": (4, 3)}}.items()
    }
    assert errors["all"] <= 1.1 * min(errors.values())


@pytest.mark.parametrize("keep", [0.08, 0.12, 0.2])
def test_what_the_budget_takes_was_measured(keep: float) -> None:
    model = wide(4)
    found = calibrate(model, [correlated()], inputs=True)
    of_few_bits = [x for x in make_plan(model, few_bits(keep), calibration=found).changed if x.storage.grid]
    sites = {site.fqn: site for site in Survey(model).sites()}
    assert of_few_bits
    for layer in of_few_bits:
        whole = Spectra(found).of(sites[layer.fqn], layer.shape).square().sum()
        form = Form(layer.rank, layer.shape, layer.storage)
        squared = loss(sites[layer.fqn], form, found).squared_error
        assert layer.error == pytest.approx(math.sqrt(squared / whole))


def test_weights_in_16_bits_cost_half_of_those_in_32() -> None:
    model = mlp(3)
    of_32 = make_plan(model, few_bits(0.125))
    of_16 = make_plan(copy.deepcopy(model).bfloat16(), few_bits(0.25))
    assert bytes_stored(of_32) / sum(4 * x.size for x in of_32) <= 0.125
    assert sum(x.bytes(2) for x in of_16) / sum(2 * x.size for x in of_16) <= 0.25


def test_layers_of_one_rank_have_one_storage() -> None:
    model = wide(4)
    found = calibrate(model, [correlated()], inputs=True)
    budget = few_bits(0.12, same_rank=["[01]"])
    plan = make_plan(model, budget, calibration=found)
    assert (plan["0"].rank, plan["0"].storage) == (plan["1"].rank, plan["1"].storage)


def test_bytes_and_bits_have_one_owner() -> None:
    with pytest.raises(ValueError, match=r"give Budget\(bits=\), not bits="):
        make_plan(mlp(2), few_bits(0.2), bits=4)


def test_inputs_are_observed_where_bits_may_be_few() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, 16))), correlated()
    small = auto_fact(copy.deepcopy(model), few_bits(0.1), calibrate=[x])
    assert any(layer.storage.grid for layer in small.shrank_plan)
