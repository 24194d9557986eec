"""Healing: the factors come nearer to the dense model, the best is kept, and an interrupted run goes on."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from shrank import HealOptions, auto_fact, heal
from shrank.calibration.batches import as_batches
from shrank.calibration.losses import NextToken
from shrank.healing.distance import common_blocks, distance, masking_of_blocks
from tests.common.models import WIDTH, assert_untouched, draw, fingerprint, hf_model, mlp, seeded, tokens


def pair(build=mlp, rank: int = 4) -> tuple[nn.Module, nn.Module]:
    dense = build()
    return auto_fact(copy.deepcopy(dense), rank), dense


def data(count: int = 12) -> list[torch.Tensor]:
    return list(draw(count * 8, WIDTH).split(8))


def llama() -> nn.Module:
    return hf_model("llama")


def texts(count: int = 8) -> list[dict[str, torch.Tensor]]:
    found = tokens(count * 2, 9)
    return [{"input_ids": found[2 * i : 2 * i + 2]} for i in range(count)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("build, batches", [(mlp, data()), (llama, texts())], ids=["output", "logits"])
def test_the_student_comes_nearer(build, batches) -> None:
    student, teacher = pair(build)
    student.train()
    before, outside = fingerprint(teacher), {n: p.clone() for n, p in student.named_parameters() if "_unit" not in n}
    healed = heal(student, teacher, batches, steps=40, learning_rate=1e-2, options=HealOptions(evaluate_every=10))
    assert healed is student and student.training and all(p.requires_grad for p in student.parameters())
    assert_untouched(teacher, before)
    assert all(torch.equal(dict(student.named_parameters())[n], p) for n, p in outside.items())  # only the factors
    done = student.shrank_healing
    assert done.after < 0.9 * done.before and done.steps == 40 and [s for s, _ in done.curve] == [0, 10, 20, 30, 40]
    assert all(p.grad is None for p in student.parameters())


def test_the_best_weights_are_kept() -> None:
    student, teacher = pair()
    before, held = state(student), data(3)
    heal(
        student,
        teacher,
        data(),
        steps=6,
        learning_rate=30.0,
        held_out=held,  # it diverges
        options=HealOptions(evaluate_every=2),
    )
    assert student.shrank_healing.best_step == 0
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student, teacher = pair()
    heal(student, teacher, data(), steps=30, learning_rate=1e-2, held_out=held, options=HealOptions(evaluate_every=10))
    blocks = masking_of_blocks(student, teacher, [])
    now = sum(distance(student, teacher, b, blocks, 1.0).item() for b in as_batches(held)) / 3
    assert now == pytest.approx(student.shrank_healing.after, rel=1e-5)


def test_a_rate_that_is_too_large_is_lowered_until_it_helps() -> None:
    student, teacher = pair()
    heal(student, teacher, data(), steps=60, learning_rate=1.0, options=HealOptions(evaluate_every=5))
    losses = [loss for _, loss in student.shrank_healing.curve]
    assert losses[1] > 2 * losses[0] and student.shrank_healing.best_step > 5
    assert student.shrank_healing.after < 0.97 * student.shrank_healing.before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(dtype, tmp_path, monkeypatch) -> None:
    arguments = {"steps": 9, "learning_rate": 1e-2, "options": HealOptions(evaluate_every=3)}
    batches = [b.to(dtype) for b in data()]
    dense = mlp().to(dtype)
    students = [auto_fact(copy.deepcopy(dense), 4) for _ in range(2)]
    heal(students[0], dense, batches, **arguments)
    from shrank.healing.run import Run

    take_step, taken = Run._take_step, []

    def interrupted(run: Run) -> None:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        take_step(run)

    monkeypatch.setattr(Run, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal(students[1], dense, batches, checkpoint=tmp_path / "run", **arguments)
    again = auto_fact(copy.deepcopy(dense), 4)
    heal(again, dense, batches, checkpoint=tmp_path / "run", **arguments)
    assert len(taken) == 6 + 6  # steps 4 and 5 again, and 6 to 9
    assert again.shrank_healing == students[0].shrank_healing
    expected = state(students[0])
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_of_something_else_is_refused(tmp_path) -> None:
    student, teacher = pair()
    heal(student, teacher, data(), steps=2, options=HealOptions(evaluate_every=1), checkpoint=tmp_path / "run")
    for change in (
        {"steps": 3},
        {"learning_rate": 1e-4},
        {"data": data(11)},
        {"options": HealOptions(evaluate_every=1, seed=1)},
    ):
        before = state(student)
        with pytest.raises(ValueError, match="another healing"):
            heal(
                student,
                teacher,
                **{
                    "data": data(),
                    "steps": 2,
                    "options": HealOptions(evaluate_every=1),
                    "checkpoint": tmp_path / "run",
                    **change,
                },
            )
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_half_precision_weights_move_by_less_than_their_rounding() -> None:
    dense = mlp(1).to(torch.bfloat16)
    student = auto_fact(copy.deepcopy(dense), 8)
    before = state(student)
    batches = [(b * torch.linspace(0.1, 3, WIDTH)).bfloat16() for b in data()]  # else plain SVD is the best already
    heal(
        student,
        dense,
        batches,
        steps=60,
        learning_rate=2e-4,  # a step is below half a unit
        options=HealOptions(evaluate_every=60),
    )
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert student.shrank_healing.best_step == 60 and moved
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())


def test_all_parameters_if_asked_for() -> None:
    student, teacher = pair(llama)
    before = student.model.norm.weight.clone()
    heal(student, teacher, texts(), steps=20, learning_rate=1e-3, options=HealOptions(train="all", evaluate_every=20))
    assert not torch.equal(student.model.norm.weight, before)


@pytest.mark.parametrize(
    "loss",
    [
        "lm",
        lambda output, batch: (
            9 * 2 * F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch.kwargs["input_ids"][:, 1:].flatten())
        ),
    ],
    ids=["lm", "function"],
)
def test_the_tasks_own_loss_counts_as_well(loss) -> None:
    teacher, batches, own = llama(), texts(1) * 8, []  # always the same tokens, of which the teacher knows nothing
    student = auto_fact(copy.deepcopy(teacher), 4)
    for chosen in ("none", loss):
        healed = heal(
            copy.deepcopy(student),
            teacher,
            batches,
            steps=40,
            learning_rate=1e-2,
            loss=chosen,
            options=HealOptions(train="all"),
        )
        with torch.no_grad():
            own.append(NextToken().mean(healed(**batches[0]), as_batches(batches)[0]).item())
    assert own[1] < 0.8 * own[0]


def test_padding_does_not_count() -> None:
    student, teacher = pair(llama)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    changed = ids.clone()
    changed[1, 6:] = 5
    blocks = masking_of_blocks(student, teacher, [])
    losses = [
        distance(student, teacher, as_batches([{"input_ids": i, "attention_mask": mask}])[0], blocks, 1.0).item()
        for i in (ids, changed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_blocks_are_found_in_both_models() -> None:
    student, teacher = pair(llama)
    assert {"model.layers.0", "model.layers.1"} <= set(common_blocks(student, teacher))
    blocks = masking_of_blocks(teacher, teacher, [])
    assert distance(teacher, teacher, as_batches(texts(1))[0], blocks, 1.0).item() < 1e-9


def test_pivots_heal_as_plain_factors_do() -> None:
    dense, found = mlp(), []
    for pivot in (False, True):
        student = auto_fact(copy.deepcopy(dense), 8, pivot=pivot)
        before, places = fingerprint(student), [m.led_unit[2].order for m in student if pivot]
        heal(student, dense, data(), steps=30, learning_rate=3e-3, options=HealOptions(evaluate_every=10))
        assert fingerprint(student)["types"] == before["types"] and len(places) == 3 * pivot
        found.append(student.shrank_healing)
    plain, pivoted = found
    assert pivoted.before == pytest.approx(plain.before, rel=1e-3)
    assert pivoted.after < 0.9 * pivoted.before and pivoted.after < 1.1 * plain.after


def test_a_loss_that_is_not_finite_is_an_error_and_loses_nothing() -> None:
    student, teacher = pair()
    before, bad = state(student), data()
    bad = [torch.full_like(b, float("inf")) for b in bad]
    with pytest.raises(RuntimeError, match=r"step 0, batch \d+: the dense model's outputs hold NaN"):
        heal(student, teacher, bad, held_out=data(2), steps=4)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


class Padded(nn.Module):
    """A language model whose vocabulary has more places than tokens, and perhaps one more for the student."""

    def __init__(self, first: int = 60, value: float = -torch.inf) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64)
        self.first, self.value = first, value

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        logits = self.head(torch.tanh(self.layer(self.embedding(input_ids))))
        logits[..., self.first :] = self.value
        return CausalLMOutput(logits=logits)


def test_places_without_tokens_heal_as_places_with_hardly_any_share() -> None:
    healed = []
    for value in (-torch.inf, -1e4):
        student, teacher = pair(lambda value=value: seeded(lambda: Padded(value=value)))
        possible = [{"input_ids": x["input_ids"] % 60} for x in texts()]
        heal(student, teacher, possible, steps=8, learning_rate=1e-3, options=HealOptions(evaluate_every=4), loss="lm")
        healed.append(student.shrank_healing)
    curves = [[loss for _, loss in done.curve] for done in healed]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and healed[0].after < healed[0].before


@pytest.mark.parametrize(
    "model, other, says",
    [
        (0, {"first": 50}, r"step 0, held-out batch \d+: the model's logits are -inf where .* for token 50 in row 0"),
        (1, {"value": torch.nan}, r"step 0, held-out batch \d+: the dense model's logits hold NaN"),
        (0, {"value": torch.inf}, r"step 0, held-out batch \d+: the model's logits hold NaN or \+inf"),
    ],
)
def test_what_cannot_be_compared_says_which_model_and_which_batch(model: int, other: dict, says: str) -> None:
    student, teacher = pair(lambda: seeded(Padded))
    before = state(student)
    vars((student, teacher)[model]).update(other)
    with pytest.raises(RuntimeError, match=says):
        heal(student, teacher, texts(), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student, teacher = pair(lambda: seeded(Padded))
    with pytest.raises(ValueError, match=r"checkpoint: this healing could not be known again: .* is a generator"):
        heal(student, teacher, texts(), steps=2, checkpoint="never", loss=partial(needs_lines, (i for i in ())))


def needs_lines(lines: object, output: object, batch: object) -> torch.Tensor:
    return output.logits[..., 0].sum()


def test_batches_of_padding_alone_and_labels_that_do_not_count_change_nothing() -> None:
    batches = [x | {"attention_mask": torch.ones(2, 9, dtype=torch.long)} for x in texts()]
    nothing = [x | {"attention_mask": torch.zeros(2, 9, dtype=torch.long)} for x in texts(1)]
    nothing += [x | {"labels": torch.full((2, 9), -100)} for x in nothing]
    student, teacher = pair(llama)
    heal(
        student,
        teacher,
        batches + nothing,
        held_out=batches[:2] + nothing[:1],
        steps=20,
        learning_rate=1e-3,
        options=HealOptions(evaluate_every=10),
        loss="lm",
    )
    assert student.shrank_healing.after < student.shrank_healing.before
    masking = masking_of_blocks(student, teacher, [])
    for item in nothing:
        loss = distance(student, teacher, as_batches([item])[0], masking, 1.0, NextToken())
        loss.backward()
        assert loss.item() == 0


def test_blocks_that_run_several_times_are_compared_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](self.blocks[0](x))

    student, teacher = pair(lambda: seeded(Twice))
    (batch,) = as_batches([data()[0]])
    found = distance(student, teacher, batch, masking_of_blocks(student, teacher, [batch]), 1.0)

    def error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).square().sum() / y.square().sum()

    once = [model.blocks[0](data()[0]) for model in (student, teacher)]
    twice = [model.blocks[0](x) for model, x in zip((student, teacher), once, strict=True)]
    wanted = error(*twice) + (error(*once) + error(*twice)) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"data": data(1)}, "cannot be trained on and held out"),
        ({"loss": "none of these"}, "must be 'output', 'kl', 'lm'"),
        ({"loss": "output"}, "the outputs are compared anyway"),
        ({"student": mlp()}, "no low-rank or narrowed layers"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, says) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=says):
        heal(**{"student": student, "teacher": teacher, "data": data(), **change})


def test_what_happened_is_a_plain_record() -> None:
    student, teacher = pair()
    heal(student, teacher, data(), steps=2, options=HealOptions(evaluate_every=1))
    assert dataclasses.asdict(student.shrank_healing).keys() == {"steps", "best_step", "curve"}


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="train must be 'low_rank' or 'all', got 'none'"):
        HealOptions(train="none")
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        HealOptions(evaluate_every=0)
    with pytest.raises(TypeError, match=r"heal\(\) has no option 'step'; did you mean steps\?"):
        heal(*pair(), data(), step=3)
    with pytest.raises(TypeError, match=r"HealOptions\(\) has no option 'hiden'; did you mean hidden\?"):
        HealOptions(hiden=1.0)
