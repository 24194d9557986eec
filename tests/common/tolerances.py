"""The one policy for comparing numbers: norm-wise relative errors, bounds per dtype. No test has numbers of its own."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest norm-wise relative error of exact arithmetic in another order.
_BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10}
# Half types are held to this many times PyTorch's own error at the same dtype, or a few units of rounding.
_TIMES_BASELINE, _UNITS = 2.0, 4.0
# Units of rounding that storing and multiplying two factors costs; measured: at most 10.
_FACTOR_UNITS = 16.0


def assert_close(actual: Tensor, expected: Tensor, baseline: Tensor | None = None, strict: bool = False) -> None:
    """Fail unless `actual` is as near to `expected` as arithmetic in its dtype allows.

    baseline: what PyTorch computes in the dtype of `actual`; `expected` may be of a wider one.
    strict: the baseline alone is the measure, no units of rounding beside it.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    error = _relative_error(actual, expected)
    bound = _BOUNDS.get(actual.dtype) or _UNITS * torch.finfo(actual.dtype).eps
    if baseline is not None:
        bound = max(0.0 if strict else bound, _TIMES_BASELINE * _relative_error(baseline, expected))
    if not error <= bound:
        worst = (actual.detach().double() - expected.detach().double()).abs().argmax()
        raise AssertionError(
            f"relative error {error:.3e}, at most {bound:.3e} for {actual.dtype}; worst element {int(worst)}: "
            f"{actual.flatten()[worst]:.6g} for {expected.flatten()[worst]:.6g}"
        )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def assert_optimal(error: float, optimum: float, matrix: Tensor) -> None:
    """Fail if a truncation error exceeds the optimum by more than 1e-5 of itself and what storing factors in the
    matrix's dtype costs."""
    rounding = _FACTOR_UNITS * torch.finfo(matrix.dtype).eps * matrix.double().norm().item()
    assert abs(error - optimum) <= 1e-5 * optimum + rounding, f"error {error:.9g}, optimum {optimum:.9g}"


def assert_every_element_close(actual: Tensor, expected: Tensor) -> None:
    """Fail if a single element is off by more than a few units of rounding of the largest: a norm would not show it."""
    error = (actual.double() - expected.double()).abs()
    bound = _UNITS * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    if not (error <= bound).all():
        worst = error.nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f"{int((~(error <= bound)).sum())} elements are off by more than {bound:.3g}; element "
            f"{int(worst)}: {actual.flatten()[worst]:.6g} for {expected.flatten()[worst]:.6g}"
        )
