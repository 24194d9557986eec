"""One training step of whole stacks: dense, low-rank by two calls of PyTorch, and low-rank by the ops, which end in
activation and residual and keep h alone for the backward pass. Time, and the memory of what forward keeps.

    python -m benchmarks.speed.training --out build/training.json            # a CPU: the memory is what counts
    python -m benchmarks.speed.training --device cuda --out TRAINING.json    # the native kernels

On a CPU the ops run PyTorch, and compute each pre-activation a second time on the way back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import shrank
from benchmarks.provenance import provenance
from benchmarks.speed.stacks import Block, Config
from shrank.measuring.timing import time_in_turns
from tests.common.tolerances import assert_close

RANK, ROUNDS = 96, 5
# Of the second, layers as in the low-rank transformer for speech (Winata et al., ICASSP 2020): 512 wide, 2048 inside.
CONFIGS = [
    Config("BERT-base", 12, 768, 12, 12, 3072, False, ((8, 128),)),
    Config("speech transformer", 6, 512, 8, 8, 2048, False, ((8, 128),)),
]
TINY = [Config("tiny", 2, 64, 4, 4, 128, False, ((2, 8),))]
LINEAR = ("query", "key", "value", "out", "fc1", "fc2")


class ByOps(nn.Module):
    """A Block of low-rank layers, of which each is one op: activation and residuals are in it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        a = block.norm1(x)
        (batch, length, hidden), heads = x.shape, block.heads
        query, key, value = (
            low_rank(layer, a).view(batch, length, heads, -1).transpose(1, 2)
            for layer in (block.query, block.key, block.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, hidden)
        x = low_rank(block.out, mixed, residual=x)
        return low_rank(block.fc2, low_rank(block.fc1, block.norm2(x), "gelu"), residual=x)


def low_rank(layer: shrank.LED, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """By the op, also where layers would take PyTorch's own calls."""
    return torch.ops.shrank.low_rank_linear(x, layer.down, layer.up, layer.bias, activation, residual)


def providers(config: Config, device: str, dtype: torch.dtype, rank: int = RANK) -> dict[str, nn.Module]:
    """The dense stack, the low-rank one, and the same layers by the ops."""
    torch.manual_seed(0)
    with torch.device(device):
        dense, small = (nn.Sequential(*(Block(config) for _ in range(config.layers))).to(dtype) for _ in range(2))
        for block in small:
            for name in LINEAR:
                old = getattr(block, name)
                setattr(block, name, shrank.LED(old.in_features, old.out_features, rank, dtype=dtype))
    return {"dense": dense, "two calls": small, "ops": nn.Sequential(*map(ByOps, small))}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the tensors that the forward pass keeps for the backward pass, parameters and input aside."""
    storages: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(storages.values())


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()

    return run


def peak_bytes(run: Callable[[], None], device: str) -> int | None:
    """Of one step, on a GPU."""
    if device == "cpu":
        return None
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def check_gradients(models: dict[str, nn.Module], x: Tensor) -> None:
    """Raises AssertionError unless the ops' gradients are as near as PyTorch's to those in fp64."""
    gradients = {}
    for name in ("two calls", "ops"):
        step(models[name], x)()
        gradients[name] = [parameter.grad for parameter in models[name].parameters()]
    exact = models["two calls"].double()
    step(exact, x.double())()
    for ours, wanted, plain in zip(gradients["ops"], exact.parameters(), gradients["two calls"], strict=True):
        assert_close(ours, wanted.grad, plain)
    exact.to(x.dtype)


def measure(config: Config, device: str, dtype: torch.dtype, rounds: int = ROUNDS, rank: int = RANK) -> list[dict]:
    """One row for each provider. Raises AssertionError if the ops' gradients stray further from fp64 than PyTorch's."""
    models = providers(config, device, dtype, rank)
    (batch, length), *_ = config.workloads
    x = torch.randn(batch, length, config.hidden, device=device).to(dtype)
    check_gradients(models, x)
    steps = {name: step(model, x) for name, model in models.items()}
    timings = time_in_turns({name: [run] for name, run in steps.items()}, device, rounds)
    return [
        {
            "stack": config.name,
            "layers": config.layers,
            "rank": rank,
            "batch": batch,
            "length": length,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            "milliseconds": timings[name].seconds * 1e3,
            "of_two_calls": timings[name].seconds / timings["two calls"].seconds,
            "kept_bytes": kept_bytes(model, x),
            "peak_bytes": peak_bytes(steps[name], device),
        }
        for name, model in models.items()
    ]


def table(rows: list[dict]) -> Table:
    shown = Table("stack", "provider", "ms a step", "time / two calls", "kept MB", "kept / two calls", "peak MB")
    kept = {row["stack"]: row["kept_bytes"] for row in rows if row["provider"] == "two calls"}
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
        shown.add_row(
            row["stack"],
            row["provider"],
            f"{row['milliseconds']:.1f}",
            f"{row['of_two_calls']:.2f}",
            f"{row['kept_bytes'] / 1e6:.1f}",
            f"{row['kept_bytes'] / kept[row['stack']]:.2f}",
            peak,
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a stack of seconds, to try the path")
    given = parser.parse_args(arguments)
    dtype = getattr(torch, given.dtype or ("float32" if given.device == "cpu" else "bfloat16"))
    rows = []
    for config in TINY if given.tiny else CONFIGS:
        rows += measure(config, given.device, dtype, rank=16 if given.tiny else RANK)
    given.out.write_text(json.dumps({**provenance(given.device), "rows": rows}, indent=1) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
