"""CPU inference with pivoted storage, against plain factors of as many weights, which have a lower rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import shrank
from benchmarks.data.models import minilm
from benchmarks.speed.turns import in_turns
from shrank import Budget
from shrank.linalg import Shape

KEEP, ROUNDS = 0.6, 31
# (out, in) of MiniLM, SmolLM2, BERT and Llama-class layers; tokens of a single one, of a sentence, of a batch.
LAYERS = [(384, 384), (1536, 384), (384, 1536), (1536, 576), (3072, 768), (768, 3072), (2048, 2048)]
TOKENS = [1, 32, 512, 4096]


def twins(N: int, K: int) -> dict[str, shrank.LED]:
    """A plain layer of about KEEP N K weights, one with a window of pivots, and one whose pivots lie apart, as those
    that bear rounding do, so that outputs must be gathered; ranks are multiples of eight, as those of a budget."""
    plain, pivoted = Shape(N, K), Shape(N, K, pivoted=True)
    rank = pivoted.rank_for(KEEP * N * K) // 8 * 8
    layers = {"plain": shrank.LED(K, N, plain.rank_for(pivoted.low_rank_params(rank)) // 8 * 8)}
    before, after = torch.arange(rank, N).chunk(2)
    for name, order in (("window", torch.cat((before, torch.arange(rank), after))), ("gathered", torch.randperm(N))):
        layers[name] = shrank.LED(K, N, rank, pivot=True)
        layers[name].set_factors(layers[name].down, layers[name].up, torch.zeros(N), order)
    return layers


@pytest.mark.parametrize(("N", "K"), LAYERS, ids=[f"{N}x{K}" for N, K in LAYERS])
def bench_pivoted_layer(N: int, K: int, benchmark, report) -> None:
    """Time of pivoted layers over that of a plain one of no more weights."""
    layers = twins(N, K)
    with torch.inference_mode():
        for tokens in TOKENS:
            x, calls = torch.randn(tokens, K), max(1, 1024 // tokens)

            def run(layer: shrank.LED, x: torch.Tensor = x, calls: int = calls) -> None:
                for _ in range(calls):
                    layer(x)

            seconds = in_turns({name: partial(run, layer) for name, layer in layers.items()}, ROUNDS)
            for name in ("window", "gathered"):
                report(f"{tokens} tokens, {name}", seconds[name] / seconds["plain"], "<= 1.1")
        benchmark(lambda: layers["window"](x))


def bench_minilm(benchmark, report) -> None:
    """The same of a whole MiniLM, whose biases and activations both kinds of layers share."""
    dense, small = minilm(), {}
    for name, pivot in (("plain", False), ("pivoted", True)):
        small[name] = shrank.auto_fact(dense, Budget(keep_params=KEEP), pivot=pivot, deepcopy=True)
    ids = torch.randint(1000, 20000, (32, 128))
    with torch.inference_mode():
        seconds = in_turns({name: partial(model, ids) for name, model in small.items()}, 9)
        report("4096 tokens, relative cost", seconds["pivoted"] / seconds["plain"], "<= 1.1")
        benchmark.pedantic(lambda: small["pivoted"](ids), rounds=3)
