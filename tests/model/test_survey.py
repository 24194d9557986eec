"""One look at a model: what it finds, that it is taken once, and that it stays right while the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shrank
from shrank.layers.led import LED
from shrank.model import survey as module
from shrank.model.surgery import replace
from shrank.model.survey import Survey
from tests.common.models import draw


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 24), LED(24, 32, 4)))


@pytest.fixture
def walks(monkeypatch) -> list[nn.Module]:
    """The models that were walked."""
    walked, walk = [], module._walk
    monkeypatch.setattr(module, "_walk", lambda root: walked.append(root) or walk(root))
    return walked


def test_parts_of_low_rank_layers_are_known_besides() -> None:
    survey = Survey(model())
    assert [site.fqn for site in survey.sites()] == ["0", "2.0", "2.1"]
    assert [site.fqn for site in survey.sites(inside_low_rank=True)] == [
        "0",
        "2.0",
        "2.1",
        "2.1.led_unit.0",
        "2.1.led_unit.1",
    ]
    assert [site.fqn for site in survey.low_rank()] == ["2.1"]


def test_a_part_that_is_also_elsewhere_is_no_part_only() -> None:
    led = LED(24, 32, 4)
    for root in (nn.Sequential(led, led.led_unit[0]), nn.Sequential(led.led_unit[0], led)):
        inside = {site.fqn: site.inside for site in Survey(root).sites(inside_low_rank=True)}
        assert sum(inside.values()) == 1 and len(inside) == 3


def test_it_follows_what_surgery_does() -> None:
    root = nn.Linear(8, 8)
    survey = Survey(root)
    (site,) = survey.sites()
    assert site.adapter.kind == "Linear" and site.shape.in_features == 8 and site.why_not() == []
    twin = LED(8, 8, 2)
    replace(survey, site, twin)
    assert survey.model is twin is site.module and site.adapter is None
    assert site.why_not() == ["already low-rank"] and survey.low_rank() == [site]


@pytest.mark.parametrize("anchored", [False, True])
def test_a_model_is_walked_once_whatever_is_asked_of_it(walks, anchored: bool) -> None:
    dense = model()
    shrank.auto_fact(dense, 0.5, calibrate=[draw(64, 32)], anchored=anchored)
    assert walks == [dense] and len(Survey(dense).low_rank()) > 1


def test_trials_of_a_budget_are_models_of_their_own(walks) -> None:
    dense = model()
    root = copy.deepcopy(dense)
    shrank.auto_fact(root, shrank.Budget(eval_fn=lambda m: 0.0), calibrate=[draw(64, 32)])
    assert walks.count(root) == 1 and len(walks) > 2
