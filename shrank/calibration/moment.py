"""A second moment in the making."""

from __future__ import annotations

import torch
from torch import Tensor

from ..util.processes import current
from .sharing import ROWS_IN_FLOAT32


class Moment:
    """Sum of x x^T over rows x, or of t x^T with other rows t beside them, for every group of features.

    Its memory is taken before the run: between activations it would keep some of these, once freed, from going back to
    the system.
    """

    def __init__(self, groups: int, side: int, device: torch.device) -> None:
        self.rows = 0
        self._recent: Tensor | None = torch.zeros(groups, side, side, device=device)
        self._total: Tensor | None = None
        self._mean: Tensor | None = None

    def add(self, rows: Tensor, others: Tensor | None = None) -> None:
        """rows, others: (G, T, m), float32."""
        if self._mean is not None:
            raise RuntimeError("the mean of this moment was taken: nothing can be added to it")
        if not self.rows:
            self._recent = self._recent.to(rows.device)  # that of an offloaded layer is known only now
        self._recent.baddbmm_((rows if others is None else others).mT, rows)
        before, self.rows = self.rows, self.rows + rows.shape[1]
        if before // ROWS_IN_FLOAT32 != self.rows // ROWS_IN_FLOAT32:
            recent = self._recent.double()
            self._total = recent if self._total is None else self._total.add_(recent)
            self._recent.zero_()

    def add_up(self, rows: int) -> None:
        """Over the processes that each saw a share of all these rows."""
        self.rows = rows
        if rows:
            total = self._recent.double() if self._total is None else self._total.add_(self._recent)
            self._recent = self._total = None
            self._mean = current().summed(total).div_(rows).float()

    def is_finite(self) -> Tensor:
        return (self._recent if self._mean is None else self._mean).diagonal(dim1=-2, dim2=-1).sum().isfinite()

    def take_mean(self) -> Tensor:
        """Over the rows, float32, zero without any. It takes the place of the sum: nothing can be added any more."""
        if self._mean is None:
            total = self._recent if self._total is None else self._total.add_(self._recent)
            self._recent = self._total = None
            self._mean = total.div_(max(self.rows, 1)).float()
        return self._mean
