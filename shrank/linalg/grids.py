"""How the numbers of a layer are stored: in its dtype, or as small whole numbers with a scale for each group.

A grid is symmetric: a weight is a whole number times the scale of its group, without a zero point, as torchao and GPTQ
have it.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS = (3, 4, 8)
ONE_OF_BITS = "3, 4 or 8"
SCALE_BYTES = 2  # a scale is kept in 16 bits


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits` bits, and one scale for every `group_size` weights of a row, None: for a whole row.

    Raises:
        ValueError: There are no such whole numbers or groups.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be {ONE_OF_BITS}, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, or None for whole rows, got {self.group_size}")

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"/{self.group_size}" if self.group_size else "")

    @property
    def least(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def fits(self, columns: int) -> bool:
        """Whether groups divide rows of so many weights."""
        return self.group_size is None or columns % self.group_size == 0

    def groups(self, columns: int) -> int:
        """Scales of a row of so many weights; ValueError where groups do not divide it."""
        if not self.fits(columns):
            raise ValueError(f"groups of {self.group_size} do not divide rows of {columns} weights")
        return columns // self.group_size if self.group_size else 1

    def bytes(self, rows: int, columns: int) -> int:
        """Of a matrix on disk: the numbers packed, the scales in 16 bits."""
        return rows * (-(-columns * self.bits // 8) + SCALE_BYTES * self.groups(columns))


@dataclass(frozen=True)
class Storage:
    """How the weights of a layer are stored.

    Args:
        grid: That of the dense weight, or of both factors; None: in the dtype of the layer, or where it is corrected in
            whatever form another tool gave it.
        corrected: The dense weight stays, on the grid, and the factors add what it lost.
        factor_grid: That of the factors of a correction; None: in the dtype of the layer.
        activations: "int8": what weights on a grid multiply is rounded to 8 bits at every call; None: not.

    Raises:
        ValueError: A grid of factors that correct nothing, or activations of another kind or beside weights without a
            grid.
    """

    grid: Grid | None = None
    corrected: bool = False
    factor_grid: Grid | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations must be 'int8' or None, got {self.activations!r}")
        if self.activations and self.grid is None:
            raise ValueError("activations are rounded where they meet weights on a grid: give its grid")
        if self.factor_grid is not None and not self.corrected:
            raise ValueError("factor_grid is that of a correction; the grid of low-rank factors is grid")

    def __str__(self) -> str:
        """In a word, "" for the dtype of the layer."""
        factors = (f"+{self.factor_grid}" if self.factor_grid else "+") if self.corrected else ""
        grid = self.grid or ("quantized" if self.corrected else "")
        return f"{grid}{factors}" + (f" x {self.activations}" if self.activations else "")

    @property
    def of_factors(self) -> Grid | None:
        """The grid of the factors, if there are any."""
        return self.factor_grid if self.corrected else self.grid


AS_IT_IS = Storage()
