"""Timing in turns: the order, the arithmetic and the sizes; no clock is asserted."""

from __future__ import annotations

import pytest
import torch

from shrank.measuring import timing
from shrank.measuring.timing import Timing, cache_bytes, copies_beyond_cache, summary, time_in_turns


def test_candidates_take_turns_after_one_warm_up_each() -> None:
    order = []
    calls = {"a": [lambda: order.append("a")], "b": [lambda: order.append("b1"), lambda: order.append("b2")]}
    found = time_in_turns(calls, "cpu", rounds=2)
    assert order == ["a", "b1", "b2"] * 3
    assert found.keys() == {"a", "b"} and all(timing.seconds > 0 for timing in found.values())


def test_seconds_are_per_call_and_the_warm_up_does_not_count(monkeypatch) -> None:
    elapsed = iter([99.0, 8.0, 4.0, 6.0])
    monkeypatch.setattr(timing, "_called", lambda calls, device, held: lambda: next(elapsed))
    assert time_in_turns({"a": [print, print]}, "cpu", rounds=3)["a"] == Timing(3.0, 1 / 3)


def test_summary_is_the_median_and_the_quartiles_over_it() -> None:
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 2 / 3)
    assert summary([2.0]) == Timing(2.0, 0.0)


def test_copies_take_twice_the_cache() -> None:
    cache = cache_bytes("cpu")
    assert cache >= 1 << 20
    assert copies_beyond_cache(cache // 4, "cpu") in (8, 9) and copies_beyond_cache(100 * cache, "cpu") == 2


def test_a_cache_of_unknown_size_is_assumed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(timing, "_L3", tmp_path / "size")
    assert cache_bytes("cpu") == 32 << 20
    (tmp_path / "size").write_text("512K\n")
    assert cache_bytes("cpu") == 512 << 10


@pytest.mark.gpu
def test_a_graph_runs_every_call_once_per_round() -> None:
    number = torch.zeros(1, device="cuda")
    add = lambda: number.add_(1)  # noqa: E731
    time_in_turns({"a": [add] * 10}, "cuda", rounds=3)
    assert number.item() == 2 + 10 * 4  # twice before the capture, then the warm-up and three rounds
