"""Errors of the layers on data: of the tokens that count, and only of these."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from shrank import auto_fact, batches, measure_errors
from tests.common.models import WIDTH, draw, hf_model, mlp, tokens
from tests.common.tolerances import assert_close


def test_errors_are_those_of_the_tokens_that_count() -> None:
    model, mask = hf_model("bert"), torch.ones(2, 8, dtype=torch.long)
    mask[1, 3:] = 0
    small = auto_fact(copy.deepcopy(model), 4)
    inputs = {"input_ids": tokens(2, 8), "attention_mask": mask}
    plan = measure_errors(small.shrank_plan, model, small, [inputs])
    name = "bert.encoder.layer.1.output.dense"
    layer, twin, seen = model.get_submodule(name), small.get_submodule(name), []
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0][mask.bool()], y[mask.bool()])))
    with torch.no_grad():
        model(**inputs)
        ((x, y),) = seen
        expected = (twin(x) - y).norm() / (y - y.mean(0)).norm()
    assert_close(torch.tensor(plan[name].measured), expected)
    other = measure_errors(
        small.shrank_plan, model, small, batches([inputs], mask=lambda item: 1 - item["attention_mask"])
    )
    assert other[name].measured != plan[name].measured


def test_nothing_is_measured_where_nothing_counts() -> None:
    model = mlp(2)
    small = auto_fact(copy.deepcopy(model), 4)
    for data in ([draw(0, WIDTH)], [{"input": draw(2, WIDTH), "attention_mask": None}]):
        run = lambda model, batch: model(batch.kwargs.get("input", draw(0, WIDTH)))  # noqa: E731
        plan = measure_errors(
            small.shrank_plan, model, small, batches(data, mask=lambda item: torch.zeros(2), forward=run)
        )
        assert all(layer.measured is None for layer in plan)


def test_layers_of_every_batch_are_measured() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.long = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.short(x) if len(x) < 5 else self.long(x)

    model = Two()
    small = auto_fact(copy.deepcopy(model), 4)
    plan = measure_errors(small.shrank_plan, model, small, [draw(4, WIDTH), draw(9, WIDTH)])
    assert all(layer.measured > 0 for layer in plan.low_rank) and len(plan.low_rank) == 2
