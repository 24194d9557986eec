"""What `shrank explain` answers of a CPU, and where PyTorch's own two calls run whatever the native extension holds.

Only the extension knows its kernels and their costs (csrc/select). What it never has a kernel for is told here:
tests/csrc/test_explain_plain.py holds it to csrc/select.
"""

from __future__ import annotations

import re

import torch

from ..ops import host, onednn
from ..ops.reference import ACTIVATIONS
from ..util.names import unknown

# Of csrc/select, which refuses others: the names of dtypes; the GPUs it has figures of, as people and CUDA call them.
DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
    "fp64": "float64",
    "float64": "float64",
}
GPUS = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "L40S": "NVIDIA L40S",
    "RTX 4090": "NVIDIA GeForce RTX 4090",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
}
_ELSEWHERE = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "identity": "none",
    "linear": "none",
}  # what other libraries call an activation


def check_names(dtype: str, activation: str, gpu: str | None) -> None:
    """Raise ValueError, with the nearest right name, on one that is unknown."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS, _ELSEWHERE)
    known = {_plain(name) for pair in GPUS.items() for name in pair}
    if gpu is None or is_cpu(gpu) or re.fullmatch(r"cuda:\d+", gpu) or _plain(gpu) in known:
        return
    raise unknown("gpu", gpu, [*GPUS, "cuda:0", "cpu"], {whole: name for name, whole in GPUS.items()}, _plain)


def is_cpu(gpu: str) -> bool:
    return gpu.lower() == "cpu"


def _plain(gpu: str) -> str:
    """As csrc/select/device.cpp compares: case, spaces, dashes and a leading NVIDIA do not count."""
    return re.sub(r"[^a-z0-9]", "", gpu.lower()).removeprefix("nvidia")


def plain_kernel(problem: dict) -> str:
    """What PyTorch's own two calls are called."""
    return "two_gemms" if "M" in problem else "two_convs"


def choice_on_cpu(problem: dict) -> tuple[str, str]:
    """Which kernel a CPU runs, and why: as `ops/cpu` chooses, where nobody looks on."""
    plain = plain_kernel(problem)
    if "M" in problem and not problem["training"]:
        M, K, N, R = (problem[name] for name in "MKNR")
        weights = R * K + (N - R * problem["pivoted"]) * R
        sizes = getattr(torch, problem["dtype"]), M * K, K, weights
        if host.are_few(*sizes):
            return "low_rank_rows", "few rows of x: one kernel for both stages, as fast as the weights are read"
        if onednn.is_faster(*sizes):
            return plain, "a large layer: oneDNN's two products, with bias and activation"
    return plain, "PyTorch's own two calls, and its own activation and residual"


def why_plain(problem: dict) -> str | None:
    """Why PyTorch's own two calls run on a GPU; None where the extension may have a kernel."""
    if problem["activation"] != "none" or problem["residual"] or problem.get("gate_R") or problem.get("pivoted"):
        return None  # a kernel may apply them, multiply by a gate, and put pivots into their places
    if problem["dtype"] not in ("bfloat16", "float16"):
        return f"no kernel takes {problem['dtype']}, and the second call adds the bias for free"
    groups = problem.get("up_groups", 1)
    sizes = {"K": problem.get("K", 0), "N": problem["N"] // groups, "R": problem["R"] // groups}
    if odd := [f"{name} is {size}" for name, size in sizes.items() if size % 8]:
        return f"{' and '.join(odd)}: kernels read 8 numbers at a time, and the second call adds the bias for free"
    return None


def facts(problem: dict, gpu: str, kernel: str, reason: str) -> dict:
    """As the extension tells them (csrc/select/explain.cpp), without what only its model of costs knows."""
    return {
        "problem": problem,
        "device": {"name": gpu, "source": "no figures are needed"},
        "decision": {"kernel": kernel, "microseconds": None, "reason": reason, "grid": None},
        "runner_up": None,
        "candidates": [{"kernel": kernel, "legal": True, "microseconds": None}],
        "floor_us": None,
        "dense_us": None,
        "status": "nothing is predicted: that takes a GPU to explain for, and the native extension",
    }
