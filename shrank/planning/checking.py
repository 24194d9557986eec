"""Checks of numbers in plain data."""

from __future__ import annotations

from collections.abc import Iterable


def are_numbers(values: Iterable[object]) -> bool:
    """Whether these are all numbers, and no booleans."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def check_count(value: object, name: str, least: int = 0) -> None:
    """Raise ValueError, which says the name, unless this is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
