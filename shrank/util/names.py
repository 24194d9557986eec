"""Names that a user may mistype: the error says which right one is nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

_LEAST_LIKENESS = 0.5  # of difflib, between 0 and 1: "fp8" is still near to "fp16", "abacus" to no GPU


def unknown(what: str, found: str, wanted: Iterable[str], also: Mapping[str, str] | None = None,
            plain: Callable[[str], str] = str.lower) -> ValueError:
    """The error for a name that is none of `wanted`: it lists them, and asks whether the nearest was meant.

    also: other spellings, and the wanted name that each stands for. plain: what is left of a name to compare.
    """
    wanted = list(wanted)
    return ValueError(f"{what} is {found!r}, wanted one of {', '.join(wanted)}{meant(found, wanted, also, plain)}")


def meant(found: str, wanted: Iterable[str], also: Mapping[str, str] | None = None,
          plain: Callable[[str], str] = str.lower) -> str:
    """The end of an error that asks whether the nearest of `wanted` was meant; '' if none is near."""
    stands_for = {plain(name): name for name in wanted} | {plain(name): right for name, right in (also or {}).items()}
    near = get_close_matches(plain(found), stands_for, n=1, cutoff=_LEAST_LIKENESS)
    return f"; did you mean {stands_for[near[0]]}?" if near else ""
