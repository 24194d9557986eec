"""What a training does at which step: its batch and its rate; and which batches it is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

_WARM_UP, _FINAL_RATE = 0.1, 0.05  # shares of the steps and of the learning rate
_HELD_OUT = 0.1


def split(batches: Sequence[T]) -> tuple[list[T], list[T]]:
    """Batches to train on, and a tenth of all, spread over them, to judge by."""
    if len(batches) < 2:
        raise ValueError(f"{len(batches)} batch cannot be trained on and held out: give more, or held_out=")
    count = max(1, round(_HELD_OUT * len(batches)))
    kept = {int((i + 0.5) * len(batches) / count) for i in range(count)}
    return [b for i, b in enumerate(batches) if i not in kept], [batches[i] for i in sorted(kept)]


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * along)) / 2


def batch_of_step(batches: Sequence[T], step: int, seed: int) -> T:
    """The batch of a step: every epoch has its own order, which depends on nothing else."""
    epoch, place = divmod(step, len(batches))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return batches[int(order[place])]
