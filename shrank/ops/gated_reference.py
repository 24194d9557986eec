"""The way back of gated layers in plain PyTorch: as `reference` says it of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import GatedEnd, all_rows, apart, factors_backward, gated_backward


class GatedGrads(NamedTuple):
    x: Tensor | None
    gate_down: Tensor | None
    gate_up: Tensor | None
    gate_bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    gate_pivot_bias: Tensor | None
    gate_order: None  # places have no gradient
    pivot_bias: Tensor | None
    order: None


def with_all_rows(
    up: Tensor, bias: Tensor | None, pivot_bias: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """up (N, R) and bias (N,) that make all outputs, whether factors are pivoted or, without an order, are not.

    This moves N R numbers, where putting outputs in order moves M N.
    """
    if order is None:
        return up, bias
    biases = None
    if bias is not None or pivot_bias is not None:
        parts = [
            up.new_zeros(size) if each is None else each
            for each, size in ((pivot_bias, up.size(1)), (bias, up.size(0)))
        ]
        biases = torch.cat(parts).index_select(0, order)
    return all_rows(up, order), biases


def low_rank_gated_backward(
    grad: Tensor,
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate_pivot_bias: Tensor | None,
    gate_order: Tensor | None,
    pivot_bias: Tensor | None,
    order: Tensor | None,
    gate_h: Tensor,
    h: Tensor,
    activation: str,
    needs: GatedGrads,
    end: Callable[..., GatedEnd] = gated_backward,
) -> GatedGrads:
    """The gradients for which `needs` is true, from grad (..., N) of y and the forward pass's h.

    end: what computes `gated_backward`. Pivoted factors go through it with all rows.
    """
    gate_rows, gate_biases = with_all_rows(gate_up, gate_bias, gate_pivot_bias, gate_order)
    value_rows, biases = with_all_rows(up, bias, pivot_bias, order)
    needs_gate_bias = bool(needs.gate_bias or needs.gate_pivot_bias)
    needs_bias = bool(needs.bias or needs.pivot_bias)
    of = end(grad, gate_h, gate_rows, gate_biases, h, value_rows, biases, activation, needs_gate_bias, needs_bias)
    by_gate, dgate_down, dgate_up = factors_backward(
        of.gate, x, gate_down, gate_rows, gate_h, needs.x, needs.gate_down, needs.gate_up
    )
    by_value, ddown, dup = factors_backward(of.value, x, down, value_rows, h, needs.x, needs.down, needs.up)
    dx = by_gate + by_value if needs.x else None
    dgate_pivots, dgate_up, dgate_bias = _of_stored(dgate_up, of.gate_bias, gate_order, gate_up.size(1))
    dpivots, dup, dbias = _of_stored(dup, of.bias, order, up.size(1))
    return GatedGrads(
        dx,
        dgate_down,
        dgate_up,
        dgate_bias if needs.gate_bias else None,
        ddown,
        dup,
        dbias if needs.bias else None,
        dgate_pivots if needs.gate_pivot_bias else None,
        None,
        dpivots if needs.pivot_bias else None,
        None,
    )


def _of_stored(
    dup: Tensor | None, dbias: Tensor | None, order: Tensor | None, R: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the pivots' bias, of up and of its bias, from those of all rows: without an order up's own."""
    if order is None:
        return None, dup, dbias
    dpivots, dothers = (None, None) if dbias is None else apart(dbias, order, R)
    return dpivots, None if dup is None else apart(dup, order, R, 0)[1], dothers
