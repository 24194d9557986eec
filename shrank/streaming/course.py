"""Which units batches go through, and which of their outputs each depends on, read off the graph that automatic
differentiation makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

# A tensor among those that a unit returned: the unit's name, the number of the tensor.
Leaf = tuple[str, int]
END = ""  # in the place of a unit: what comes after the last


@dataclass
class Course:
    """The units that each batch went through, in order, and the leaves that each unit, or the END, depends on."""

    orders: list[list[str]]
    needs: dict[str, set[Leaf]] = field(default_factory=dict)

    def of(self, unit: str) -> set[Leaf]:
        return self.needs.setdefault(unit, set())

    def is_last(self, unit: str, number: int) -> bool:
        """Whether a batch goes from this unit to the end."""
        return self.orders[number][-1:] == [unit]

    def consumers(self, unit: str, number: int) -> list[str]:
        """The units of a batch's course that depend on this one, the last first; what comes after the last unit of all
        runs together with it."""
        order = self.orders[number]

        def depends(other: str) -> bool:
            needed = self.of(other) | (self.of(END) if other == order[-1] else set())
            return any(leaf[0] == unit for leaf in needed)

        return [other for other in reversed(order[order.index(unit) + 1 :]) if depends(other)]


def behind(tensors: Iterable[Tensor], names: dict[int, Leaf]) -> set[Leaf]:
    """The leaves, by their ids, that tensors were computed from."""
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            found.add(name)
        nodes += [inner for inner, _ in node.next_functions if inner is not None]
    return found
