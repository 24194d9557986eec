"""The nearest right name."""

from __future__ import annotations

import pytest

from shrank.util.names import unknown

WANTED = ("exact", "randomized", "gram")


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("exat", "exact"),
        ("EXACT", "exact"),
        ("randomised", "randomized"),
        ("grams", "gram"),
        ("svd", "randomized"),
        ("qq", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_asked_for(found: str, meant: str | None) -> None:
    error = unknown("solver", found, WANTED, {"svds": "randomized"})
    asked = f"; did you mean {meant}?" if meant else ""
    assert str(error) == f"solver is {found!r}, wanted one of exact, randomized, gram{asked}"
    assert type(error) is ValueError


def test_names_are_compared_as_the_caller_says() -> None:
    spaced = unknown("gpu", "rtx4090d", ["RTX 4090"], plain=lambda name: name.lower().replace(" ", ""))
    assert str(spaced).endswith("did you mean RTX 4090?")
