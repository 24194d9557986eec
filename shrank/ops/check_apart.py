"""The check of the kernels in a process of its own, which a broken one may end."""

from __future__ import annotations

import sys

import torch

from .apart import SHORT_OF_MEMORY, begin, run_apart, say
from .probes import Results, check, names


def answer(device: str) -> None:
    """In the process of its own: check a device, and say each result when it is known."""
    begin(device)
    try:
        for result in check(device):
            say(result)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{SHORT_OF_MEMORY}: {error}")


def checked_apart(device: str) -> Results:
    """Check in a process of its own. The kernel that ends it is wrong, and those that it kept from running are too.

    Raises NotMade where no kernel was reached, or memory was short.
    """
    values, end = run_apart(__name__, device)
    results = results_of(values)
    ended_by = next((name for name in names() if name not in results), None)
    reasons = {ended_by: f"its check {end}"}
    return {
        name: results[name] if name in results else reasons.get(name, f"not reached: the check of {ended_by} {end}")
        for name in names()
    }


def results_of(values: list[object]) -> Results:
    """Those among all that was said."""
    known = set(names())
    pairs = [value for value in values if isinstance(value, list) and len(value) == 2]
    return {name: reason for name, reason in pairs if name in known}
