"""How one low-rank layer is measured: who computes it, what they are checked against, one row per case and provider."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import shrank
from benchmarks.speed.roofline import Floor, Roof, Work, layer_work
from benchmarks.speed.shapes import Case
from shrank.measuring.explain import explain
from shrank.measuring.timing import copies_beyond_cache, time_in_turns
from shrank.ops import reference
from tests.common.tolerances import assert_close

SEQUENCE_SECONDS = 2e-3  # a sequence of calls lasts longer than this, so that its start does not count
ROUNDS = {"cpu": 7, "cuda": 15}
MOST_SETS = 2000  # of tensors; where these do not outgrow the cache, a row says that it is not cold
MODEL_GPU = "H200"  # whose choice is shown where there is no GPU
BASELINE = "torch"


class Inputs(NamedTuple):
    """x (M, K), weight (N, K) of the dense layer, down (R, K), up (N, R), bias (N,), residual (M, N)."""

    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    residual: Tensor | None

    def copy(self, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
        return Inputs(*(None if tensor is None else change(tensor) for tensor in self))


Provider = Callable[[Inputs, str], Tensor]


def dense(inputs: Inputs, activation: str) -> Tensor:
    """The layer that a low-rank one replaces."""
    y = reference.ACTIVATIONS[activation](linear(inputs.x, inputs.weight, inputs.bias))
    return y if inputs.residual is None else y + inputs.residual


def two_calls(inputs: Inputs, activation: str) -> Tensor:
    """What people write: two calls of F.linear, the activation and the residual after them."""
    return reference.low_rank_linear(inputs.x, inputs.down, inputs.up, inputs.bias, activation, inputs.residual)


def native(inputs: Inputs, activation: str) -> Tensor:
    return shrank.low_rank_linear(
        inputs.x, inputs.down, inputs.up, inputs.bias, activation, inputs.residual, backend="native"
    )


@dataclass(frozen=True)
class Family:
    """A kind of layer: how a case of it is drawn, who computes it, and what is said of it."""

    draw: Callable[[Case, str], Inputs]
    dense: Provider
    two_calls: Provider
    native: Provider
    work: Callable[[Case, bool], Work]
    describe: Callable[[Case], dict[str, object]]
    explained: Callable[[Case, str | None], dict]

    def providers(self, device: str) -> dict[str, Provider]:
        """By name; native only where it can run. Compiled for each shape anew: torch.compile at its strongest."""
        torch.compiler.reset()
        found: dict[str, Provider] = {
            "dense": self.dense,
            BASELINE: self.two_calls,
            "compiled": torch.compile(self.two_calls, fullgraph=True, dynamic=False),
        }
        return found if why_not_native(device) else {**found, "native": self.native}


def why_not_native(device: str) -> list[str]:
    return [*shrank.why_not(), *(["the benchmark runs on the CPU"] if device == "cpu" else [])]


def draw(case: Case, device: str) -> Inputs:
    """Random tensors, scaled so that outputs have about unit variance."""
    layer, dtype = case.layer, getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(dtype)

    return Inputs(
        normal(case.M, layer.K),
        normal(layer.N, layer.K, scale=layer.K**-0.5),
        normal(case.R, layer.K, scale=layer.K**-0.5),
        normal(layer.N, case.R, scale=case.R**-0.5),
        normal(layer.N) if layer.bias else None,
        normal(case.M, layer.N) if layer.residual else None,
    )


def check(found: dict[str, Provider], inputs: Inputs, activation: str, family: Family) -> dict[str, str]:
    """What is wrong with each provider that cannot run, or strays further from fp64 than PyTorch does."""
    exact = inputs.copy(Tensor.double)
    expected = {call: call(exact, activation) for call in (family.two_calls, family.dense)}
    wrong = {}
    for name, provider in found.items():
        meant = family.dense if name == "dense" else family.two_calls
        try:
            assert_close(provider(inputs, activation), expected[meant], baseline=meant(inputs, activation))
        except (AssertionError, RuntimeError) as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


@torch.inference_mode()
def measure(case: Case, device: str, roof: Roof, rounds: int | None = None, family: Family | None = None) -> list[dict]:
    """One row per provider: its median time in microseconds over the floor of what it computes, or its error.

    Each is checked once; those that pass are timed in turns, on sets of tensors that together outgrow the cache.
    """
    torch.manual_seed(0)
    family = family or LINEAR
    inputs, found, activation = family.draw(case, device), family.providers(device), case.layer.activation
    wrong = check(found, inputs, activation, family)
    works = {name: family.work(case, name == "dense") for name in found}
    least = works[BASELINE]
    wanted = copies_beyond_cache(least.bytes, device)
    copies = min(wanted, MOST_SETS)
    repeats = math.ceil(SEQUENCE_SECONDS / (copies * roof.floor(least).seconds))
    sets = [inputs.copy() for _ in range(copies)]
    timings = time_in_turns(
        {
            name: [partial(provider, each, activation) for each in sets] * repeats
            for name, provider in found.items()
            if name not in wrong
        },
        device,
        rounds or ROUNDS[torch.device(device).type],
        held=copies,
    )
    chosen, rows = choice(case, device, family), []
    for name in found:
        result = (
            {"error": wrong[name]}
            if name in wrong
            else {
                "median_us": 1e6 * timings[name].seconds,
                "spread": timings[name].spread,
                **_over(roof.floor(works[name]), timings[name].seconds),
            }
        )
        rows.append(
            {
                **family.describe(case),
                "provider": name,
                "flops": works[name].flops,
                "bytes": works[name].bytes,
                "cold": copies == wanted,
                **result,
                **chosen,
            }
        )
    return rows


def work(case: Case, dense: bool = False) -> Work:
    layer = case.layer
    return layer_work(
        layer.shape, None if dense else case.R, case.M, getattr(torch, case.dtype), layer.bias, layer.residual
    )


def describe(case: Case) -> dict[str, object]:
    layer = case.layer
    return {
        "model": layer.model,
        "layer": layer.name,
        "M": case.M,
        "K": layer.K,
        "N": layer.N,
        "R": case.R,
        "dtype": case.dtype,
        "activation": layer.activation,
        "bias": layer.bias,
        "residual": layer.residual,
    }


def explained(case: Case, gpu: str | None) -> dict:
    layer = case.layer
    return explain((case.M, layer.K, layer.N, case.R), case.dtype, gpu, layer.activation, layer.bias, layer.residual)


LINEAR = Family(draw, dense, two_calls, native, work, describe, explained)


def choice(case: Case, device: str, family: Family = LINEAR) -> dict[str, object]:
    """The kernel that select takes for the native op, and its predicted time; nothing where select is not loaded."""
    try:
        facts = family.explained(case, MODEL_GPU if device == "cpu" else None)
    except RuntimeError as error:
        return {"choice": None, "why_no_choice": str(error)}
    return {"choice": facts["decision"]["kernel"], "predicted_us": facts["decision"]["microseconds"]}


def _over(floor: Floor, seconds: float) -> dict[str, object]:
    return {"floor_us": 1e6 * floor.seconds, "bound": floor.bound, "over_floor": seconds / floor.seconds}
