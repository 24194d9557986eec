"""Blocks trained, after they were fitted, to return what the dense blocks return."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import Anchored, Budget, Calibrate, auto_fact
from shrank.compression.refine import Example, _trainable, refine
from shrank.model.survey import Survey
from tests.common.models import WIDTH, assert_untouched, draw, fingerprint, hf_model, seeded, tokens
from tests.common.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 tokens")
RANK = 6


class Block(nn.Module):
    """A norm, two layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model_of_blocks(depth: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(*(Block() for _ in range(depth))))


def rows(count: int = 5) -> list[Tensor]:
    return list(draw(80 * count, WIDTH).split(80))


def compressed(model: nn.Module, data: list, rank: object = RANK, **how: object) -> nn.Module:
    how = {"steps": 24, "learning_rate": 1e-3} | how
    return auto_fact(copy.deepcopy(model), rank, calibrate=Calibrate(data, loss="none"), anchored=Anchored(**how))


def errors(small: nn.Module) -> dict[str, tuple[float, float]]:
    """What the plan says of the error on held-out data, before and after, by layer."""
    found = {x.fqn: re.search(r"held-out data (\S+) -> (\S+)$", x.reason) for x in small.shrank_plan.low_rank}
    return {fqn: (float(match[1]), float(match[2])) for fqn, match in found.items() if match}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unlike(one: nn.Module, other: nn.Module) -> set[str]:
    there = other.state_dict()
    return {name for name, value in one.state_dict().items() if not torch.equal(value, there[name])}


def test_the_model_comes_nearer_on_data_that_it_was_not_trained_on() -> None:
    model, test = model_of_blocks(), draw(500, WIDTH) * 1.1
    error = lambda m: (m(test) - model(test)).norm().item()  # noqa: E731
    fitted, trained = (compressed(model, rows(8), steps=steps) for steps in (0, 40))
    assert error(trained) < 0.97 * error(fitted)
    assert errors(trained).keys() == {x.fqn for x in trained.shrank_plan.low_rank}
    assert all(after < before for before, after in errors(trained).values())
    assert all(x.error is None for x in trained.shrank_plan.low_rank)
    assert {x.fqn: x.rank for x in trained.shrank_plan} == {x.fqn: x.rank for x in fitted.shrank_plan}
    shrank.RankPlan.from_dict(trained.shrank_plan.to_dict())


def test_what_is_kept_is_the_best_on_what_is_held_out() -> None:
    """The figures are those of the block that is left."""
    model = model_of_blocks(1)
    small = compressed(model, rows(2), steps=0)
    there, (x, held) = copy.deepcopy(small), rows(2)
    survey = Survey(small)
    examples = [Example(((part,), {}), None, model[0](part).detach()) for part in (x, held)]
    found = refine(survey, "0", survey.low_rank(), examples[:1], examples[1:], Anchored(steps=30, learning_rate=3e-3))
    energy = model[0](held).square().sum()
    assert found.step and found.after < found.before
    for part, error in ((there[0], found.before), (small[0], found.after)):
        assert_close((part(held) - model[0](held)).square().sum() / energy, torch.tensor(error))


def test_where_nothing_gets_better_the_fitted_factors_stay() -> None:
    model, data = model_of_blocks(), rows()
    fitted, trained = compressed(model, data, steps=0), compressed(model, data, steps=8, learning_rate=10.0)
    assert not unlike(fitted, trained)
    assert all(x.reason.endswith("to no gain on held-out data") for x in trained.shrank_plan.low_rank)
    assert all(x.error is not None for x in trained.shrank_plan.low_rank)


def test_a_seed_decides_every_bit() -> None:
    model, data = model_of_blocks(2), rows()
    one, again, other = (compressed(model, data, seed=seed) for seed in (0, 0, 1))
    assert not unlike(one, again) and unlike(one, other)


def test_only_low_rank_layers_are_trained_and_all_flags_stay() -> None:
    model = model_of_blocks(2).train()
    model[0].up.weight.requires_grad_(False)
    small = compressed(model, rows(), rank={"*up": RANK})
    assert small.training and small[1].up.training and not small[0].up.down.requires_grad
    assert {name.rpartition(".")[0] for name in unlike(small, compressed(model, rows(), {"*up": RANK}, steps=0))} == {
        f"{i}.up.led_unit.{j}" for i in (0, 1) for j in (0, 1)
    }
    assert all(p.grad is None for p in small.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_gradients_reach_no_further_than_a_block() -> None:
    model, seen = model_of_blocks(), set()

    def note(name: str, module: nn.Module, args: tuple) -> None:
        seen.add((name, torch.is_grad_enabled(), args[0].requires_grad))

    for name in ("", "0", "1", "2"):
        model.get_submodule(name).register_forward_pre_hook(partial(note, name))
    data = rows()
    auto_fact(model, RANK, calibrate=Calibrate(data, loss="none"), anchored=Anchored(steps=2))
    assert {name for name, graph, _ in seen if graph} == {"0", "1", "2"}
    assert not any(asks for *_, asks in seen)


def texts(model: nn.Module, change: int = 0) -> list[dict[str, Tensor]]:
    """Of different lengths; change: of the ids of padding."""
    made = []
    for length in (6, 8, 11, 9):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, 4:] = 0
        ids = tokens(2, length)
        made.append({"input_ids": torch.where(mask == 0, change, ids), "attention_mask": mask})
    return made


