"""CPU inference: low-rank layers by oneDNN's products against PyTorch's calls, which says from where the former win."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.speed.turns import in_turns
from shrank.ops import onednn, reference

ROUNDS = 15
# (K, N, R) at keep 0.5 and below.
LAYERS = [
    (128, 128, 32),
    (384, 384, 96),
    (384, 1536, 153),
    (1536, 384, 153),
    (576, 576, 144),
    (576, 1536, 209),
    (768, 3072, 307),
    (2048, 2048, 512),
    (4096, 14336, 512),
]
ROWS = [1, 4, 16, 64, 256, 1024, 4096]
ENDS = {"plain": ("none", False), "gelu": ("gelu", False), "residual": ("none", True)}
CACHED = 100_000_000  # numbers that no cache of a CPU holds


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("K", "N", "R"), LAYERS, ids=["x".join(map(str, each)) for each in LAYERS])
def bench_layer(K: int, N: int, R: int, end: str, benchmark, report) -> None:
    """Time of PyTorch's calls over that of oneDNN's; the weights come from memory, as those of a model do."""
    activation, has_residual = ENDS[end]
    weights = R * (K + N)
    layers = [
        (torch.randn(R, K), torch.randn(N, R), torch.randn(N)) for _ in range(max(2, min(CACHED // weights, 200)))
    ]
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, K)
            residual = torch.randn(rows, N) if has_residual else None
            some = layers[: max(2, 4_000_000_000 // (rows * weights))]

            def run(module, x=x, residual=residual, some=some) -> None:
                for each in some:
                    module.low_rank_linear(x, *each, activation, residual)

            seconds = in_turns({each.__name__: partial(run, each) for each in (reference, onednn)}, ROUNDS)
            bar = ">= 1" if onednn.is_faster(x, *layers[0]) else "used if > 1 everywhere"
            report(f"{rows} rows, times faster", seconds[reference.__name__] / seconds[onednn.__name__], bar)
        benchmark(partial(run, onednn))
