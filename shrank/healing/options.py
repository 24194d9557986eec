"""How a compressed model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..util.names import checks_keywords

# Distance to the dense model after 40 steps: Whisper tiny.en at keep 0.5, 0.178 -> 0.057 at 1e-5, 0.075 at 3e-5 (after
# 300, word error rates of 9.2 % and 7.2 %); SmolLM2-135M at keep 0.8, 0.245 -> 0.222 at 1e-5, 0.221 at 5e-6, and worse
# than before at 3e-5.
LEARNING_RATE = 1e-5


@checks_keywords
@dataclass(frozen=True)
class HealOptions:
    """How healing trains, beside its length and rate.

    Args:
        train: The parameters of the "low_rank" and narrowed layers, or "all".
        hidden: Weight of the mean relative error of the blocks' outputs in the loss.
        evaluate_every: Steps between evaluations on held-out data.
        recompute: Compute what happens inside of the blocks once more in the backward pass, instead of keeping it.
        seed: Of the order of the data.

    Raises:
        ValueError: `train` is neither of the two, or `evaluate_every` is below 1.
    """

    train: Literal["low_rank", "all"] = "low_rank"
    hidden: float = 1.0
    evaluate_every: int = 50
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in ("low_rank", "all"):
            raise ValueError(f"train must be 'low_rank' or 'all', got {self.train!r}")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")


@dataclass(frozen=True)
class RunOptions(HealOptions):
    """Everything that decides what a run does, beside models and data."""

    steps: int = 300
    learning_rate: float = LEARNING_RATE
    batches: int = 1  # a step, of all processes together
    precision: str = "no"
