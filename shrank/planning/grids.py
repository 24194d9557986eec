"""On what grids a budget may round weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..linalg import Grid


@dataclass(frozen=True)
class Grids:
    """On what grids weights may be rounded, and by how many ranks be corrected."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    correction_ranks: tuple[int, ...]

    def of(self, columns: int, whole: int | None = None) -> list[Grid]:
        """Those whose groups divide rows of so many weights: of 8 bits whole rows, of fewer such groups, or where there
        are none whole rows.

        whole: the length of a row, of which a group is called the row.
        """
        sizes = [None if size == whole else size for size in self.group_sizes if columns % size == 0] or [None]
        return [Grid(bits, size) for bits in self.bits for size in ([None] if bits == 8 else sizes)]
