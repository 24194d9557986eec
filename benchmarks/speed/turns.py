"""How candidates are timed against each other: in turns, on a fixed number of threads."""

from __future__ import annotations

from collections.abc import Callable

from shrank.measuring.timing import time_in_turns

THREADS = 2


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, called in turns so that a change in the machine's load meets all alike."""
    timings = time_in_turns({name: [call] for name, call in candidates.items()}, "cpu", rounds)
    return {name: timing.seconds for name, timing in timings.items()}
