"""Hidden units removed between two linear maps, and the second one fitted again to those that stay.

Of units h with second moment C and a matrix W after them, those in S stay. The best W' for them is W C[:, S]
C[S, S]^-1, whatever the outputs are weighted by, and it makes of W' h the regression of W h on what is left. Removing
one more unit j then adds ||R W'_j||^2 / (C[S, S]^-1)_jj to the squared error, with R R the gradients' moment: the step
of the optimal brain surgeon (Hassibi and Stork, 1993), for whole columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Columns
from .svd import FactorizationError

# Rows of downdates that are applied together, as products of matrices. 1536 units on one core of an AVX2 CPU take 2.5,
# 2.0 and 1.7 s with 16, 64 and 128.
_TOGETHER = 128


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go, each at the least cost of those then left.

    order (removed,): their numbers. errors (units + 1,): the squared error by how many units stay; infinite for fewer
    than were asked for, `errors[0]` that of nothing.
    """

    order: Tensor
    errors: Tensor

    @property
    def units(self) -> int:
        return len(self.errors) - 1

    def kept(self, width: int) -> Tensor:
        """The numbers of the units that stay, ascending."""
        gone = self.order.new_zeros(self.units, dtype=torch.bool)
        gone[self.order[: self.units - width]] = True
        return (~gone).nonzero()[:, 0]


@dataclass(frozen=True)
class Refit:
    """The matrix (N, width) on the units that stay; what a bias, if there is one, must gain to keep the mean output
    (N,); and the relative error of the outputs."""

    matrix: Tensor
    shift: Tensor | None
    output_error: float


def eliminate(columns: Columns, least: int = 1) -> Elimination:
    """Remove units one after another until `least` are left, on the matrices in float64 of `columns`.

    Raises FactorizationError on NaN, infinity or moments that are not positive definite.
    """
    inverse, worth = _inverse(columns.data), columns.worth.clone()
    units = len(worth)
    errors = worth.new_full((units + 1,), torch.inf)
    errors[units], errors[0] = 0.0, (columns.worth * columns.data).sum().clamp_min(0)
    left, order = torch.arange(units, device=worth.device), []
    while (removable := len(left) - least) > 0:
        gone, costs, inverse, worth = _some_removed(inverse, worth, min(_TOGETHER, removable))
        order.append(left[gone])
        errors[len(left) - 1 - torch.arange(len(gone), device=left.device)] = errors[len(left)] + costs.cumsum(0)
        left = left[_others(gone, len(left))]
    return Elimination(torch.cat(order) if order else left[:0], errors)


def fitted(columns: Columns, kept: Tensor) -> Tensor:
    """The best matrix (N, width) on the units that stay; raises FactorizationError as `eliminate`."""
    C = columns.data
    factor, info = torch.linalg.cholesky_ex(C[kept][:, kept])
    if info.item():
        raise FactorizationError("the moments of the units that stay are not positive definite")
    return torch.cholesky_solve(C[kept] @ columns.goal.mT, factor).mT.contiguous()


def refit(columns: Columns, kept: Tensor) -> Refit:
    """As `fitted`, with all that comes of it."""
    W, C, matrix = columns.goal, columns.data, fitted(columns, kept)
    lost = W.clone()
    lost[:, kept] -= matrix
    energies = [((m @ C) * m).sum().clamp_min(0).item() for m in (lost, W)]
    shift = None
    if columns.mean is not None:
        shift = lost @ columns.mean
        shift = shift if columns.shift is None else shift + columns.shift
    return Refit(matrix, shift, (energies[0] / energies[1]) ** 0.5 if energies[1] else 0.0)


def _inverse(positive: Tensor) -> Tensor:
    if not bool(positive.isfinite().all()):
        raise FactorizationError("what its units do holds NaN or infinity")
    factor, info = torch.linalg.cholesky_ex(positive)
    if info.item():
        raise FactorizationError("the moments of its units are not positive definite")
    return torch.cholesky_inverse(factor)


def _some_removed(inverse: Tensor, worth: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """So many units removed: which, what each cost, and both matrices of the others.

    With p the row of the inverse P at the unit j, r = p / p_j and a the row of W'^T G W', all of what is left by then:
    P loses p r^T, and W' its column j times r. The rows before count through what they left (`p`, `r`, `b`).
    """
    units = len(worth)
    p, r, b = (worth.new_empty(number, units) for _ in range(3))
    variances, energies = inverse.diagonal().clone(), worth.diagonal().clone()
    gone, costs = [], []
    for t in range(number):
        cost = energies / variances
        j = int(cost.argmin())
        costs.append(cost[j].clamp_min(0))
        gone.append(j)
        torch.addmv(inverse[j], r[:t].mT, p[:t, j], alpha=-1, out=p[t])
        torch.div(p[t], p[t, j], out=r[t])
        row = worth[j] - b[:t, j] @ r[:t] - r[:t, j] @ b[:t]
        torch.sub(row, r[t], alpha=row[j].item() / 2, out=b[t])
        variances.addcmul_(p[t], r[t], value=-1)
        energies.addcmul_(b[t], r[t], value=-2)
        energies[j], variances[j] = torch.inf, 1.0
    rest = _others(torch.tensor(gone, device=worth.device), units)
    p, r, b = p[:, rest], r[:, rest], b[:, rest]
    inverse = inverse[rest][:, rest].addmm_(p.mT, r, alpha=-1)
    worth = worth[rest][:, rest].addmm_(b.mT, r, alpha=-1).addmm_(r.mT, b, alpha=-1)
    return torch.tensor(gone, device=worth.device), torch.stack(costs), inverse, worth


def _others(gone: Tensor, units: int) -> Tensor:
    mask = torch.ones(units, dtype=torch.bool, device=gone.device)
    mask[gone] = False
    return mask.nonzero()[:, 0]
