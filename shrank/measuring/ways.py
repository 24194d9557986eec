"""The ways to compute a problem: which there are, and whether they are right."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from ..ops.registration import Op
from ..ops.truth import Truth

GRIDS = 3  # of every matrix kernel, the cheapest by the model


@dataclass(frozen=True)
class Way:
    """A kernel by its name, and of a matrix kernel block_m, max_rank and blocks_n."""

    kernel: str
    grid: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join([self.kernel, "x".join(map(str, self.grid))]).strip()

    @property
    def is_library(self) -> bool:
        return self.kernel.startswith("two_")


def ways(op: Op, given: tuple, grids: int = GRIDS) -> list[Way]:
    """Every way to compute this: of each matrix kernel so many grids, the cheapest by the model."""
    listed = json.loads(getattr(torch.ops.shrank, f"{op.name}_choices")(*given, grids))
    activation, residual = given[-2:]
    ends = activation != "none" or residual is not None
    found = [
        Way(each["kernel"], tuple(each["grid"][n] for n in ("block_m", "max_rank", "blocks_n")) if each["grid"] else ())
        for each in listed
    ]
    # Two calls alone apply no end: the epilogue's pass is then the least that PyTorch's way takes.
    return [way for way in found if not (ends and way.kernel in ("two_gemms", "two_convs"))]


def failure(op: Op, given: tuple, way: Way, truth: Truth) -> str:
    """What is wrong with a way in training, and with its y in inference, by the rule of the tests; "" if nothing is."""
    try:
        training, inference = (op.run_named(given, way.kernel, way.grid, each) for each in (True, False))
        if given[0].is_cuda:
            torch.cuda.synchronize(given[0].device)  # an error of a kernel is told at the next call
    except torch.OutOfMemoryError:  # says nothing about the way
        raise
    except RuntimeError as error:
        return str(error)
    return truth.what_is_wrong(training) or truth.what_is_wrong(training._replace(y=inference.y))
