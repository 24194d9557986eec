"""Data to calibrate on and how, before the layers are known that it is for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..util.names import checks_keywords
from .losses import LossLike


@checks_keywords
@dataclass(frozen=True)
class Calibrate:
    """Data to calibrate on and how: what `auto_fact(calibrate=)` passes on to `shrank.calibrate`.

    Args:
        data: See `shrank.calibrate`, as all of these.
        loss: By which gradients errors are weighted: "output", "kl", "lm", "none" or a function.
        cache: A folder for the results of passes over the data.
        max_memory: Bytes for moments that are held at a time.
        spill: Keep what a backward pass needs in temporary files.
        seed: Of the random directions that "output" draws, and of the classes that "kl" does.
        inputs: Observe linear layers by their inputs where these are more numbers than their outputs, too. Rounding
            weights to a few bits needs it, and `auto_fact` sees to it where a plan or a budget has bits.
        narrow: Find the blocks of units (feed-forward, channels, heads) and observe these one by one. A plan with
            `narrow` needs it, and `auto_fact` sees to it.
        probe: Scale the error of every layer by what compressing it alone really does to the outputs of two batches, at
            the cost of two runs of the model for each layer; of `auto_fact` alone, with "output", "kl" or "lm".
    """

    data: Iterable[object]
    loss: LossLike = "output"
    cache: str | os.PathLike | None = None
    max_memory: int | None = None
    spill: bool = False
    seed: int = 0
    inputs: bool = False
    narrow: bool = False
    probe: bool = False
