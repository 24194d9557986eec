"""Pivoted storage: a matrix of rank R in R (K + N - R) numbers instead of R (K + N), with no loss.

R of its rows, the pivots, span the others: W' = [I; T] W'_P up to the order of the rows, so W'_P (R, K) and
T (N - R, R) say all (PIFA, Zhao et al., ICML 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Factors
from .weighted import rounded

# Rounding of the pivots grows by at most 1 / (smallest singular value of their rows of an orthonormal `up`). Rows in
# one piece need no gather, which costs a linear layer up to half its time on a CPU (benchmarks/speed/bench_pivots.py);
# they are taken where the growth times the dtype's unit stays below this. In float32 that is 1000; the best windows of
# all-MiniLM-L6-v2 and SmolLM2 have 74 to 591. What a rank cuts off is a thousand times as much.
_TOLERATED_ROUNDING = 6e-5
_WINDOWS = 16
# Rows are exchanged until no entry of T exceeds this (Goreinov et al., 2010: a maximal volume has 1).
_LARGEST_ENTRY = 1.5


@dataclass(frozen=True)
class PivotedFactors:
    """down (G, R/G, K/G): the pivots' rows; up (G, (N - R)/G, R/G): the other rows in terms of these.

    order (N,), int32: for every output, its place among all pivots, group by group, and then all others. growth: by
    how much rounding of the pivots grows at most.
    """

    down: Tensor
    up: Tensor
    order: Tensor
    growth: float


def pivoted(factors: Factors) -> PivotedFactors:
    """The same matrices with pivots: in one window of rows if the dtype bears it, else chosen one by one."""
    dtype, (G, N, R) = factors.up.dtype, factors.up.shape
    up, triangle = torch.linalg.qr(factors.up.double())
    down = triangle @ factors.down.double()
    pivots = torch.stack([_window(group, torch.finfo(dtype).eps) if G == 1 else _rows(group) for group in up])
    others = torch.stack([_complement(N, rows) for rows in pivots])
    own, rest = up.gather(1, pivots[..., None].expand(-1, -1, R)), up.gather(1, others[..., None].expand(-1, -1, R))
    T = torch.linalg.solve(own.mT, rest.mT).mT.to(dtype)
    given = T.double()
    # The rows that fit best once T is rounded; without rounding, the pivots' own.
    eye = torch.eye(R, dtype=given.dtype, device=given.device)
    fitted = torch.linalg.solve(eye + given.mT @ given, (own + given.mT @ rest) @ down).to(dtype)
    growth = 1.0 / torch.linalg.svdvals(own).min().item()
    return PivotedFactors(fitted.contiguous(), T.contiguous(), _order(pivots, others), growth)


def unpivoted(found: PivotedFactors) -> Factors:
    """The same matrices with plain factors, `up` with orthonormal columns: training moves all outputs alike, where a
    change of a pivot moves others by up to `growth` times as much."""
    G, R, _ = found.down.shape
    own = torch.eye(R, dtype=torch.float64, device=found.up.device).expand(G, R, R)
    by_place = torch.cat((own.flatten(0, 1), found.up.double().flatten(0, 1)))
    up, triangle = torch.linalg.qr(by_place[found.order.long()].unflatten(0, (G, -1)))
    up, down = rounded(up, triangle @ found.down.double(), found.up.dtype)
    return Factors(down, up, 0.0, 1.0)


def _window(up: Tensor, eps: float) -> Tensor:
    """The first of a few windows of rows, those at either end before others, that is good enough; else rows chosen one
    by one."""
    N, R = up.shape
    first, *between, last = sorted({round(i * (N - R) / (_WINDOWS - 1)) for i in range(_WINDOWS)} | {N - R})
    for start in dict.fromkeys((first, last, *between)):
        rows = up[start : start + R]
        smallest = torch.linalg.eigvalsh(rows.mT @ rows)[0].clamp_min(0).sqrt().item()
        if smallest * _TOLERATED_ROUNDING >= eps:
            return torch.arange(start, start + R, device=up.device)
    return _rows(up)


def _rows(up: Tensor) -> Tensor:
    """R rows of an orthonormal (N, R) whose multiples with small factors are all the others, ascending."""
    N, R = up.shape
    rows = torch.arange(N, device=up.device)
    swaps = torch.linalg.lu_factor(up).pivots[:R].tolist()
    for i, swap in enumerate(swaps):
        rows[[i, swap - 1]] = rows[[swap - 1, i]]
    T = torch.linalg.solve(up[rows[:R]].mT, up[rows[R:]].mT).mT
    for _ in range(2 * R):
        if not T.numel() or T.abs().max() <= _LARGEST_ENTRY:
            break
        i, j = divmod(int(T.abs().argmax()), R)
        rows[[R + i, j]] = rows[[j, R + i]]
        T = _exchanged(T, i, j)
    return rows[:R].sort().values


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
