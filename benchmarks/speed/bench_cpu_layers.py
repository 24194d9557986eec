"""CPU inference: low-rank layers by our kernels for a few rows and by oneDNN's products against PyTorch's calls, which
says for which layers the former win."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.speed.turns import in_turns
from shrank.ops import cpu, host, onednn, reference

ROUNDS = 15
# (K, N, R) at keep 0.5 and below.
LAYERS = [
    (128, 128, 32),
    (128, 512, 51),
    (384, 384, 96),
    (384, 1536, 153),
    (1536, 384, 153),
    (576, 576, 144),
    (576, 1536, 209),
    (768, 3072, 307),
    (2048, 2048, 512),
    (4096, 14336, 512),
]
ROWS = {host: [1, 2, 4, 8, 16], onednn: [1, 4, 16, 64, 256, 1024, 4096]}
ENDS = {"plain": ("none", False), "gelu": ("gelu", False), "residual": ("none", True)}
CACHED = 100_000_000  # numbers that no cache of a CPU holds
RUNS = [
    *((host, dtype, "plain") for dtype in host.MOST_ROWS),
    *((onednn, torch.float32, end) for end in ENDS),
]


@pytest.mark.parametrize(
    ("by", "dtype", "end"), RUNS, ids=lambda each: getattr(each, "__name__", str(each)).split(".")[-1]
)
@pytest.mark.parametrize(("K", "N", "R"), LAYERS, ids=["x".join(map(str, each)) for each in LAYERS])
def bench_layer(K: int, N: int, R: int, by, dtype: torch.dtype, end: str, benchmark, report) -> None:
    """Time of PyTorch's calls over that of ours; the weights come from memory, as those of a model do."""
    activation, has_residual = ENDS[end]
    weights = R * (K + N)
    layers = [
        tuple(torch.randn(shape).to(dtype) for shape in ((R, K), (N, R), (N,)))
        for _ in range(max(2, min(CACHED // weights, 200)))
    ]
    with torch.inference_mode():
        for rows in ROWS[by]:
            x = torch.randn(rows, K).to(dtype)
            residual = torch.randn(rows, N).to(dtype) if has_residual else None
            some = layers[: max(2, 4_000_000_000 // (rows * weights))]

            def run(module, x=x, residual=residual, some=some) -> None:
                for each in some:
                    module.low_rank_linear(x, *each, activation, residual)

            seconds = in_turns({each.__name__: partial(run, each) for each in (reference, by)}, ROUNDS)
            bar = ">= 1" if cpu.fastest(x, *layers[0]) is by else "used if > 1 everywhere"
            report(f"{rows} rows, times faster", seconds[reference.__name__] / seconds[by.__name__], bar)
        benchmark(partial(run, by))
