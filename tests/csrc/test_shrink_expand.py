"""The kernels for a few rows, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.few_rows import TOKENS, FewRowsRun, Layer, MultiRun, emulate, emulate_multi, multi_runs, runs
from .emulated.linear import BF16, GATED, GATED_PIVOTED, PIVOTED, PLAIN, exact, in_pytorch


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    compiled = [(tile.tokens, tile.form, tile.layers) for tile in dev.select.SHRINK_EXPAND_TILES]
    kinds = ((PLAIN, 1), (GATED, 1), (PIVOTED, 1), (GATED_PIVOTED, 1), (PLAIN, 3), (PIVOTED, 3))
    assert sorted(compiled) == sorted((tokens, *of) for tokens in TOKENS for of in kinds)


@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: FewRowsRun) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.K + run.R) % 8)
    assert outcome.problems == []
    assert run.pivoted or outcome.counts.bank_conflicts == 0  # pivots are read from h column by column
    y, *h = exact(arguments)
    assert_close(outcome.y, y, in_pytorch(arguments))
    assert_every_element_close(outcome.y, y)
    for ours, theirs in zip(outcome.h, h, strict=bool(outcome.h)):
        assert_every_element_close(ours, theirs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("tokens", "splits", "of_form"),
    [
        (8, 3, {}),
        (16, 1, {}),
        (16, 2, {}),
        (8, 2, {"gate": 40}),
        (16, 1, {"gate": 136}),
        (8, 2, {"pivoted": True}),
        (16, 1, {"pivoted": True}),
        (8, 2, {"gate": 40, "pivoted": "both"}),
        (16, 1, {"gate": 136, "pivoted": "gate"}),
    ],
)
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(
    dev, tokens: int, splits: int, of_form: dict, seed: int
) -> None:
    ends = (True, "gelu_tanh", "gate" not in of_form, True)
    run = FewRowsRun(tokens, splits, tokens + 3, 1032, 136, 72, *ends, **of_form)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert all(map(torch.equal, (outcome.y, *outcome.h), (other.y, *other.h)))


def test_training_and_inference_give_the_same_bits(dev) -> None:
    for splits, gate in product((1, 2), (0, 24)):
        training = FewRowsRun(8, splits, 5, 520, 72, 40, True, "silu", not gate, True, gate=gate)
        inference = replace(training, training=False)
        arguments = training.arguments()
        assert torch.equal(emulate(dev, training, arguments).y, emulate(dev, inference, arguments).y)


@pytest.mark.parametrize("splits", [1, 3])
def test_h_is_rounded_once_as_two_calls_round_it(dev, splits: int) -> None:
    """x and down are small integers, so that h is exact before it is rounded, and up picks single numbers of it."""
    generator = torch.Generator().manual_seed(0)
    x, down = (torch.randint(-8, 9, shape, generator=generator).to(BF16) for shape in ((9, 1048), (16, 1048)))
    up = torch.eye(16, dtype=BF16)
    run = FewRowsRun(16, splits, 9, 1048, 16, 16, training=True)
    outcome = emulate(dev, run, (x, down, up, None, "none", None))
    rounded = (x.double() @ down.double().T).to(BF16)
    assert outcome.problems == [] and torch.equal(outcome.h[0], rounded) and torch.equal(outcome.y, rounded)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("R", "splits", "gate"), [(40, 1, 0), (40, 2, 0), (264, 1, 0), (40, 2, 16), (40, 1, 136)])
def test_nan_and_inf_go_where_pytorch_lets_them_go(dev, special: float, R: int, splits: int, gate: int) -> None:
    run = FewRowsRun(8, splits, 5, 72, 72, R, True, "relu", not gate, gate=gate)
    arguments = run.arguments()
    arguments[0][3, 5] = special
    y, torchs = emulate(dev, run, arguments).y, in_pytorch(arguments)
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(y.isinf(), torchs.isinf())
    assert not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.parametrize("run", multi_runs(), ids=str)
def test_layers_of_one_input_get_the_bits_that_they_get_alone(dev, run: MultiRun) -> None:
    arguments = run.arguments()
    together = emulate_multi(dev, run, arguments, hash(run.M + run.K) % 8)
    assert together[0].problems == []
    assert together[0].counts.bank_conflicts == 0 or any(layer.pivoted for layer in run.layers)
    for layer, given, found in zip(run.alone(), arguments, together, strict=True):
        alone = emulate(dev, layer, given)
        assert torch.equal(found.y, alone.y) and found.y.isfinite().all()
        assert_every_element_close(found.y, exact(given)[0])


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_threads_breaks_a_rule_of_several_layers(dev, seed: int, pivoted: bool) -> None:
    run = MultiRun(8, 11, 520, (Layer(136, 72, 2, pivoted=pivoted), Layer(40, 24, 3), Layer(72, 40, pivoted=pivoted)))
    arguments = run.arguments()
    first, other = emulate_multi(dev, run, arguments, seed), emulate_multi(dev, run, arguments)
    assert first[0].problems == []
    assert all(torch.equal(one.y, two.y) for one, two in zip(first, other, strict=True))
