"""Pivoted storage: a matrix of rank R in R (K + N - R) numbers instead of R (K + N), with no loss.

R of its rows, the pivots, span the others: W' = [I; T] W'_P up to the order of the rows, so W'_P (R, K) and
T (N - R, R) say all (PIFA, Zhao et al., ICML 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Factors
from .svd import FactorizationError
from .weighted import rounded

# What rounding adds to a pivot, another output has as many times as its entry of T says. Rows are given up until R are
# left, this share of the superfluous ones at a time. By int8 of all-MiniLM-L6-v2 at keep 0.8 the pivots left so lose
# 0.0046 of its cosine, those of LU with exchanges until no entry exceeds 1.5 0.0077, windows of rows, which need no
# gather, 0.107, and plain factors 0.0016 (benchmarks/quality/rounding.py).
_SHARE = 8
# Rows that are given up together must leave the volume at no less than this, each in turn.
_SMALLEST_PIVOT = 0.1
# Rows are exchanged until no entry of T exceeds this (Goreinov et al., 2010: a maximal volume has 1).
_LARGEST_ENTRY = 2.0


@dataclass(frozen=True)
class PivotedFactors:
    """down (G, R/G, K/G): the pivots' rows; up (G, (N - R)/G, R/G): the other rows in terms of these.

    order (N,), int32: for every output, its place among all pivots, group by group, and then all others. growth: by
    how much rounding of the pivots grows at most. rounding: how far rounding took the matrices away, over their norm.
    """

    down: Tensor
    up: Tensor
    order: Tensor
    growth: float
    rounding: float = 0.0


def pivoted(factors: Factors, dtype: torch.dtype | None = None) -> PivotedFactors:
    """The same matrices with pivots, stored in `dtype`, by default the factors' own."""
    dtype, (_, N, R) = dtype or factors.up.dtype, factors.up.shape
    up, triangle = torch.linalg.qr(factors.up.double())
    down = triangle @ factors.down.double()
    pivots = torch.stack([_rows(group) for group in up])
    others = torch.stack([_complement(N, rows) for rows in pivots])
    own, rest = up.gather(1, pivots[..., None].expand(-1, -1, R)), up.gather(1, others[..., None].expand(-1, -1, R))
    T = torch.linalg.solve(own.mT, rest.mT).mT.to(dtype)
    given = T.double()
    # The rows that fit best once T is rounded, whatever the norm of the inputs; without rounding, the pivots' own.
    eye = torch.eye(R, dtype=given.dtype, device=given.device)
    to_own = torch.linalg.solve(eye + given.mT @ given, own + given.mT @ rest)
    fitted = (to_own @ down).to(dtype)
    if not bool(fitted.isfinite().all()):
        raise FactorizationError(f"the pivots do not fit {str(dtype).removeprefix('torch.')}")
    growth = 1.0 / torch.linalg.svdvals(own).min().item()
    lost = _distance((own, rest), down, given, fitted.double())
    return PivotedFactors(fitted.contiguous(), T.contiguous(), _order(pivots, others), growth, lost)


def unpivoted(found: PivotedFactors) -> Factors:
    """The same matrices with plain factors, `up` with orthonormal columns: training moves all outputs alike, where a
    change of a pivot moves others by up to `growth` times as much."""
    G, R, _ = found.down.shape
    own = torch.eye(R, dtype=torch.float64, device=found.up.device).expand(G, R, R)
    by_place = torch.cat((own.flatten(0, 1), found.up.double().flatten(0, 1)))
    up, triangle = torch.linalg.qr(by_place[found.order.long()].unflatten(0, (G, -1)))
    up, down = rounded(up, triangle @ found.down.double(), found.up.dtype)
    return Factors(down, up, 0.0, 1.0)


def _distance(parts: tuple[Tensor, Tensor], down: Tensor, T: Tensor, fitted: Tensor) -> float:
    """How far [1; T] fitted is from the parts of the rows of up @ down, over the norm of that, which is down's."""
    own, rest = parts
    lost = (own @ down - fitted).square().sum() + (rest @ down - T @ fitted).square().sum()
    whole = down.square().sum()
    return (lost / whole).sqrt().item() if whole > 0 else 0.0


def _rows(up: Tensor) -> Tensor:
    """R rows of an orthonormal (N, R) of which the others are small multiples, ascending."""
    (N, R), rows = up.shape, _left_rows(up)
    others = _complement(N, rows)
    T = torch.linalg.solve(up[rows].mT, up[others].mT).mT
    for _ in range(2 * R):
        if not T.numel() or T.abs().max() <= _LARGEST_ENTRY:
            break
        i, j = divmod(int(T.abs().argmax()), R)
        rows[j], others[i] = others[i].clone(), rows[j].clone()
        T = _exchanged(T, i, j)
    return rows.sort().values


def _left_rows(up: Tensor) -> Tensor:
    """R rows P of a small trace of (P^T P)^-1, the squares of [1; T]: rows are given up that it grows least by.

    Source: backward elimination, de Hoog and Mattheij (2007), by which the trace is at most R (N - R + 1).
    """
    R, rows = up.shape[1], torch.arange(len(up), device=up.device)
    left = dual = up  # dual: left (left^T left)^-1
    while len(left) > R:
        missing = 1 - (left * dual).sum(1)  # what is left of the volume without a row
        cost = dual.square().sum(1) / missing.clamp_min(torch.finfo(up.dtype).eps)
        gone = cost.topk(-(-(len(left) - R) // _SHARE), largest=False).indices
        without = torch.eye(len(gone), dtype=up.dtype, device=up.device) - dual[gone] @ left[gone].mT
        count = _missable(without)
        gone, without = gone[:count], without[:count, :count]
        stays = torch.ones(len(left), dtype=torch.bool, device=up.device)
        stays[gone] = False
        dual = torch.addmm(dual[stays], dual[stays] @ left[gone].mT, torch.linalg.solve(without, dual[gone]))
        left, rows = left[stays], rows[stays]
    return rows


def _missable(without: Tensor) -> int:
    """How many rows, from the first on, can be missed together: rows that stand in for each other cannot."""
    factor, failed = torch.linalg.cholesky_ex(without)
    enough = factor.diagonal().square() >= _SMALLEST_PIVOT
    if failed:
        enough[int(failed) - 1 :] = False
    return max(1, int(enough.cumprod(0).sum()))


def _exchanged(T: Tensor, i: int, j: int) -> Tensor:
    """T after its row i and pivot j changed places."""
    row, column, pivot = T[i].clone(), T[:, j].clone(), T[i, j].item()
    T = T - torch.outer(column, row) / pivot
    T[i], T[:, j] = -row / pivot, column / pivot
    T[i, j] = 1.0 / pivot
    return T


def _complement(N: int, rows: Tensor) -> Tensor:
    free = torch.ones(N, dtype=torch.bool, device=rows.device)
    free[rows] = False
    return free.nonzero()[:, 0]


def _order(pivots: Tensor, others: Tensor) -> Tensor:
    G, N = len(pivots), pivots.shape[1] + others.shape[1]
    offsets = torch.arange(G, device=pivots.device)[:, None] * N
    places = torch.cat([(pivots + offsets).flatten(), (others + offsets).flatten()])
    return places.argsort().int()
