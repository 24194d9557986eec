"""Loads the native extension; says why there is none, and what it was built for."""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
OLDEST_TORCH = "2.10"  # setup.py compiles for this version of torch's stable ABI
HOW_TO_INSTALL = (
    f"To install it, have CUDA's compiler (nvcc; a GPU is not needed) and torch {OLDEST_TORCH} or newer, and run "
    "`SHRANK_BUILD=1 CUDA_HOME=/usr/local/cuda pip install .` in the folder of shrank's source, where CUDA_HOME is the "
    "folder of bin/nvcc; or install a wheel that was built so, shrank-*+cu*.whl"
)


@cache
def problems() -> tuple[str, ...]:
    """Why the extension is not loaded; empty if it is. The first call loads it."""
    if hasattr(torch.ops.shrank, "low_rank_linear_as"):
        return ()  # this Python is embedded in a program that linked the C++ library, which has the same ops
    if not LIBRARY.exists():
        return ("this installation of shrank has no native extension: there was no nvcc, or SHRANK_BUILD was 0",)
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        return (f"the native extension needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}",)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (f"the native extension does not load with torch {torch.__version__}: {error}",)
    return ()


@cache
def build_info() -> dict[str, str | None]:
    """Of the loaded extension: `cuda` runtime and `archs` inside, the `torch` it was compiled against, and the newest
    CUDA that the `driver` of this machine runs (None without one). Empty if it is not loaded."""
    if problems() or not hasattr(torch.ops.shrank, "build_info"):
        return {}
    return {**json.loads(torch.ops.shrank.build_info()), "driver": driver()}


def driver() -> str | None:
    """The newest CUDA that the driver of this machine runs, such as "13.0"; None without a driver.

    Initialises nothing (cuInit): a process may still fork, and choose its devices, after it has asked.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"
