"""Whole stacks of layers, dense against low-rank on PyTorch and on the native kernels: tokens/s, eager and as a graph.

    python -m benchmarks.speed.stacks --device cuda --out STACKS.json

Transformer blocks in plain PyTorch with random weights, no positions and no embeddings: the time of the layers, not the
quality of a model. Eager mode shows what the host costs, a CUDA graph what the device costs.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shrank
from benchmarks.provenance import provenance
from benchmarks.speed.low_rank_linear import why_not_native
from shrank.measuring.timing import Timing, time_in_turns
from tests.common.tolerances import assert_close

KEEP = 0.5
CALLS, ROUNDS = 10, 9


@dataclass(frozen=True)
class Config:
    """A stack, and the (batch, length) that it runs on. Gated: SiLU(gate) * up as in Llama, else GELU as in BERT."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    gated: bool
    workloads: tuple[tuple[int, int], ...]


CONFIGS = [
    Config("MiniLM-sized", 6, 384, 12, 12, 1536, False, ((32, 128), (1, 16))),
    Config("Llama-3-8B-sized", 4, 4096, 32, 8, 14336, True, ((1, 2048), (16, 1))),
]
TINY = [Config("tiny", 2, 64, 4, 4, 128, False, ((2, 8),)), Config("tiny gated", 1, 64, 4, 2, 128, True, ((1, 4),))]


class Block(nn.Module):
    """(batch, length, hidden) -> the same: attention and a feed-forward part, each behind a norm and a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias, self.heads = config.hidden, not config.gated, config.heads
        kv = hidden // config.heads * config.kv_heads
        self.norm1, self.norm2 = (nn.RMSNorm(hidden) if config.gated else nn.LayerNorm(hidden) for _ in range(2))
        self.query, self.out = nn.Linear(hidden, hidden, bias), nn.Linear(hidden, hidden, bias)
        self.key, self.value = nn.Linear(hidden, kv, bias), nn.Linear(hidden, kv, bias)
        self.gate = nn.Linear(hidden, config.intermediate, bias) if config.gated else None
        self.fc1, self.fc2 = nn.Linear(hidden, config.intermediate, bias), nn.Linear(config.intermediate, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attend(self.norm1(x)))
        a = self.norm2(x)
        return x + self.fc2(F.gelu(self.fc1(a)) if self.gate is None else F.silu(self.gate(a)) * self.fc1(a))

    def _attend(self, x: Tensor) -> Tensor:
        (batch, length, hidden), gated = x.shape, self.gate is not None
        query, key, value = (
            layer(x).view(batch, length, -1, hidden // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=gated, enable_gqa=gated)
        return mixed.transpose(1, 2).reshape(batch, length, hidden)


def dense(config: Config, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(*(Block(config) for _ in range(config.layers))).to(dtype).eval()


def low_rank(model: nn.Module) -> nn.Module:
    """A copy in which every layer that shrank would replace is an LED drawn from scratch, without any SVD."""
    small = copy.deepcopy(model)
    for layer in shrank.make_plan(small, KEEP, errors=False, round_to=8).low_rank:
        old = small.get_submodule(layer.fqn)
        small.set_submodule(
            layer.fqn,
            shrank.LED(
                old.in_features, old.out_features, layer.rank, old.bias is not None, old.weight.device, old.weight.dtype
            ),
        )
    return small.eval()


@torch.inference_mode()
def measure(config: Config, device: str, dtype: torch.dtype, rounds: int = ROUNDS) -> list[dict]:
    """One row per workload, mode and provider. Raises AssertionError if the native stack strays from fp64 further than
    PyTorch does."""
    big = dense(config, device, dtype)
    small = low_rank(big)
    backends = ["torch"] if why_not_native(device) else ["torch", "native"]
    rows = []
    for batch, length in config.workloads:
        x = torch.randn(batch, length, config.hidden, device=device).to(dtype)
        calls = {"dense": lambda x=x: big(x), **{f"LED {name}": _with_backend(name, small, x) for name in backends}}
        if "LED native" in calls:
            exact = copy.deepcopy(small).double()(x.double())
            assert_close(calls["LED native"](), exact, baseline=calls["LED torch"]())
        for mode in ("eager", "graph") if device != "cpu" else ("eager",):
            timings = time_in_turns(
                {name: [call] * CALLS for name, call in calls.items()}, device, rounds, graphs=mode == "graph"
            )
            rows += [
                _row(config, (batch, length), dtype, mode, name, timing, timings["dense"])
                for name, timing in timings.items()
            ]
    return rows


def _with_backend(name: str, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with shrank.backend(name):
            return model(x)

    return call


def _row(
    config: Config,
    workload: tuple[int, int],
    dtype: torch.dtype,
    mode: str,
    provider: str,
    timing: Timing,
    dense: Timing,
) -> dict:
    batch, length = workload
    return {
        "stack": config.name,
        "layers": config.layers,
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "provider": provider,
        "median_us": 1e6 * timing.seconds,
        "spread": timing.spread,
        "tokens_per_s": batch * length / timing.seconds,
        "times_faster": dense.seconds / timing.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="stacks that any machine runs at once, in fp32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    data = {"about": provenance(arguments.device), "keep": KEEP, "rows": []}
    for reason in why_not_native(arguments.device):
        print(f"native is absent: {reason}")
    for config in TINY if arguments.tiny else CONFIGS:
        data["rows"] += measure(config, arguments.device, dtype)
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    for row in data["rows"]:
        print(
            f"{row['stack']:17} {row['batch']:3} x {row['length']:5} {row['mode']:6} {row['provider']:11} "
            f"{row['tokens_per_s']:12,.0f} tokens/s  {row['times_faster']:5.2f} x dense"
        )


if __name__ == "__main__":
    main()
