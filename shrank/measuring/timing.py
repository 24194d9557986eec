"""Times calls in turns: by the wall clock, or on CUDA by events around replayed graphs."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_ASSUMED_L3 = 32 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds per call, the median of all rounds, and the distance of their quartiles over that median."""

    seconds: float
    spread: float


def time_in_turns(
    candidates: dict[str, Sequence[Call]], device: str, rounds: int, graphs: bool = True, held: int = 1
) -> dict[str, Timing]:
    """Time sequences of like calls, each in its turn, so that a change in the machine's load meets all alike.

    Calls that each have tensors of their own, together larger than the last cache, find none of them in it. On CUDA
    a sequence becomes a graph, unless `graphs` is false; the newest `held` results live on while it is captured, so
    that results rotate too. Raises RuntimeError where a call cannot be captured.
    """
    prepare = _replayed if graphs and device != "cpu" else _called
    clocks = {name: prepare(calls, device, held) for name, calls in candidates.items()}
    for clock in clocks.values():
        clock()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, clock in clocks.items():
            samples[name].append(clock() / len(candidates[name]))
    return {name: summary(values) for name, values in samples.items()}


def summary(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (median,) * 3
    return Timing(median, (upper - lower) / median)


def copies_beyond_cache(size: int, device: str) -> int:
    """How many sets of tensors of `size` bytes take twice the last cache: at least 2."""
    return max(2, math.ceil(2 * cache_bytes(device) / size))


def cache_bytes(device: str) -> int:
    """The last cache before memory: L2 of a CUDA device, L3 of a CPU (32 MiB if the system does not say)."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    if not _L3.exists():
        return _ASSUMED_L3
    return int(_L3.read_text().strip().removesuffix("K")) << 10  # Linux writes kibibytes


def _called(calls: Sequence[Call], device: str, held: int) -> Callable[[], float]:
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None

    def clock() -> float:
        wait()
        started = time.perf_counter()
        for call in calls:
            call()
        wait()
        return time.perf_counter() - started

    return clock


def _replayed(calls: Sequence[Call], device: str, held: int) -> Callable[[], float]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, loads modules, makes workspaces of libraries
            calls[0]()
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), deque(maxlen=held)
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            results.append(call())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock
