"""The activations of the 16-bit kernels, of every number that there is: exact before they are rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erfc

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXACT = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * erfc(-z / np.sqrt(2)),
    "gelu_tanh": lambda z: z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}
NEGLIGIBLE = 2.0**-25  # half of float16's smallest number


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
