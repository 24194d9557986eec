"""How tests compare numbers: by the policy of shrank.util.closeness. No test has numbers of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from shrank.util.closeness import distance, stray_elements

# Units of rounding that storing and multiplying two factors costs; measured: at most 10.
_FACTOR_UNITS = 16.0


def assert_close(actual: Tensor, expected: Tensor, baseline: Tensor | None = None, strict: bool = False) -> None:
    """Fail unless `actual` is as near to `expected` as arithmetic in its dtype allows.

    baseline: what PyTorch computes in the dtype of `actual`; `expected` may be of a wider one.
    strict: the baseline alone is the measure, no units of rounding beside it.
    """
    if far := distance(actual, expected, baseline, strict):
        raise AssertionError(far)


def assert_optimal(error: float, optimum: float, matrix: Tensor) -> None:
    """Fail if a truncation error exceeds the optimum by more than 1e-5 of itself and what storing factors in the
    matrix's dtype costs."""
    rounding = _FACTOR_UNITS * torch.finfo(matrix.dtype).eps * matrix.double().norm().item()
    assert abs(error - optimum) <= 1e-5 * optimum + rounding, f"error {error:.9g}, optimum {optimum:.9g}"


def assert_every_element_close(actual: Tensor, expected: Tensor) -> None:
    """Fail if a single element is off by more than a few units of rounding of the largest: a norm would not show it."""
    if stray := stray_elements(actual, expected):
        raise AssertionError(stray)
