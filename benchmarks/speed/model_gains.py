"""What the native kernels gain over two calls of cuBLAS or cuDNN and PyTorch's own activation, by select's model of a
GPU.

python -m benchmarks.speed.model_gains [--gpu h200] [--activation gelu] [--conv]
Not a measurement: bench_low_rank_linear.py and bench_low_rank_conv.py measure. A dash: the model takes the two calls.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.speed.low_rank_conv import LAYERS, Case, explained
from shrank.measuring.explain import explain

TOKENS = (1, 16, 128, 512, 1024, 4096, 16384, 65536)
LINEAR_LAYERS = [
    (768, 768, 48),
    (768, 768, 96),
    (768, 768, 192),
    (768, 3072, 96),
    (3072, 768, 96),
    (1024, 1024, 128),
    (2048, 2048, 128),
    (4096, 4096, 128),
    (4096, 4096, 256),
    (4096, 14336, 256),
    (4096, 4096, 512),
]


def gain(M: int, layer: tuple[int, int, int], gpu: str, activation: str) -> tuple[float, str]:
    """Predicted time of two calls over that of what select takes, and what that is."""
    told = explain((M, *layer), gpu=gpu, activation=activation)
    two = next(c["microseconds"] for c in told["candidates"] if c["kernel"] == "two_gemms")
    return two / told["decision"]["microseconds"], told["decision"]["kernel"]


def table(gpu: str, activation: str) -> Table:
    shown = Table(title=f"predicted gain over two calls, {gpu}, bf16, activation {activation}")
    for column in ("K, N, R", *(f"M {M}" for M in TOKENS)):
        shown.add_column(column, justify="right")
    for layer in LINEAR_LAYERS:
        gains = [gain(M, layer, gpu, activation) for M in TOKENS]
        shown.add_row(
            str(layer)[1:-1],
            *("-" if kernel == "two_gemms" else f"{ratio:.2f} {kernel.split('_')[-1]}" for ratio, kernel in gains),
        )
    return shown


def conv_table(gpu: str) -> Table:
    """Convolutions, channels last: plain and with a GELU."""
    shown = Table(title=f"predicted gain over two convolutions, {gpu}, bf16, channels last")
    for column in ("layer", "R", "plain", "with a GELU", "times the floor", "times dense"):
        shown.add_column(column, justify="right")
    for layer in LAYERS:
        plain, ended = (explained(Case(replace(layer, activation=end), "bfloat16"), gpu) for end in ("none", "gelu"))
        gains = []
        for told in (plain, ended):
            two = next(c["microseconds"] for c in told["candidates"] if c["kernel"] == "two_convs")
            chosen = told["decision"]["kernel"]
            gains.append("-" if chosen == "two_convs" else f"{two / told['decision']['microseconds']:.2f} {chosen}")
        took = ended["decision"]["microseconds"]
        # A depthwise-separable block replaces no dense layer of its cost.
        over_dense = f"{ended['dense_us'] / took:.2f}" if layer.groups == 1 else ""
        shown.add_row(layer.model, str(layer.rank), *gains, f"{took / ended['floor_us']:.2f}", over_dense)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--activation", default="gelu", help="of the linear layers")
    parser.add_argument("--conv", action="store_true", help="convolutions instead of linear layers")
    given = parser.parse_args()
    Console().print(conv_table(given.gpu) if given.conv else table(given.gpu, given.activation))


if __name__ == "__main__":
    main()
