"""What one call of the op costs on the host beside one F.linear, and the two that it replaces: M=1, K=N=64, R=16. And
what one op of a gated layer, or of three layers of one input, costs beside the calls of the layers one by one.

Without a GPU the C++ op runs two F.linear inside, through torch's dispatcher, where that for CUDA launches kernels.

On a CPU the C++ implementation must be loaded before shrank, so a process of its own measures:

    python -m benchmarks.speed.bench_host_cost --library build/cmake/libshrank.so
    python -m benchmarks.speed.bench_host_cost --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

ROOT = Path(__file__).parents[2]  # that of benchmarks.provenance, which imports shrank: the library must come before
LIBRARY = ROOT / "build" / "cmake" / "libshrank.so"
BAR_US, INFERENCE_BAR_US = 6.0, 3.0
CALLS, PROCESSES = 2000, 3
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def measure(device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Per mode, in microseconds per call: two F.linear, and what the op and shrank.low_rank_linear cost above them, and
    the latter above one; a gated layer and three layers, by their own op and by those of the layers.

    On CUDA the clock stops when the device is done, which at this size waits for the host.
    """
    import shrank
    from shrank.measuring.timing import time_in_turns

    torch.manual_seed(0)
    x = torch.randn(1, 64, device=device)
    down, up, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((16, 64), (64, 16), (64,)))
    op = torch.ops.shrank.low_rank_linear

    def layer() -> Tensor:
        return shrank.low_rank_linear(x, down, up, bias, backend="native")

    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: linear(x, down),
        "two_linears": lambda: linear(linear(x, down), up, bias),
        "op": lambda: op(x, down, up, bias),
        "api": layer,
        "gated_by_layers": lambda: silu(layer()) * layer(),
        "gated": lambda: shrank.low_rank_gated(x, down, up, bias, down, up, bias, backend="native"),
        "three_by_layers": lambda: (layer(), layer(), layer()),
        "three": lambda: shrank.low_rank_linear_multi(x, [down] * 3, [up] * 3, [bias] * 3, backend="native"),
    }
    costs = {}
    for name, mode in MODES.items():
        with mode(), _taken_for_cuda(device):
            found = time_in_turns({each: [call] * CALLS for each, call in calls.items()}, device, rounds, graphs=False)
        base = found["two_linears"].seconds
        costs[name] = {
            "two_linears_us": 1e6 * base,
            **{f"{each}_above_us": 1e6 * (found[each].seconds - base) for each in ("op", "api")},
            "api_above_one_us": 1e6 * (found["api"].seconds - found["linear"].seconds),
            **{f"{each}_us": 1e6 * found[each].seconds for each in calls if each.startswith(("gated", "three"))},
        }
    return costs


@contextmanager
def _taken_for_cuda(device: str) -> Iterator[None]:
    """On a CPU, let shrank.low_rank_linear go the way that it goes with CUDA tensors."""
    if device != "cpu":
        yield
        return

    from shrank.ops import availability  # not before the library is loaded

    names = ("low_rank_linear", "low_rank_linear_multi", "low_rank_gated")
    known = {(name, torch.device("cpu"), torch.float32) for name in names}  # as after the first call on a card
    with patch.object(availability, "_known", known):
        yield


@cache
def measured_apart() -> dict[str, dict[str, float]]:
    """Medians over processes that each load the C++ implementation for the CPU first: they differ by up to 2 us."""
    runs = [_process() for _ in range(PROCESSES)]
    return {
        mode: {figure: statistics.median(run[mode][figure] for run in runs) for figure in figures}
        for mode, figures in runs[0].items()
    }


def _process() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.speed.bench_host_cost", "--library", str(LIBRARY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", MODES)
def bench_host_cost(mode: str, benchmark, report) -> None:
    if not LIBRARY.exists():
        pytest.skip("the C++ ops for the CPU are not built: make build/cmake/.ready")
    costs = benchmark.pedantic(measured_apart, rounds=1)[mode]
    report("microseconds, two F.linear", costs["two_linears_us"], "-")
    report("microseconds above them, the op", costs["op_above_us"], f"<= {BAR_US:g}")
    report("microseconds above them, low_rank_linear", costs["api_above_us"], "-")
    bar = "-" if mode == "grad" else f"<= {INFERENCE_BAR_US:g}"
    report("microseconds above one F.linear, low_rank_linear", costs["api_above_one_us"], bar)
    for name in ("gated", "three"):
        report(
            f"microseconds, {name}, by its op over by layers", costs[f"{name}_us"] / costs[f"{name}_by_layers_us"], "-"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--library", type=Path, help="the C++ ops for the CPU")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.library:
        torch.ops.load_library(str(arguments.library))
    costs = json.dumps(measure(arguments.device, arguments.rounds), indent=1)
    if arguments.out:
        arguments.out.write_text(costs + "\n")
    print(costs)


if __name__ == "__main__":
    main()
