"""Every way is tried in a process of its own first: what ends it is known, and the others are tried nevertheless."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import torch

from shrank.measuring import tuning_apart
from shrank.measuring.tuning_apart import answer, faults
from shrank.ops import apart
from shrank.ops.linear import LINEAR

from .test_tuning import PROBLEMS, WAYS, native  # noqa: F401

LINEAR_WAYS = [
    ("a linear key", " ".join([kernel, "x".join(map(str, grid or ()))]).strip()) for kernel, grid in WAYS[LINEAR.name]
]


@pytest.fixture
def stdin(monkeypatch):
    def give(ended=()) -> None:
        problems = {problem.key: problem.numbers for problem in PROBLEMS.values()}
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"problems": problems, "ended": list(ended)})))

    give()
    return give


def said(capsys) -> list:
    return apart.heard(capsys.readouterr().out)


def test_every_way_is_named_before_it_is_tried(native, stdin, capsys) -> None:  # noqa: F811
    answer("cpu")
    *tried, done = said(capsys)
    assert done == "done" and [tuple(each) for each in tried[: len(LINEAR_WAYS)]] == LINEAR_WAYS
    assert len(tried) == sum(len(WAYS[problem.op.name]) for problem in PROBLEMS.values())


def test_what_ended_another_process_is_not_tried_again(native, stdin, capsys) -> None:  # noqa: F811
    native.broken["fused", (64, 64, 1)] = lambda y: pytest.fail("it ran")
    stdin(ended=[LINEAR_WAYS[0]])
    answer("cpu")
    assert list(LINEAR_WAYS[0]) not in said(capsys)


@pytest.mark.parametrize("card_lives", [True, False])
def test_after_an_error_the_card_is_asked_whether_it_lives(native, stdin, monkeypatch, capsys, card_lives) -> None:  # noqa: F811
    def fault(y):
        if not card_lives:
            monkeypatch.setattr(tuning_apart, "torch", Dead)
        raise RuntimeError("an illegal memory access was encountered")

    class Dead:
        OutOfMemoryError = torch.OutOfMemoryError

        @staticmethod
        def zeros(*_, **__):
            raise RuntimeError("an illegal memory access was encountered")

    native.broken["fused", (32, 64, 2)] = fault
    if card_lives:
        answer("cpu")
        assert said(capsys)[-1] == "done"
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            answer("cpu")
        assert tuple(said(capsys)[-1]) == LINEAR_WAYS[1]


def test_a_problem_without_memory_is_left_to_the_process_that_measures(native, stdin, capsys) -> None:  # noqa: F811
    def short(y):
        raise torch.OutOfMemoryError("8 GiB")

    native.broken["fused", (64, 64, 1)] = short
    answer("cpu")
    values = said(capsys)
    assert values[-1] == "done" and list(LINEAR_WAYS[1]) not in values and ["a conv key", "fused 64x32x1"] in values


class Card:
    """Processes that end at certain ways."""

    def __init__(self, *deadly: tuple[str, str]) -> None:
        self.deadly, self.started = deadly, []

    def run(self, command, *, input, **_):
        given = json.loads(input)
        self.started.append((command[-1], sorted(given["problems"]), [tuple(each) for each in given["ended"]]))
        ended, values = self.started[-1][2], [apart.BEGINS]
        for way in LINEAR_WAYS:
            if way not in ended:
                values.append(list(way))
            if way in self.deadly and way not in ended:
                return self.process(values, -11)
        return self.process([*values, "done"], 0)

    def process(self, values, code):
        out = "".join(json.dumps(value) + "\n" for value in values)
        return subprocess.CompletedProcess([], code, out.encode(), b"illegal memory access" if code else b"")


def test_each_way_that_ends_a_process_is_found_and_the_others_are_tried(monkeypatch) -> None:
    card = Card(LINEAR_WAYS[0], LINEAR_WAYS[2])
    monkeypatch.setattr(subprocess, "run", card.run)
    why = "its check ended with code -11: illegal memory access"
    assert faults([PROBLEMS["linear"]], "cuda:1") == {LINEAR_WAYS[0]: why, LINEAR_WAYS[2]: why}
    assert [ended for *_, ended in card.started] == [[], [LINEAR_WAYS[0]], [LINEAR_WAYS[0], LINEAR_WAYS[2]]]
    assert {(device, *keys) for device, keys, _ in card.started} == {("cuda:1", "a linear key")}


def test_a_card_on_which_all_is_right_starts_one_process(monkeypatch) -> None:
    card = Card()
    monkeypatch.setattr(subprocess, "run", card.run)
    assert faults([PROBLEMS["linear"]], "cuda:0") == {} and len(card.started) == 1


@pytest.mark.parametrize("values", [[apart.BEGINS], [apart.BEGINS, *map(list, LINEAR_WAYS[:1])]])
def test_a_process_that_ends_at_nothing_new_is_an_error(monkeypatch, values) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Card().process(values, -9))
    with pytest.raises(RuntimeError, match="cannot be tried on cuda:0: the process ended with code -9"):
        faults([PROBLEMS["linear"]], "cuda:0")


def test_a_process_that_does_not_begin_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Card().process([], 1))
    with pytest.raises(apart.NotMade, match="illegal memory access"):
        faults([PROBLEMS["linear"]], "cuda:0")


def test_the_process_is_a_real_one() -> None:
    """Without native code there is no way: that process begins, and says why it cannot go on."""
    error = "(Attribute|NotImplemented)Error: .*low_rank_linear_choices"
    with pytest.raises(RuntimeError, match=f"cannot be tried on cpu: the process ended with code 1: {error}"):
        faults([PROBLEMS["linear"]], "cpu")
