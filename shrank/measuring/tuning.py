"""Measures which kernel is the fastest for the problems that a model asks for, on the card at hand."""

from __future__ import annotations

import atexit
import datetime
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from ..ops import machine, tuned
from ..ops.apart import NotMade
from ..ops.truth import Truth
from ..ops.tuned import Measured
from ..util.progress import track
from .timing import Timing, copies_beyond_cache, time_in_turns
from .tuning_apart import faults
from .tuning_problem import Problem
from .ways import Way, failure, ways

# A kernel of ours is taken where it is faster by more than this, and by more than what its times spread over.
NEEDED_GAIN = 1.05
NOTHING: Mapping[tuple[str, str], str] = MappingProxyType({})
_ROUNDS = 15
_MOST_CALLS = 512
Call = Callable[[], object]
# As time_in_turns: (sequences of calls by name, device, rounds, whether into graphs, results held) -> times.
Clock = Callable[[dict[str, Sequence[Call]], str, int, bool, int], dict[str, Timing]]


def measure(
    problem: Problem, device: str, clock: Clock = time_in_turns, ended: Mapping[tuple[str, str], str] = NOTHING
) -> Measured:
    """Check every way to compute a problem, and time those that are right, in turns, on tensors that no cache holds.

    Args:
        problem: What is asked for.
        device: Such as "cuda:0".
        clock: What times sequences of calls.
        ended: The ways that must not run here, by key and name, and why.

    Returns:
        The fastest; PyTorch's own calls unless one of ours is faster by NEEDED_GAIN.
    """
    given = problem.arguments(device)
    all_ways, truth = ways(problem.op, given), Truth(problem.op.by_pytorch, given)
    failures = {
        way: reason
        for way in all_ways
        if (reason := ended.get((problem.key, str(way))) or failure(problem.op, given, way, truth))
    }
    del truth  # in fp64: larger than all that is timed
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


def _copied(given: tuple) -> tuple:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in given)


@contextmanager
def tune(device: str | None = None, clock: Clock = time_in_turns) -> Iterator[list[Measured]]:
    """Run a model in this block; at its end, what it asked of the native kernels is measured, and kept for next time.

    A problem that was measured before is not measured again. One for which memory is short is left out, with a warning.
    Of several processes of one torch.distributed group the first measures, and sends what it knows to the others, on
    whatever machine, so that all choose alike. Under deterministic algorithms nothing is measured: what is known is
    used.

    Args:
        device: The CUDA device that the model is on; by default the current one.
        clock: What times sequences of calls.

    Yields:
        A list that is filled at the end of the block with what was measured in it.

    Raises:
        RuntimeError: There is no CUDA device, or the native extension is not loaded; or the first process of the group
            could not measure, in the others.

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
    if _may_measure():
        _measure_together(asked, device, clock, done)


def _may_measure() -> bool:
    if torch.are_deterministic_algorithms_enabled():
        warnings.warn("deterministic algorithms are on: nothing is measured, what is known is used", stacklevel=4)
        return False
    return True


def tune_this_process() -> None:
    """What SHRANK_TUNE=1 asks for: everything that this process asks of the native kernels is measured when it ends.

    Processes end at times of their own, so none waits for another: of those that torchrun started on a machine the
    first measures, for the next run of all.
    """
    if hasattr(torch.ops.shrank, "note_problems"):
        torch.ops.shrank.note_problems(True)
        atexit.register(_measure_at_exit)


def _measure_at_exit() -> None:
    asked = json.loads(torch.ops.shrank.noted_problems())
    torch.ops.shrank.note_problems(False)
    if asked and torch.cuda.is_initialized() and os.environ.get("LOCAL_RANK", "0") == "0" and _may_measure():
        _measure_new(asked, f"cuda:{torch.cuda.current_device()}", time_in_turns, [])


def _measure_together(asked: dict[str, dict], device: str, clock: Clock, done: list[Measured]) -> None:
    """As `_measure_new`, by the first process of a group for all; they hear from it even if it fails."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        _measure_new(asked, device, clock, done)
        return
    is_first = torch.distributed.get_rank() == 0
    known: list[list[Measured] | None] = [None]
    try:
        if is_first:
            _measure_new(asked, device, clock, done)
            known = [tuned.load(device)]
    finally:
        torch.distributed.broadcast_object_list(known, src=0)
    if known[0] is None:
        raise RuntimeError("the first process of the group could not measure; its own error says why")
    if not is_first:
        tuned.adopt(device, known[0])


def _measure_new(asked: dict[str, dict], device: str, clock: Clock, done: list[Measured]) -> None:
    """Measure what is not known yet, keep it, and add it to `done`."""
    known = {each.key for each in tuned.load(device)}
    problems = [Problem(key, numbers) for key, numbers in asked.items() if key not in known]
    problems = [problem for problem in problems if problem.is_tunable]
    ended = _faults(problems, device) if problems and device.startswith("cuda") else NOTHING
    for problem in track(problems, "tuning"):
        try:
            measured = measure(problem, device, clock, ended)
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{problem.key} is not measured on {device}: {error}", stacklevel=2)
            continue
        tuned.keep(device, measured)
        measured.tell()
        done.append(measured)


def _faults(problems: Sequence[Problem], device: str) -> Mapping[tuple[str, str], str]:
    try:
        return faults(problems, device)
    except NotMade as error:
        warnings.warn(
            f"no other process reaches {device} ({error}): kernels are tried in this one, which a broken one may end",
            stacklevel=2,
        )
        return NOTHING


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
