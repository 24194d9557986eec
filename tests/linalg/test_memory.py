"""What a factorisation holds at a time: some matrices of the smaller side, and never the weight in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from shrank.linalg import Moments, factorize, factorize_weighted, metric, parts, spectrum, squared_errors
from tests.common.models import draw

_SIDE, _LONG = 128, 4096
_MATRIX = 8 * _SIDE**2  # bytes of one of the smaller side
_PART = 4  # such matrices that a part of a weight takes, beside which two of its size are held
_ALLOWED = (12 + 3 * _PART) * _MATRIX
assert _ALLOWED < 8 * _SIDE * _LONG  # what the weight alone would take


def most_held(run: Callable[[], object], file: Path) -> int:
    """The most bytes of tensors, work space of LAPACK among them, that lived at a time and began in the run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@pytest.mark.parametrize("anchored", [False, True], ids=["alone", "anchored"])
@pytest.mark.parametrize(("N", "K"), [(_LONG, _SIDE), (_SIDE, _LONG)], ids=["tall", "wide"])
def test_a_factorisation_takes_twelve_matrices_of_the_smaller_side(N, K, anchored, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "_NUMBERS", _PART * _SIDE**2)
    W, rows = draw(N, K)[None].bfloat16(), draw(300, _SIDE)
    moment = (rows.mT @ rows / 300)[None]
    seen = Moments(300, moment, rows.mean(0)[None], torch.ones(1, K), N > K, moment, 300)
    if anchored:
        seen = replace(seen, anchor=moment, anchor_mean=rows.mean(0)[None])

    def run() -> None:
        norm = metric(W, seen, centred=False)
        squared_errors(W, norm)
        factorize_weighted(W, norm, 100)

    factors = 2 * 100 * (N + K)
    assert most_held(run, tmp_path / "trace") - factors < _ALLOWED


@pytest.mark.parametrize(("N", "K"), [(_LONG, _SIDE), (_SIDE, _LONG)], ids=["tall", "wide"])
def test_so_it_is_without_data(N: int, K: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "_NUMBERS", _PART * _SIDE**2)
    W = draw(N, K)[None].bfloat16()
    most = most_held(lambda: (spectrum(W), factorize(W, 100)), tmp_path / "trace")
    assert most - 2 * 100 * (N + K) < _ALLOWED
