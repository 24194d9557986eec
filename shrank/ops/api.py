"""May the native kernels run here? Low-rank layers are two PyTorch calls wherever they may not."""

from __future__ import annotations

import torch


def why_not() -> list[str]:
    """Why the native kernels cannot run here; an empty list means that they can."""
    reasons = ["this version of shrank has no native extension"]
    if not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} sees no CUDA device")
    return reasons
