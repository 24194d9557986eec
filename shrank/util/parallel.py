"""Work on many layers at once, in threads and in processes: factorisations of single layers use several cores badly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from .processes import current
from .progress import track

T = TypeVar("T")
R = TypeVar("R")
# More layers at once would need more memory than the cores are worth.
_MOST_WORKERS = 8


def workers_for(weights: Iterable[Tensor]) -> int:
    """How many layers to work on at once: as many as torch uses threads, or one if any weight is on an accelerator."""
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    return min(torch.get_num_threads(), _MOST_WORKERS) if on_cpu else 1


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield function(item) in order, computed by this many threads, each on one core; by the caller's own if one.

    Measured on 2 cores, 384x384 to 1536x576 layers: 1.5 times as fast as one layer at a time on both cores
    (benchmarks/speed/bench_auto_fact.py).
    """
    if workers == 1:
        yield from map(function, items)
        return
    executor = ThreadPoolExecutor(workers, "shrank", initializer=torch.set_num_threads, initargs=(1,))
    try:
        items = iter(items)
        # A short queue: what waits there keeps its inputs and results in memory.
        waiting: deque[Future[R]] = deque(executor.submit(function, x) for x in islice(items, workers + 1))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(executor.submit(function, x) for x in islice(items, 1))
    finally:
        executor.shutdown(cancel_futures=True)


def dealt(
    function: Callable[[T], R], items: Sequence[T], costs: Sequence[float], workers: int, description: str
) -> list[R]:
    """function(item) for every item, in order, each computed by one of the `current` processes and sent to the others:
    R can be pickled, its tensors are on the CPU."""
    here = current()
    owners = here.owners(costs)
    own = [i for i, owner in enumerate(owners) if owner == here.rank]
    done = track(in_parallel(function, (items[i] for i in own), workers), description, total=len(own))
    results = {i: result for part in here.exchange(dict(zip(own, done, strict=True))) for i, result in part.items()}
    return [results[i] for i in range(len(items))]
