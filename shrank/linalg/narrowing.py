"""Units removed between two linear maps, and the second one fitted again to those that stay.

Of units h with second moment C and a matrix W after them, those in S stay. The best W' for them is W C[:, S]
C[S, S]^-1, whatever the outputs are weighted by, and it makes of W' h the regression of W h on what is left. Removing
one more unit j then adds ||R W'_j||^2 / (C[S, S]^-1)_jj to the squared error, with R R the gradients' moment: the step
of the optimal brain surgeon (Hassibi and Stork, 1993), for whole columns. Of a unit with several columns J that is
tr(((C[S, S]^-1)_JJ)^-1 W'_J^T R R W'_J).
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


def eliminate(columns: Columns, least: int = 1, units: Tensor | None = None) -> Elimination:
    """Remove units one after another until `least` are left, on the matrices in float64 of `columns`.

    units (units, columns of each): which columns are of which unit; None: each is one.
    Raises FactorizationError on NaN, infinity or moments that are not positive definite.
    """
    if units is not None and units.shape[1] > 1:
        return _eliminate_several(columns, least, units.to(columns.data.device))
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
    """The best matrix of the layer on the columns that stay, which are ascending; raises FactorizationError as
    `eliminate`."""
    return _of_layer(_fitted(columns, kept), columns)


def refit(columns: Columns, kept: Tensor) -> Refit:
    """As `fitted`, with all that comes of it."""
    W, C, matrix = columns.goal, columns.data, _fitted(columns, kept)
    lost = W.clone()
    lost[:, kept] -= matrix
    energies = [((m @ C) * m).sum().clamp_min(0).item() for m in (lost, W)]
    shift = None
    if columns.mean is not None:
        shift = (lost @ columns.mean).unflatten(0, (-1, columns.taps)).sum(1)
        shift = shift if columns.shift is None else shift + columns.shift
    return Refit(_of_layer(matrix, columns), shift, (energies[0] / energies[1]) ** 0.5 if energies[1] else 0.0)


def _fitted(columns: Columns, kept: Tensor) -> Tensor:
    C = columns.data
    factor, info = torch.linalg.cholesky_ex(C[kept][:, kept])
    if info.item():
        raise FactorizationError("the moments of the units that stay are not positive definite")
    return torch.cholesky_solve(C[kept] @ columns.goal.mT, factor).mT


def _of_layer(matrix: Tensor, columns: Columns) -> Tensor:
    """With the taps of one input after another, as kernels have them."""
    return matrix.unflatten(0, (-1, columns.taps)).mT.flatten(1).contiguous()


def _eliminate_several(columns: Columns, least: int, units: Tensor) -> Elimination:
    """As `eliminate`, of units that all have so many columns; these in the order of the units meanwhile."""
    order, each = units.flatten(), units.shape[1]
    inverse, worth = _inverse(columns.data)[order][:, order], columns.worth[order][:, order]
    errors = worth.new_full((len(units) + 1,), torch.inf)
    errors[-1], errors[0] = 0.0, (columns.worth * columns.data).sum().clamp_min(0)
    left, gone = torch.arange(len(units), device=worth.device), []
    while len(left) > least:
        own, energies = (m.unflatten(0, (-1, each)).unflatten(2, (-1, each)) for m in (inverse, worth))
        own, energies = (m.diagonal(dim1=0, dim2=2).movedim(-1, 0) for m in (own, energies))
        costs = torch.linalg.solve(own, energies).diagonal(dim1=1, dim2=2).sum(1)
        j = int(costs.argmin())
        errors[len(left) - 1] = errors[len(left)] + costs[j].clamp_min(0)
        inverse, worth = _group_removed(inverse, worth, j * each, each)
        gone.append(left[j])
        left = torch.cat((left[:j], left[j + 1 :]))
    return Elimination(torch.stack(gone) if gone else left[:0], errors)


def _group_removed(inverse: Tensor, worth: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
    """Both matrices of the other columns, without so many from the first on.

    With R = (P_JJ)^-1 P_J of the inverse P, P loses P_J^T R, and W' its columns J times R.
    """
    inside = torch.arange(first, first + number, device=worth.device)
    rest = _others(inside, len(worth))
    onto = torch.linalg.solve(inverse[inside][:, inside], inverse[inside][:, rest])
    half = worth[inside][:, rest] - worth[inside][:, inside] @ onto / 2
    inverse = inverse[rest][:, rest].addmm_(inverse[rest][:, inside], onto, alpha=-1)
    worth = worth[rest][:, rest].addmm_(onto.mT, half, alpha=-1).addmm_(half.mT, onto, alpha=-1)
    return inverse, worth


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
