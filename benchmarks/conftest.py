"""Fixed threads, and a table of the ratios at the end of the run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.turns import THREADS

_ratios: list[str] = []


@pytest.fixture(autouse=True)
def fixed_threads():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture
def report(request, benchmark):
    """Note a figure, and the bar it should meet, in the benchmark's JSON and in the closing table."""

    def note(name: str, value: float, bar: str) -> None:
        benchmark.extra_info[name] = value
        _ratios.append(f"{request.node.name:45} {name:40} {value:10.3f}   bar: {bar}")

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    if _ratios:
        terminalreporter.section(f"ratios, medians of turns, {THREADS} threads")
        for line in _ratios:
            terminalreporter.write_line(line)
