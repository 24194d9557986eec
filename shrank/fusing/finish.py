"""What the graphs of fused blocks call: layers with what follows them, whatever has become of the layers since."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.ced import CED
from ..layers.led import LED
from ..layers.low_rank import LowRankLayer
from ..layers.plain import is_untouched
from ..layers.two_stage import ops_of
from ..ops import dispatch, reference


def finish(layer: nn.Module, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(layer(x)) + residual, also of a layer that is dense again, or has LoRA."""
    if isinstance(layer, LowRankLayer):
        return layer.finished(x, activation, residual)
    return reference.finished(layer(x), activation, residual)


def finish_normed(layer: nn.Module, norm: nn.Module, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(norm(layer(x))) + residual, of a batch norm that does not learn its statistics."""
    if isinstance(layer, CED):
        return layer.normed(norm, x, activation, residual)
    return reference.finished(norm(layer(x)), activation, residual)


def finish_gated(gate: nn.Module, value: nn.Module, x: Tensor, activation: str) -> Tensor:
    """activation(gate(x)) * value(x)"""
    if isinstance(gate, LED) and isinstance(value, LED):
        return gate.gated(value, x, activation)
    return finish(gate, x, activation, None) * value(x)


def finish_halves(layer: nn.Module, x: Tensor, activation: str, gate_is_first: bool) -> Tensor:
    """activation(gate) * value, of the halves of layer(x)."""
    gate, value = (0, 1) if gate_is_first else (1, 0)
    factors = layer.plain_factors() if isinstance(layer, LED) and is_untouched(layer) else None
    # On a CPU the op would multiply by down twice, once for each half, and save nothing in return.
    if factors and ops_of(x, *factors) is dispatch:
        down, up, bias = factors
        ups, biases = up.chunk(2), (None, None) if bias is None else bias.chunk(2)
        return dispatch.low_rank_gated(x, down, ups[gate], biases[gate], down, ups[value], biases[value], activation)
    halves = layer(x).chunk(2, -1)
    return reference.finished(halves[gate], activation, None) * halves[value]


def finish_siblings(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers]"""
    together = at_once(x, layers) if all(isinstance(each, LED) and is_untouched(each) for each in layers) else None
    return [layer(x) for layer in layers] if together is None else together


def at_once(x: Tensor, layers: tuple[LED, ...]) -> list[Tensor] | None:
    """What layers make of one input, in one op; None where that has no kernels to offer, or where gradients are on: of
    those each layer's own op knows more."""
    if torch.is_grad_enabled():
        return None
    factors = [layer.stored_factors() for layer in layers]
    if not all(factors) or any(ops_of(x, *each[:4]) is not dispatch for each in factors):
        return None
    return dispatch.low_rank_linear_multi(x, *zip(*factors, strict=True))
