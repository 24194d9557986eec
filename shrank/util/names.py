"""Names that a user may mistype: the error says which right one is nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import TypeVar

T = TypeVar("T", bound=Callable)

_LEAST_LIKENESS = 0.5  # of difflib, between 0 and 1: "fp8" is still near to "fp16", "abacus" to no GPU


def unknown(
    what: str,
    found: str,
    wanted: Iterable[str],
    also: Mapping[str, str] | None = None,
    plain: Callable[[str], str] = str.lower,
) -> ValueError:
    """The error for a name that is none of `wanted`: it lists them, and asks whether the nearest was meant.

    also: other spellings, and the wanted name that each stands for. plain: what is left of a name to compare.
    """
    wanted = list(wanted)
    return ValueError(f"{what} is {found!r}, wanted one of {', '.join(wanted)}{meant(found, wanted, also, plain)}")


def meant(
    found: str, wanted: Iterable[str], also: Mapping[str, str] | None = None, plain: Callable[[str], str] = str.lower
) -> str:
    """The end of an error that asks whether the nearest of `wanted` was meant; '' if none is near."""
    stands_for = {plain(name): name for name in wanted} | {plain(name): right for name, right in (also or {}).items()}
    near = get_close_matches(plain(found), stands_for, n=1, cutoff=_LEAST_LIKENESS)
    return f"; did you mean {stands_for[near[0]]}?" if near else ""


def checks_keywords(called: T) -> T:
    """For a function, or a class by what it is made of: the TypeError for a keyword that it does not take names the
    nearest that it does."""
    function = called.__init__ if isinstance(called, type) else called
    known = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name != "self"
    ]

    @wraps(function)
    def checked(*args: object, **given: object) -> object:
        for name in given:
            if name not in known:
                raise unknown_keyword(called.__name__, name, known)
        return function(*args, **given)

    if not isinstance(called, type):
        return checked
    called.__init__ = checked
    return called


def unknown_keyword(
    function: str, found: str, known: Iterable[str], also: Mapping[str, str] | None = None
) -> TypeError:
    """The error for a keyword that a function does not take; also: other spellings, and what each stands for."""
    known = sorted(known)
    return TypeError(
        f"{function}() has no option {found!r}{meant(found, known, also) or ': it has ' + ', '.join(known)}"
    )
