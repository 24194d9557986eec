"""How one gated layer is measured: the cases, most telling first, and what low_rank_linear.py asks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import shrank
from benchmarks.speed.low_rank_linear import Family, describe
from benchmarks.speed.roofline import Work, layer_work
from benchmarks.speed.shapes import LLAMA, Case, Layer
from shrank.measuring.explain import explain
from shrank.ops import reference

# silu(gate) * value as these models have it, gate and value of one rank.
LAYERS = [
    LLAMA[0],
    Layer("SmolLM2-135M", "gate", 576, 1536, "silu", False, False, (1, 4096)),
    Layer("ModernBERT", "gate", 768, 1152, "gelu", False, False, (128, 16384)),
]


class Inputs(NamedTuple):
    """x (M, K); of gate and value the weight (N, K) of the dense layer, down (R, K) and up (N, R)."""

    x: Tensor
    gate_weight: Tensor
    gate_down: Tensor
    gate_up: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor

    def copy(self, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
        return Inputs(*map(change, self))


def draw(case: Case, device: str) -> Inputs:
    """Random tensors, scaled so that gate and value have about unit variance."""
    K, N, dtype = case.layer.K, case.layer.N, getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(dtype)

    def of_one() -> tuple[Tensor, Tensor, Tensor]:
        return (
            normal(N, K, scale=K**-0.5),
            normal(case.R, K, scale=K**-0.5),
            normal(N, case.R, scale=case.R**-0.5),
        )

    return Inputs(normal(case.M, K), *of_one(), *of_one())


def dense(inputs: Inputs, activation: str) -> Tensor:
    """The layers that the low-rank ones replace."""
    gate = reference.ACTIVATIONS[activation](linear(inputs.x, inputs.gate_weight))
    return gate * linear(inputs.x, inputs.weight)


def four_calls(inputs: Inputs, activation: str) -> Tensor:
    """What people write: two calls of F.linear for each of gate and value, activation and product after them."""
    return reference.low_rank_gated(*factors(inputs), activation=activation)


def native(inputs: Inputs, activation: str) -> Tensor:
    return shrank.low_rank_gated(*factors(inputs), activation, backend="native")


def factors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """As the op takes them."""
    return inputs.x, inputs.gate_down, inputs.gate_up, None, inputs.down, inputs.up, None


def work(case: Case, dense: bool = False) -> Work:
    """As one fused kernel: x read once, y written once."""
    dtype = getattr(torch, case.dtype)
    one = layer_work(case.layer.shape, None if dense else case.R, case.M, dtype)
    shared = case.M * (case.layer.K + case.layer.N) * dtype.itemsize
    return Work(2 * one.flops, 2 * one.bytes - shared)


def explained(case: Case, gpu: str | None) -> dict:
    layer = case.layer
    sizes = (case.M, layer.K, layer.N, case.R)
    return explain(sizes, case.dtype, gpu, layer.activation, bias=False, gate=case.R)


GATED = Family(draw, dense, four_calls, native, work, describe, explained)


def grid(dtype: str) -> list[Case]:
    """Each layer as its model runs it, at half of the break-even rank; then at a quarter, and with other tokens."""
    typical = [(layer, M) for i in (1, 0) for layer in LAYERS for M in (layer.typical_M[i],)]
    others = [(layer, M) for M in (16, 512, 64) for layer in LAYERS]
    order = [(1 / 2, typical), (1 / 4, typical), (1 / 2, others)]
    return list(dict.fromkeys(Case(layer, M, layer.rank(share), dtype) for share, some in order for layer, M in some))


def cpu_subset(_: str = "float32") -> list[Case]:
    """What a CPU does in a minute."""
    layer = LAYERS[1]
    return [Case(layer, M, layer.rank(1 / 2), "float32") for M in (1, 64)]


def tiny(_: str = "float32") -> list[Case]:
    """Two cases that any machine does at once."""
    layer = replace(LAYERS[1], model="tiny", K=48, N=64)
    return [Case(layer, 3, 8, "float32"), Case(replace(layer, activation="gelu"), 16, 16, "float32")]
