"""The activations of the 16-bit kernels, of every number that there is: exact before they are rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erfc

from shrank.ops.reference import ACTIVATIONS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXACT = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * erfc(-z / np.sqrt(2)),
    "gelu_tanh": lambda z: z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}
DERIVATIVE = {
    "none": np.ones_like,
    "relu": lambda z: (z > 0).astype(float),
    "gelu": lambda z: 0.5 * erfc(-z / np.sqrt(2)) + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi),
    "gelu_tanh": lambda z: _of_gate(z, 2 * np.sqrt(2 / np.pi) * np.array([z + 0.044715 * z**3, 1 + 0.134145 * z**2])),
    "silu": lambda z: _of_gate(z, np.array([z, np.ones_like(z)])),
}
# A derivative is a factor of a gradient: where it crosses zero, what counts is its error beside the gradient.
OF_GRADIENT = 2.0**-12
NEGLIGIBLE = 2.0**-25  # half of float16's smallest number


def _of_gate(z: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """The derivative of z / (1 + exp(-q)), from q and its own derivative."""
    q, slope = gate
    s = 1 / (1 + np.exp(-np.clip(q, -700, 700)))
    return s + z * s * (1 - s) * slope


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def half_units(exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Half a unit in the last place of the number that each rounds to."""
    info = torch.finfo(dtype)
    _, exponents = np.frexp(exact)
    return np.maximum(np.ldexp(info.eps / 2, exponents), info.smallest_normal * info.eps) / 2


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_within_half_a_unit_before_it_is_rounded(dev, dtype: str, activation: str) -> None:
    numbers = all_numbers(DTYPES[dtype])
    z = numbers[numbers.isfinite()].double().numpy()
    found = np.array(dev.activation.activate(dtype, activation, z.tolist()))
    with np.errstate(over="ignore"):
        exact = EXACT[activation](z)
    error = np.abs(found - exact)
    bound = np.maximum(half_units(exact, DTYPES[dtype]), NEGLIGIBLE)
    worst = np.argmax(error / bound)
    assert error[worst] <= bound[worst], f"{activation}({z[worst]}) is {found[worst]}, wanted {exact[worst]}"


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none_and_infinity_is_infinite(dev, dtype: str, activation: str) -> None:
    nan, infinity = dev.activation.activate(dtype, activation, [float("nan"), float("inf")])
    assert np.isnan(nan) and infinity == np.inf


@pytest.mark.parametrize("activation", DERIVATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_derivative_is_exact_before_it_is_rounded(dev, dtype: str, activation: str) -> None:
    numbers = all_numbers(DTYPES[dtype])
    z = numbers[numbers.isfinite()].double().numpy()
    found = np.array(dev.activation.derive(dtype, activation, z.tolist()))
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.where(np.abs(z) < 1e3, DERIVATIVE[activation](z), DERIVATIVE[activation](1e3 * np.sign(z)))
    error = np.abs(found - exact)
    bound = np.maximum(half_units(exact, DTYPES[dtype]), OF_GRADIENT)
    worst = np.argmax(np.where(np.isnan(error), np.inf, error) / bound)
    assert error[worst] <= bound[worst], f"{activation}'({z[worst]}) is {found[worst]}, wanted {exact[worst]}"


@pytest.mark.parametrize("activation", DERIVATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_derivative_of_what_is_no_number_is_pytorchs(dev, dtype: str, activation: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = torch.tensor(dev.activation.derive(dtype, activation, special.tolist()))
    z = special.clone().requires_grad_()
    ACTIVATIONS[activation](z).backward(torch.ones(3))
    assert torch.equal(found.isnan(), z.grad.isnan()), (found, z.grad)
