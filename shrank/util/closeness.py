"""The one policy for comparing numbers: norm-wise relative errors, bounds per dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest norm-wise relative error of exact arithmetic in another order.
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10}
# Half types are held to this many times PyTorch's own error at the same dtype, or a few units of rounding.
TIMES_BASELINE, UNITS = 2.0, 4.0


def distance(actual: Tensor, expected: Tensor, baseline: Tensor | None = None, strict: bool = False) -> str:
    """How `actual` is further from `expected` than arithmetic in its dtype allows; "" if it is not.

    baseline: what PyTorch computes in the dtype of `actual`; `expected` may be of a wider one.
    strict: the baseline alone is the measure, no units of rounding beside it.
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    bound = BOUNDS.get(actual.dtype) or UNITS * torch.finfo(actual.dtype).eps
    if baseline is not None:
        bound = max(0.0 if strict else bound, TIMES_BASELINE * relative_error(baseline, expected))
    if error <= bound:
        return ""
    worst = (actual.detach().double() - expected.detach().double()).abs().argmax()
    return (
        f"relative error {error:.3e}, at most {bound:.3e} for {actual.dtype}; worst element {int(worst)}: "
        f"{actual.flatten()[worst]:.6g} for {expected.flatten()[worst]:.6g}"
    )


def stray_elements(actual: Tensor, expected: Tensor) -> str:
    """Which elements are off by more than a few units of rounding of the largest; "" if none is: a norm would not show
    a single one."""
    error = (actual.double() - expected.double()).abs()
    if not actual.numel():
        return ""
    bound = UNITS * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    if (error <= bound).all():
        return ""
    worst = error.nan_to_num(torch.inf).argmax()
    return (
        f"{int((~(error <= bound)).sum())} elements are off by more than {bound:.3g}; element "
        f"{int(worst)}: {actual.flatten()[worst]:.6g} for {expected.flatten()[worst]:.6g}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`; NaN where either is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)
