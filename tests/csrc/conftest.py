"""The C++ under test that needs no GPU, as the Python module shrank_dev."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

GPUS = ("A100", "L40S", "RTX 4090", "H100", "H200", "B200")  # that select knows
BUILD = Path(__file__).parents[2] / "build" / "cmake"


def dev_module() -> ModuleType:
    """shrank_dev from the CMake build. Raises FileNotFoundError with the command that builds it."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    found = [path for suffix in suffixes if (path := BUILD / f"shrank_dev{suffix}").exists()]
    if not found:
        raise FileNotFoundError(
            f"{BUILD}/shrank_dev{suffixes[0]} is missing: cmake -S . -B build/cmake && cmake --build build/cmake"
        )
    return load_module(found[0])


NEEDED_GAIN = 1.25  # csrc/select/choose.h: of a kernel of ours, unmeasured


def expected_choice(costs: list[dict[str, float]], library: tuple[str, ...]) -> str:
    """What select must take: the cheapest of PyTorch's own ways, of which the last always runs, unless one of ours
    gains enough by it.

    costs: of every way that may run, in training and in inference.
    """

    def cheapest(names: set[str], limit: str) -> str | None:
        never_slower = [name for name in names if all(cost[name] <= cost[limit] for cost in costs)]
        return min(never_slower, key=total, default=None)

    def total(name: str) -> float:
        return sum(cost[name] for cost in costs)

    own = cheapest(set(library) & costs[0].keys(), library[-1])
    ours = cheapest(costs[0].keys() - set(library), own)
    return ours if ours and total(ours) * NEEDED_GAIN <= total(own) else own


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shrank_dev", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dev() -> ModuleType:
    return dev_module()


@pytest.fixture(params=GPUS)
def gpu(dev, request):
    return dev.select.device(request.param)
