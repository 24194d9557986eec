"""Options of a user's choice: how they are written, what they make, and the loss of tokens that a model draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality.chosen import Chosen, chosen_rows
from benchmarks.quality.studies import replaced
from benchmarks.quality.tasks import Task
from tests.common.models import WIDTH, draw, mlp


class Outputs(Task):
    exclude = ("1",)

    def model(self) -> nn.Module:
        return mlp(3)

    def batches(self) -> list[Tensor]:
        return [draw(200, WIDTH)]

    def healing_batches(self) -> list[Tensor]:
        return [draw(40, WIDTH)] * 10

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"first": model[0](draw(1, WIDTH)).sum().item()}


def test_options_are_words() -> None:
    chosen = Chosen.of("steps=100 probe share=0.5 loss=output")
    assert chosen == Chosen(loss="output", probe=True, share=0.5, steps=100)
    assert str(chosen) == "loss=output probe share=0.5 steps=100" and Chosen.of(str(chosen)) == chosen
    assert str(Chosen.of("")) == "" and Chosen.of("probe=False") == Chosen()
    with pytest.raises(ValueError, match=r"options are loss, batches, probe, .* got width"):
        Chosen.of("width=3")
    with pytest.raises(ValueError, match="probe is True or False, got 'yes'"):
        Chosen.of("probe=yes")


def test_a_row_says_what_was_made_and_when() -> None:
    (row,) = chosen_rows(Outputs(), {"mine": Chosen(batches=3)}, (0.5,))
    assert row["method"] == "mine" and row["keep"] == 0.5 and 0.4 < row["kept"] <= 0.5
    assert row["measured"]["torch"] == torch.__version__
    assert len(Chosen(batches=3)._data(Outputs())) == 3 and len(Chosen()._data(Outputs())) == 1


def test_a_row_takes_the_place_of_that_of_the_same_size() -> None:
    rows = [{"method": "a", "keep": 0.5, "x": 1}, {"method": "a", "keep": 0.6, "x": 2}]
    assert [row["x"] for row in replaced(rows, {"method": "a", "keep": 0.6, "x": 3})] == [1, 3]
    assert [row["x"] for row in replaced(rows, {"method": "b", "keep": 0.6, "x": 3})] == [1, 2, 3]