def test_padding_does_not_count_and_texts_may_have_any_length() -> None:
    model = hf_model("bert")
    one, other = (compressed(model, texts(model, change), rank=4) for change in (0, 5))
    assert errors(one).keys() >= {x.fqn for x in one.shrank_plan if ".layer." in x.fqn and x.rank}
    layer = "bert.encoder.layer.1.output.dense"
    assert_close(*(m.get_submodule(layer).up @ m.get_submodule(layer).down for m in (one, other)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models(family: str) -> None:
    model, data = hf_model(family), [{"input_ids": tokens(2, n)} for n in (9, 12, 7)]
    small = compressed(model, data, rank=Budget(keep_params=0.5), steps=4)
    assert all("; trained further" in x.reason for x in small.shrank_plan.low_rank) and model.config.use_cache


def test_pivoted_layers_that_gain_nothing_keep_their_bits() -> None:
    model, rank = model_of_blocks(2), Budget(keep_params=0.6)
    fitted, trained = (compressed(model, rows(), rank, steps=steps, learning_rate=10.0) for steps in (0, 8))
    assert any(x.shape.pivoted for x in trained.shrank_plan.low_rank) and not unlike(fitted, trained)


def test_pivoted_layers_stay_pivoted() -> None:
    model = model_of_blocks(2)
    small = compressed(model, rows(), rank=Budget(keep_params=0.6))
    pivoted = [x.fqn for x in small.shrank_plan.low_rank if x.shape.pivoted]
    assert pivoted and all(small.get_submodule(fqn).pivoted for fqn in pivoted)
    assert set(pivoted) & errors(small).keys()
    assert {x.fqn: x.shape for x in shrank.describe(small).low_rank} == {
        x.fqn: x.shape for x in small.shrank_plan.low_rank
    }


def test_convolutions() -> None:
    def build() -> nn.Module:
        block = lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1))  # noqa: E731
        return nn.ModuleList([block(), block()])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = build()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = seeded(Net)
    small = auto_fact(
        model,
        8,
        calibrate=Calibrate(list(draw(32, 16, 8, 8).split(8)), loss="none"),
        anchored=Anchored(steps=16, learning_rate=1e-3),
        allow_slower=True,
    )
    assert errors(small).keys() == {x.fqn for x in small.shrank_plan.low_rank} and len(errors(small)) == 4


def test_weights_in_16_bits_are_trained_through_copies_in_32() -> None:
    model = model_of_blocks(2).bfloat16()
    data = [x.bfloat16() for x in rows()]
    small = compressed(model, data, learning_rate=1e-5, steps=40)  # steps that bfloat16 would round away
    assert all(p.dtype == torch.bfloat16 for p in small.parameters()) and errors(small)


def test_parameters_that_are_no_ordinary_numbers_or_are_elsewhere_too_are_not_trained() -> None:
    class Quantized(nn.Parameter):
        pass

    model = compressed(model_of_blocks(2), rows(), steps=0)
    survey = Survey(model)
    sites = [site for site in survey.low_rank() if site.fqn.startswith("0.")]
    model[0].up.stages[0].weight = Quantized(model[0].up.stages[0].weight.detach())
    model[1].norm.bias = model[0].down.stages[1].bias
    names = {name.removeprefix("0.") for name in _trainable(model, "0", sites)}
    assert names == {
        f"{x}.led_unit.{n}"
        for x, n in (("up", "1.weight"), ("up", "1.bias"), ("down", "0.weight"), ("down", "1.weight"))
    }


class Pair(Block):
    """A block that returns a second tensor of numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.sum(-1)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


class Twice(nn.Module):
    """The first block runs a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.blocks[0](x)))


class Keeps(Block):
    """A block that returns something else each time."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize(
    "build, reason",
    [
        (Pairs, "returns 2 tensors of numbers"),
        (Twice, "runs several times"),
        (lambda: nn.Sequential(Keeps(), Keeps()), "returns something else"),
    ],
    ids=["several outputs", "several runs", "state"],
)
def test_a_block_that_cannot_be_trained_by_itself_is_named_and_left_fitted(build, reason: str) -> None:
    model, data = seeded(build), rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = compressed(model, data, steps=0)
    with pytest.warns(UserWarning, match=f"fitted, but not trained further: .*{reason}"):
        small = compressed(model, data)
    told = [x for x in small.shrank_plan.low_rank if reason in x.reason]
    assert told and all(x.error is not None for x in told)
    assert not {name for name in unlike(fitted, small) if name.startswith(tuple(x.fqn for x in told))}


def test_a_block_that_is_a_layer_stays_fitted() -> None:
    trained = compressed(seeded(lambda: nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH), Block())), rows())
    assert errors(trained).keys() == {f"{i}.{name}" for i in (0, 2) for name in ("up", "down")}
    assert trained.shrank_plan["1"].error is not None and "trained" not in trained.shrank_plan["1"].reason


def test_nonsense_is_refused_before_anything_is_changed() -> None:
    model = model_of_blocks()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        Anchored(steps=-1)
    with pytest.raises(ValueError, match="learning_rate must be above 0, got 0"):
        Anchored(learning_rate=0)
    with pytest.raises(ValueError, match="steps=5: 1 batch cannot be trained on and held out: give more"):
        auto_fact(model, RANK, calibrate=rows(1), anchored=Anchored(steps=5))
    with pytest.raises(TypeError, match="did you mean steps"):
        Anchored(step=5)
    assert_untouched(model, before)
