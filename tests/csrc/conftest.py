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
