"""The part of a layer that a server's process computes: filled from files, tensor by tensor, and run by the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.seal import DENSE_NAME, is_seal
from ..ops.dispatch import low_rank_linear, low_rank_linear_multi, low_rank_pivoted
from .shares import Share

DOWN, UP, BIAS = "led_unit.0.weight", "led_unit.1.weight", "led_unit.1.bias"
ORDER, PIVOT_BIAS = "led_unit.2.order", "led_unit.2.bias"
FACTORS = (DOWN, UP, BIAS, ORDER, PIVOT_BIAS)  # what files call the tensors of a low-rank layer


class Piece(nn.Module):
    """One layer's share: `weight`, or `down` and `up`, and `order` where the outputs of pivots are put in place.

    Pivots are kept where all rows are here; else their rows are part of `up`.
    """

    def __init__(self, share: Share, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.share = share
        self.expected = _expected(share, bias)
        self.read: dict[str, Tensor] = {}
        self.is_complete = False
        inputs, outputs, rank = share.columns.count, share.outputs, share.rank
        self.keeps_pivots = share.is_pivoted and share.has_all_rows
        if rank is None:
            self.weight = _empty(outputs, inputs, dtype=dtype)
            return
        self.down = _empty(rank, inputs, dtype=dtype)
        self.up = _empty(outputs - (rank if self.keeps_pivots else 0), rank, dtype=dtype)
        if self.keeps_pivots:
            self.order = nn.Parameter(torch.arange(outputs, dtype=torch.int32), requires_grad=False)

    def take(self, name: str, value: Tensor) -> Tensor | None:
        """Read a tensor of the whole layer, named as in files; with the last one, the layer's bias here if it has one.

        Raises:
            ValueError: The layer has no such tensor, or not of this shape.
        """
        fqn = self.share.fqn
        if name == DENSE_NAME and self.share.rank is not None and is_seal(value):
            return None
        if name not in self.expected:
            raise ValueError(
                f"{fqn}.{name}: the files hold it, and the plan says that the layer is "
                + ("dense" if self.share.rank is None else f"{self.share.planned.shape} of rank {self.share.rank}")
                + (" without a bias" if name in (BIAS, PIVOT_BIAS) else "")
            )
        if tuple(value.shape) != self.expected[name]:
            raise ValueError(f"{fqn}.{name}: is {tuple(value.shape)} in the files, wanted {self.expected[name]}")
        self.read[name] = value
        return self._fill() if self.read.keys() == self.expected.keys() else None

    @property
    def missing(self) -> list[str]:
        """Names of tensors that were not read."""
        return [] if self.is_complete else [f"{self.share.fqn}.{n}" for n in self.expected if n not in self.read]

    @torch.no_grad()
    def _fill(self) -> Tensor | None:
        share, read = self.share, self.read
        self.read, self.is_complete = {}, True
        if share.rank is None:
            self.weight.copy_(share.columns_of(share.rows_of(read[DENSE_NAME])))
            return None
        self.down.copy_(share.columns_of(read[DOWN]))
        if not share.is_pivoted:
            self.up.copy_(share.rows_of(read[UP]))
            return share.rows_of(read[BIAS]) if BIAS in read else None
        order = read[ORDER].long()
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(f"{share.fqn}.{ORDER}: is no permutation of {len(order)} outputs")
        if self.keeps_pivots:
            self.up.copy_(read[UP])
            self.order.copy_(order)
        else:
            own = torch.eye(share.rank, dtype=read[UP].dtype, device=read[UP].device)
            self.up.copy_(share.rows_of(torch.cat((own, read[UP]))[order]))
        return share.rows_of(torch.cat((read[PIVOT_BIAS], read[BIAS]))[order]) if BIAS in read else None

    def dense_weight(self) -> Tensor:
        """The share of the dense weight: (outputs, inputs)."""
        if self.share.rank is None:
            return self.weight
        product = self.up @ self.down
        return torch.cat((self.down, product)).index_select(0, self.order) if self.keeps_pivots else product


def run(pieces: Sequence[Piece], x: Tensor, bias: Tensor | None) -> Tensor:
    """What the pieces make of x, one after the other in the last dimension: (..., outputs).

    bias: (outputs,) of all pieces.
    """
    biases = [None] * len(pieces) if bias is None else bias.split([piece.share.outputs for piece in pieces])
    found = _factors_together(pieces, x, biases)
    for number, (piece, own) in enumerate(zip(pieces, biases, strict=True)):
        if piece.share.rank is None:
            found[number] = F.linear(x, piece.weight, own)
        elif piece.keeps_pivots and own is not None:
            found[number] = found[number] + own  # of outputs in order
    return found[0] if len(found) == 1 else torch.cat([found[number] for number in range(len(pieces))], -1)


def _factors_together(pieces: Sequence[Piece], x: Tensor, biases: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """The outputs of the pieces with two factors, by number, without the bias of pivoted ones: of several by one op."""
    numbers = [n for n, piece in enumerate(pieces) if piece.share.rank is not None]
    stored = [_stored(pieces[n], biases[n]) for n in numbers]
    if len(stored) == 1:
        (down, up, bias, _, order), (n,) = stored[0], numbers
        return {n: low_rank_linear(x, down, up, bias) if order is None else low_rank_pivoted(x, down, up, order)}
    return dict(zip(numbers, low_rank_linear_multi(x, *zip(*stored, strict=True)), strict=True)) if stored else {}


def _stored(piece: Piece, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """down, up, bias, pivots and order, as the op of several layers takes them."""
    if piece.keeps_pivots:
        return piece.down, piece.up, None, None, piece.order
    return piece.down, piece.up, bias, None, None


def _empty(*size: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


def _expected(share: Share, bias: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of the whole layer in files, by name, with their shapes."""
    (N, K), R = share.whole, share.rank
    if R is None:
        return {DENSE_NAME: (N, K)}
    others = N - R if share.is_pivoted else N
    expected: dict[str, tuple[int, ...]] = {DOWN: (R, K), UP: (others, R)}
    if share.is_pivoted:
        expected[ORDER] = (N,)
    if bias:
        expected[BIAS] = (others,)
    if bias and share.is_pivoted:
        expected[PIVOT_BIAS] = (R,)
    return expected
