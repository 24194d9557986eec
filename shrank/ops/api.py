"""What layers call. One implementation exists so far: two PyTorch calls, on every device."""

from __future__ import annotations

import torch

from .reference import low_rank_linear

__all__ = ["low_rank_linear", "why_not"]


def why_not() -> list[str]:
    """Why the native kernels cannot run here; an empty list means that they can."""
    reasons = ["this version of shrank has no native extension"]
    if not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} sees no CUDA device")
    return reasons
