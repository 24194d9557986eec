"""How long compression takes against the ancestors' method, how near the optimum it is, and its memory."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import nn

import shrank
from benchmarks.data.models import minilm, smollm2
from benchmarks.speed.turns import in_turns

KEEP = 0.5
MODELS = {"minilm": (minilm, 5), "smollm2": (smollm2, 1)}


@torch.no_grad()
def ancestors_auto_fact(model: nn.Module) -> nn.Module:
    """ShRank's method: a full SVD per layer into a freshly drawn pair of linears; on the layers that shrank replaces,
    so without the tied head, whose full U alone would take 10 GB."""
    skip = {"lm_head"}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in skip:
            continue
        rank = int(KEEP * module.weight.numel() / sum(module.weight.shape))
        U, S, Vh = torch.linalg.svd(module.weight, full_matrices=True)
        twin = nn.Sequential(
            nn.Linear(module.in_features, rank, bias=False),
            nn.Linear(rank, module.out_features, bias=module.bias is not None),
        )
        twin[0].weight.data = Vh[:rank]
        twin[1].weight.data = U[:, :rank] @ torch.diag(S[:rank])
        if module.bias is not None:
            twin[1].bias.data = module.bias.data
        model.set_submodule(name, twin)
    return model


@pytest.mark.parametrize(("make", "rounds"), MODELS.values(), ids=MODELS.keys())
def bench_speed(make: Callable[[], nn.Module], rounds: int, benchmark, report) -> None:
    dense = make()
    seconds = in_turns(
        {
            "ancestors": lambda: ancestors_auto_fact(copy.deepcopy(dense)),
            "shrank": lambda: shrank.auto_fact(copy.deepcopy(dense), KEEP),
            "copy": lambda: copy.deepcopy(dense),
        },
        rounds,
    )
    work = {name: seconds[name] - seconds["copy"] for name in ("ancestors", "shrank")}
    report("seconds, ancestors", work["ancestors"], "-")
    report("seconds, shrank", work["shrank"], "-")
    report("times faster", work["ancestors"] / work["shrank"], ">= 5")
    benchmark.pedantic(shrank.auto_fact, setup=lambda: ((copy.deepcopy(dense), KEEP), {}), rounds=3)


def bench_speed_with_tied_head(benchmark, report) -> None:
    """SmolLM2 as the ancestors take it: they do not see that the head is the embedding, and factorise it too."""
    if psutil.virtual_memory().available < 16e9:
        pytest.skip("a full SVD of the 49152x576 head needs 12 GB of memory")
    dense = smollm2()
    seconds = in_turns(
        {
            "layers": lambda: ancestors_auto_fact(copy.deepcopy(dense)),
            "shrank": lambda: shrank.auto_fact(copy.deepcopy(dense), KEEP),
        },
        1,
    )
    head = dense.lm_head.weight.detach()
    head_seconds = benchmark.pedantic(lambda: _seconds(lambda: torch.linalg.svd(head, full_matrices=True)), rounds=1)
    report("seconds, ancestors", seconds["layers"] + head_seconds, "-")
    report("times faster", (seconds["layers"] + head_seconds) / seconds["shrank"], ">= 5")


@pytest.mark.parametrize("make", [make for make, _ in MODELS.values()], ids=MODELS.keys())
def bench_error_over_optimum(make: Callable[[], nn.Module], benchmark, report) -> None:
    dense = make()
    small = shrank.auto_fact(copy.deepcopy(dense), KEEP)

    def worst() -> float:
        excess = 0.0
        for layer in small.shrank_plan.low_rank:
            weight, twin = dense.get_submodule(layer.fqn).weight.double(), small.get_submodule(layer.fqn)
            optimum = torch.linalg.svdvals(weight)[layer.rank :].square().sum().sqrt()
            error = (twin.up.double() @ twin.down.double() - weight).norm()
            excess = max(excess, (error / optimum - 1).item())
        return excess

    report("worst relative excess, x 1e-5", 1e5 * benchmark.pedantic(worst, rounds=1), "<= 1")


@pytest.mark.parametrize("make", [make for make, _ in MODELS.values()], ids=MODELS.keys())
def bench_peak_memory(make: Callable[[], nn.Module], benchmark, report) -> None:
    model = make()
    largest = max(p.nbytes for p in model.parameters())
    shrank.auto_fact(nn.Linear(256, 256), KEEP)  # thread pools and libraries are not the model's
    extra = benchmark.pedantic(lambda: _extra_memory(lambda: shrank.auto_fact(model, KEEP)), rounds=1)
    report("extra memory over largest layer", extra / largest, "<= 3")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _extra_memory(call: Callable[[], object]) -> int:
    """Peak resident memory during the call beyond that before it, sampled every millisecond."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peak - before
