"""The rule by which an answer of a kernel is right: that of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..util.closeness import distance, stray_elements


class Truth:
    """What a function of tensors must give, which names its results: in fp64 and as PyTorch computes in their dtype."""

    def __init__(self, compute: Callable[..., NamedTuple], given: tuple) -> None:
        self.exact = compute(*(each.double() if _is_floating(each) else each for each in given))
        self.plain = compute(*given)

    def what_is_wrong(self, found: NamedTuple) -> str:
        """With the results of a kernel, by the rule of the tests; "" if nothing is."""
        for name, one, two, three in zip(found._fields, found, self.exact, self.plain, strict=True):
            if far := distance(one, two, three) or stray_elements(one, two):
                return f"{name} has {far}"
        return ""


def _is_floating(given: object) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()
