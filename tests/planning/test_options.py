"""Options: their keywords are their fields, and a typo is answered with the nearest of them."""

from __future__ import annotations

import typing

import pytest

import shrank
from shrank import Budget, Calibrate, PlanOptions
from shrank.planning import options
from shrank.planning.keywords import PlanKeywords


def test_keywords_for_type_checkers_are_the_fields() -> None:
    fields = typing.get_type_hints(PlanOptions)
    assert typing.get_type_hints(PlanKeywords) == fields


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: PlanOptions(exlude="head"), r"PlanOptions\(\) has no option 'exlude'; did you mean exclude\?"),
        (lambda: Budget(keep_param=0.5), r"Budget\(\) has no option 'keep_param'; did you mean keep_params\?"),
        (lambda: Calibrate([], los="lm"), r"Calibrate\(\) has no option 'los'; did you mean loss\?"),
        (lambda: shrank.calibrate(None, [], max_mem=3), r"calibrate\(\) .* 'max_mem'; did you mean max_memory\?"),
        (lambda: shrank.measure_errors(None, None, None, datas=[]), r"measure_errors\(\) .* did you mean data\?"),
        (lambda: shrank.batches([], maxlength=3), r"batches\(\) has no option 'maxlength'; did you mean max_length\?"),
    ],
)
def test_a_typo_names_what_was_called_and_the_nearest_name(call, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


def test_what_belongs_to_the_data_is_said_where_to_give() -> None:
    for name in options._ELSEWHERE:
        with pytest.raises(TypeError, match=rf"did you mean calibrate=shrank\.\w+\(data, {name}=\)"):
            shrank.auto_fact(None, 4, **{name: 1})
