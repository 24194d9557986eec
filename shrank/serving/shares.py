"""What of a planned layer one process of a server holds: rows and columns, of layers that the server may stack.

Column-parallel layers hold rows of the up factor and all of the down factor; row-parallel ones columns of the down
factor and all of the up factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linalg import AS_IT_IS
from ..planning.plan import LayerPlan, RankPlan

SERVED = "Linear"  # the kind of layer that servers build


@dataclass(frozen=True)
class Slice:
    """Rows or columns that a process holds: `count` from `start` on of `whole`, and behind them `padding` of zeros."""

    start: int
    count: int
    whole: int
    padding: int = 0

    @classmethod
    def of(cls, count: int, index: int = 0, processes: int = 1) -> Slice:
        """That of the process `index` where each holds as many."""
        return cls(index * count, count, count * processes)

    @property
    def is_all(self) -> bool:
        return self == Slice.of(self.whole)

    @property
    def held(self) -> int:
        return self.count + self.padding


@dataclass(frozen=True)
class Share:
    """The part of one layer: its plan, None where it is dense, and what is held of it.

    rows: one slice after the other, where the server splits the outputs of the layer in several parts.
    """

    fqn: str
    planned: LayerPlan | None
    rows: tuple[Slice, ...]
    columns: Slice

    @property
    def outputs(self) -> int:
        return sum(part.held for part in self.rows)

    @property
    def rank(self) -> int | None:
        return None if self.planned is None else self.planned.rank

    @property
    def is_pivoted(self) -> bool:
        return self.planned is not None and self.planned.shape.pivoted

    @property
    def has_all_rows(self) -> bool:
        return all(part.is_all for part in self.rows)

    @property
    def whole(self) -> tuple[int, int]:
        """Outputs and inputs of the layer, in all processes together."""
        return sum(part.whole for part in self.rows), self.columns.whole

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Those of a tensor with the layer's outputs in its first dimension."""
        held, start = [], 0
        for part in self.rows:
            rows = tensor[start + part.start : start + part.start + part.count]
            held.append(pad(rows, (0, 0) * (tensor.dim() - 1) + (0, part.padding)) if part.padding else rows)
            start += part.whole
        return held[0] if len(held) == 1 else torch.cat(held)

    def columns_of(self, tensor: Tensor) -> Tensor:
        """Those of a tensor with the layer's inputs in its last dimension."""
        return tensor[..., self.columns.start : self.columns.start + self.columns.count]


def served_layers(plan: RankPlan) -> dict[str, LayerPlan]:
    """The low-rank layers of a plan by name; ValueError if there are any that no server can build."""
    if wrong := [f"{layer.fqn} is a {layer.kind}" for layer in plan.low_rank if layer.kind != SERVED]:
        raise ValueError(f"only low-rank layers of the kind {SERVED} are served: {_few(wrong)}; {WAY_OUT}")
    if plan.narrower:
        raise ValueError(
            f"blocks of different widths are not served, such as {plan.narrower[0].name}: narrow='uniform' gives all "
            "one width, which config.json has then"
        )
    if inner := sorted({layer.fqn for layer in plan.low_rank} - {layer.fqn for layer in plan.outermost.low_rank}):
        raise ValueError(f"stages that are low-rank in turn are not served: {_few(inner)}; {WAY_OUT}")
    if few := [f"{layer.fqn} is {layer.storage}" for layer in plan.changed if layer.storage != AS_IT_IS]:
        raise ValueError(f"weights of few bits are not served: {_few(few)}; {WAY_OUT}")
    return {layer.fqn: layer for layer in plan.low_rank}


def shares(
    names: Sequence[str], planned: Mapping[str, LayerPlan], rows: Sequence[Slice], columns: Slice
) -> list[Share]:
    """What a process holds of layers that the server stacks into one, in the order of their outputs.

    names: the layers. rows: of each part of the server's layer; a layer may be several parts.

    Raises:
        ValueError: The plan does not fit: the text names the layer, what the plan says and what the server has.
    """
    found = []
    for fqn, parts in zip(names, _parts_of(names, planned, rows), strict=True):
        share = Share(fqn, planned.get(fqn), tuple(parts), columns)
        if share.planned is not None:
            _check(share)
        found.append(share)
    return found


def require_built(planned: Mapping[str, LayerPlan], built: set[str]) -> None:
    """ValueError if some planned layers are none of those that the server asked about."""
    if missing := sorted(planned.keys() - built):
        raise ValueError(f"the server lets no layer of its model be low-rank in place of {_few(missing)}; {WAY_OUT}")


WAY_OUT = "`shrank merge FOLDER --out DENSE` writes a dense model that every server loads"


def _parts_of(names: Sequence[str], planned: Mapping[str, LayerPlan], rows: Sequence[Slice]) -> Iterator[list[Slice]]:
    """The parts of each layer: one each, or as many as its planned outputs fill."""
    if len(names) == len(rows):
        yield from ([part] for part in rows)
        return
    total = sum(part.whole for part in rows)
    sizes = [planned[fqn].shape.out_features if fqn in planned else None for fqn in names]
    if sizes.count(None) == 1:  # what the others leave
        sizes[sizes.index(None)] = total - sum(size or 0 for size in sizes)
    left = list(rows)
    for fqn, size in zip(names, sizes, strict=True):
        taken: list[Slice] = []
        while left and size is not None and sum(part.whole for part in taken) < size:
            taken.append(left.pop(0))
        if sum(part.whole for part in taken) != size:
            raise ValueError(
                f"{fqn}: the server stacks {', '.join(names)} into parts of {[part.whole for part in rows]} outputs, "
                f"and nothing says which of them are this layer's; {WAY_OUT}"
            )
        yield taken


def _check(share: Share) -> None:
    shape, rank = share.planned.shape, share.rank
    N, K = share.whole
    if (shape.out_features, shape.in_features) != (N, K):
        raise ValueError(f"{share.fqn}: the plan says {shape.out_features}x{shape.in_features}, the server has {N}x{K}")
    if rank > min(N, K) or (shape.pivoted and rank >= N):
        raise ValueError(f"{share.fqn}: rank {rank} is too large for a layer of {N}x{K}")
    if replace(shape, pivoted=False) != type(shape)(N, K):
        raise ValueError(f"{share.fqn}: a layer in groups is not served; {WAY_OUT}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
