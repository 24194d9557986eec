"""Work that several processes do together: each does a share, and all have what came of it.

Before anything is passed between them there is an `exchange`, where the failure of one reaches all others.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another process failed; the text says which, and why."""


@dataclass(frozen=True)
class _Failure:
    text: str


class Processes:
    """The processes that work together here, and which of them this one is: one alone, without a group.

    Args:
        group: Of torch.distributed; None for one process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """What each process gives here, by rank; PeerFailed where one failed on its way here."""
        if self._group is None:
            return [value]
        values: list = [None] * self.size
        with _in_contact():
            dist.all_gather_object(values, value, group=self._group)
        failed = {rank: found.text for rank, found in enumerate(values) if isinstance(found, _Failure)}
        if failed and not isinstance(value, _Failure):
            rank, text = min(failed.items())
            raise PeerFailed(f"process {rank} of {self.size} failed: {text}")
        return values

    def agree(self, what: str, value: object) -> None:
        """ValueError where the processes give other values, compared by what they look like."""
        if self._group is None:
            return
        values = self.exchange(hashlib.sha256(repr(value).encode()).digest())
        if unlike := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise ValueError(
                f"process {unlike[0]} of {self.size} was not given {what} that process 0 was: all must be given the "
                "same, of which each does a share"
            )

    def share(self, items: Iterable[T]) -> list[T]:
        """This process's part of a list that all have."""
        return list(items)[self.rank :: self.size]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process does each item, so that all have about the same to do."""
        owners, loads = [0] * len(costs), [(0.0, rank) for rank in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, owners[item] = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[item], owners[item]))
        return owners

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that the processes have, in place; PeerFailed as of `exchange`."""
        if self._group is not None:
            self.exchange(None)  # nobody waits for a tensor of one that failed
            with _in_contact():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def sent(self, owner: int, tensor: Tensor) -> Tensor:
        """The owner's tensor, in place of this one of its shape; PeerFailed as of `exchange`."""
        if self._group is not None:
            self.exchange(None)
            with _in_contact():
                dist.broadcast(tensor, group=self._group, group_src=owner)
        return tensor


class across_processes:
    """Let the processes of a group do together what is called inside the `with` block.

    Inside, every process calls the same functions of shrank with the same model, the same data and the same options.
    Each runs its share of the data and factorises its share of the layers, and all end with the same model. Outside of
    such a block shrank never communicates, whether torch.distributed is initialised or not. An error of one process
    ends the block in all of them.

    Args:
        group: Of torch.distributed, which must be initialised; by default all processes.

    Returns:
        To `as`, the processes: `rank` is the number of this one, `size` how many there are, `is_first` whether this one
        is to print and write.

    Raises:
        RuntimeError: torch.distributed is not initialised; or, from inside of the block, another process failed.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "across_processes: torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first, in every process that torchrun starts"
            )
        self._here = Processes(group or dist.group.WORLD)

    def __enter__(self) -> Processes:
        self._before = _current.set(self._here)
        return self._here

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _current.reset(self._before)
        if error is None:
            self._here.exchange(None)  # a process that is behind may still fail
        elif isinstance(error, Exception) and not isinstance(error, PeerFailed):
            self._here.exchange(_Failure(str(error) or type(error).__name__))


_ALONE = Processes()
_current: ContextVar[Processes] = ContextVar("processes", default=_ALONE)


def current() -> Processes:
    """Those that `across_processes` is about; outside of it this process alone."""
    return _current.get()


@contextmanager
def _in_contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerFailed(f"lost another process, which may have been killed: {str(error).splitlines()[0]}") from error
