"""Measures which kernel is the fastest for the problems that a model asks for, on the card at hand."""

from __future__ import annotations

import atexit
import datetime
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import machine, tuned
from ..ops.conv import CONV
from ..ops.linear import LINEAR
from ..ops.registration import Op
from ..ops.tuned import Measured
from ..util.closeness import distance
from ..util.progress import track
from .timing import Timing, copies_beyond_cache, time_in_turns

# A kernel of ours is taken where it is faster by more than this, and by more than what its times spread over.
NEEDED_GAIN = 1.05
GRIDS = 3  # of every matrix kernel, the cheapest by the model
_ROUNDS = 15
_SEQUENCE_SECONDS = 2e-3  # a sequence of calls lasts about this long, so that its start does not count
_MOST_CALLS = 512
Call = Callable[[], object]
# As time_in_turns: (sequences of calls by name, device, rounds, whether into graphs, results held) -> times.
Clock = Callable[[dict[str, Sequence[Call]], str, int, bool, int], dict[str, Timing]]


@dataclass(frozen=True)
class Problem:
    """What a model asked for: the numbers that the native code notes (csrc/select/problem_json.cpp), by its key."""

    key: str
    numbers: dict

    @property
    def op(self) -> Op:
        return LINEAR if "M" in self.numbers else CONV

    @property
    def is_tunable(self) -> bool:
        """Whether there is anything to choose: where rows are not aligned, only PyTorch's own calls run."""
        return self.numbers.get("aligned", True) and self.numbers.get("channels_last", True)

    def arguments(self, device: str) -> tuple:
        """The op's arguments: random, with outputs of about unit variance."""
        n = self.numbers
        dtype = getattr(torch, n["dtype"])

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, device=device) / max(fan_in, 1) ** 0.5).to(dtype)

        if self.op is LINEAR:
            M, K, N, R = (n[name] for name in "MKNR")
            tensors, y = (draw(M, K), draw(R, K, fan_in=K), draw(N, R, fan_in=R)), (M, N)
            window: tuple = ()
        else:
            tensors, y, window = self._convolution(draw)
        residual = draw(*y) if n["residual"] else None
        if residual is not None and len(y) > 2:
            residual = _channels_last(residual)
        bias = draw(n["N"]) if n["bias"] else None
        return (*tensors, bias, *window, n["activation"], residual)

    def _convolution(self, draw: Callable[..., Tensor]) -> tuple:
        n = self.numbers
        # Noted in three dimensions: those before the first that is more than a point were not there.
        first = next((i for i in range(2) if n["input"][i] != 1 or n["kernel"][i] != 1), 2)
        size, kernel, out = (n[name][first:] for name in ("input", "kernel", "output"))
        C, N, R, groups, up_groups = (n[name] for name in ("C", "N", "R", "groups", "up_groups"))
        x = _channels_last(draw(n["batch"], C, *size))
        down = _channels_last(draw(R, C // groups, *kernel, fan_in=math.prod(kernel) * C // groups))
        up = draw(N, R // up_groups, *(1 for _ in size), fan_in=R // up_groups)
        pads = [pad for pair in zip(n["begin"][first:], n["end"][first:], strict=True) for pad in pair]
        window = (n["stride"][first:], pads, n["dilation"][first:], groups, up_groups)
        return (x, down, up), (n["batch"], N, *out), window


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Way:
    """A kernel by its name, and of a matrix kernel block_m, max_rank and blocks_n."""

    kernel: str
    grid: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join([self.kernel, "x".join(map(str, self.grid))]).strip()

    @property
    def is_library(self) -> bool:
        return self.kernel.startswith("two_")


def measure(problem: Problem, device: str, clock: Clock = time_in_turns) -> Measured:
    """Check every way to compute a problem, and time those that are right, in turns, on tensors that no cache holds.

    Args:
        problem: What is asked for.
        device: Such as "cuda:0".
        clock: What times sequences of calls.

    Returns:
        The fastest; PyTorch's own calls unless one of ours is faster by NEEDED_GAIN.
    """
    given = problem.arguments(device)
    all_ways = ways(problem.op, given)
    failures = {way: reason for way in all_ways if (reason := failure(problem.op, given, way))}
    right = [way for way in all_ways if way not in failures]
    library = [way for way in right if way.is_library]
    if not library:
        reasons = "; ".join(f"{way}: {reason}" for way, reason in failures.items())
        raise RuntimeError(f"nothing computes {problem.key} right on {device}: {reasons}")
    sizes = sum(each.numel() * each.element_size() for each in given if isinstance(each, Tensor))
    sets = [given, *(_copied(given) for _ in range(min(copies_beyond_cache(sizes, device), _MOST_CALLS) - 1))]
    captured = bool(problem.numbers.get("captured", False))

    def calls(way: Way, training: bool) -> list[Call]:
        return [lambda each=each: problem.op.run_named(each, way.kernel, way.grid, training) for each in sets]

    found = [
        clock({str(way): calls(way, training) for way in right}, device, _ROUNDS, captured, len(sets))
        for training in (False, True)
    ]
    times = {way: sum(part[str(way)].seconds for part in found) / len(found) for way in right}
    spread = {way: max(part[str(way)].spread for part in found) for way in right}
    base = min(library, key=times.__getitem__)
    best = min(right, key=times.__getitem__)
    if times[base] < times[best] * max(NEEDED_GAIN, 1 + spread[best] + spread[base]):
        best = base
    about = machine.facts(device)
    source = f"{datetime.date.today().isoformat()}, {about['device']}, torch {about['torch']}"
    shown = {str(way): round(1e6 * seconds, 3) for way, seconds in times.items()}
    return Measured(
        problem.key,
        best.kernel,
        best.grid,
        1e6 * times[best],
        1e6 * times[base],
        source,
        shown | {str(way): reason for way, reason in failures.items()},
    )


def ways(op: Op, given: tuple, grids: int = GRIDS) -> list[Way]:
    """Every way to compute this: of each matrix kernel so many grids, the cheapest by the model."""
    listed = json.loads(getattr(torch.ops.shrank, f"{op.name}_choices")(*given, grids))
    activation, residual = given[-2:]
    ends = activation != "none" or residual is not None
    found = [
        Way(each["kernel"], tuple(each["grid"][n] for n in ("block_m", "max_rank", "blocks_n")) if each["grid"] else ())
        for each in listed
    ]
    # Two calls alone apply no end: the epilogue's pass is then the least that PyTorch's way takes.
    return [way for way in found if not (ends and way.kernel in ("two_gemms", "two_convs"))]


def failure(op: Op, given: tuple, way: Way) -> str:
    """What is wrong with a way, by the rule of the tests; "" if nothing is."""
    try:
        found = op.run_named(given, way.kernel, way.grid)
    except RuntimeError as error:
        return str(error)
    wide = tuple(each.double() if isinstance(each, Tensor) else each for each in given)
    return distance(found.y, op.forward(*op.packed(wide)).y, op.forward(*op.packed(given)).y)


def _copied(given: tuple) -> tuple:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in given)


@contextmanager
def tune(device: str | None = None, clock: Clock = time_in_turns) -> Iterator[list[Measured]]:
    """Run a model in this block; at its end, what it asked of the native kernels is measured, and kept for next time.

    A problem that was measured before is not measured again. Of several processes of one torch.distributed group the
    first measures, and the others read what it found, so that all choose alike. Under deterministic algorithms nothing
    is measured: what is known is used.

    Args:
        device: The CUDA device that the model is on; by default the current one.
        clock: What times sequences of calls.

    Yields:
        A list that is filled at the end of the block with what was measured in it.

    Raises:
        RuntimeError: There is no CUDA device, or the native extension is not loaded.

    Example:
        with shrank.tune():
            model(x)
    """
    if (device is None or device.startswith("cuda")) and not torch.cuda.is_available():
        raise RuntimeError("shrank.tune measures on a CUDA device, and there is none here")
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}"
    if not hasattr(torch.ops.shrank, "note_problems"):
        raise RuntimeError("shrank.tune measures the native kernels, and the native extension is not loaded")
    tuned.use(device)
    torch.ops.shrank.note_problems(True)
    done: list[Measured] = []
    try:
        yield done
        asked = json.loads(torch.ops.shrank.noted_problems())
    finally:
        torch.ops.shrank.note_problems(False)
    _measure_new(asked, device, clock, done)


def tune_this_process() -> None:
    """What SHRANK_TUNE=1 asks for: everything that this process asks of the native kernels is measured when it ends."""
    if hasattr(torch.ops.shrank, "note_problems"):
        torch.ops.shrank.note_problems(True)
        atexit.register(_measure_at_exit)


def _measure_at_exit() -> None:
    asked = json.loads(torch.ops.shrank.noted_problems())
    torch.ops.shrank.note_problems(False)
    if asked and torch.cuda.is_initialized():
        _measure_new(asked, f"cuda:{torch.cuda.current_device()}", time_in_turns, [])


def _measure_new(asked: dict[str, dict], device: str, clock: Clock, done: list[Measured]) -> None:
    """Measure what is not known yet, keep it, and add it to `done`."""
    if torch.are_deterministic_algorithms_enabled():
        warnings.warn("deterministic algorithms are on: nothing is measured, what is known is used", stacklevel=4)
        return
    if _rank() == 0:
        known = {each.key for each in tuned.load(device)}
        problems = [Problem(key, numbers) for key, numbers in asked.items() if key not in known]
        for problem in track([each for each in problems if each.is_tunable], "tuning"):
            measured = measure(problem, device, clock)
            tuned.keep(device, measured)
            measured.tell()
            done.append(measured)
    if _is_distributed():
        torch.distributed.barrier()
        tuned.reload(device)


@torch.no_grad()
def run_in_graph(run: Callable[[], object]) -> None:
    """Record what a model does into a CUDA graph, so that `tune` sees what it asks there; nothing is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made at a first call is not part of a graph
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        run()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0
