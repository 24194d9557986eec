"""Every way to compute a problem, tried once in a process of its own: a broken kernel ends it, or its use of the card.

Its family was checked before it is used at all, but not on each of its tiles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from ..ops.apart import SECONDS, begin, run_apart, say
from ..ops.truth import Truth
from .tuning_problem import Problem
from .ways import failure, ways

_DONE = "done"
Faults = dict[tuple[str, str], str]  # what ended the process, by key and way


def answer(device: str) -> None:
    """In the process of its own: try the ways of the problems on standard input, but those that ended one before."""
    given = json.load(sys.stdin)
    begin(device)
    ended = {tuple(each) for each in given["ended"]}
    for key, numbers in given["problems"].items():
        try:
            _try_all(Problem(key, numbers), device, ended)
        except torch.OutOfMemoryError:  # which the process that measures meets too, and tells
            continue
    say(_DONE)


def _try_all(problem: Problem, device: str, ended: set[tuple]) -> None:
    arguments = problem.arguments(device)
    truth = Truth(problem.op.by_pytorch, arguments)
    for way in ways(problem.op, arguments):
        if (problem.key, str(way)) in ended:
            continue
        say([problem.key, str(way)])
        if failure(problem.op, arguments, way, truth):
            torch.zeros(1, device=device).item()  # raises if the card answers this process no more


def faults(problems: Sequence[Problem], device: str) -> Faults:
    """The ways that end a process, and how. All that end none are safe to be checked and timed in this one.

    Raises NotMade where no way was reached.
    """
    found: Faults = {}
    given = {problem.key: problem.numbers for problem in problems}
    while True:
        values, end = run_apart(__name__, device, {"problems": given, "ended": list(found)}, SECONDS * (1 + len(given)))
        if values and values[-1] == _DONE:
            return found
        tried = [tuple(value) for value in values if isinstance(value, list) and len(value) == 2]
        if not tried or tried[-1] in found:
            raise RuntimeError(f"the ways to compute {', '.join(given)} cannot be tried on {device}: the process {end}")
        found[tried[-1]] = f"its check {end}"
