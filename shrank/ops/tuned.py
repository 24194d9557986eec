"""What was measured to be the fastest, on disk: a file for every problem, believed only where it holds.

Files of a user lie in the cache, for one build of the kernels, torch, driver and device (machine.py). Tables that come
with shrank lie in `tables` beside this file, one for each card: their tiles are looked at again wherever they are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..util.cache import name_of, read_facts, write_facts
from . import machine

SHIPPED = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Measured:
    """The fastest way to compute one problem.

    Args:
        key: The problem, as the native code calls it: csrc/select/measured.h.
        kernel: Which, as `shrank explain` calls it.
        grid: Of a matrix kernel: block_m, max_rank and blocks_n.
        microseconds: Of it, training and inference together halved.
        library_us: Of PyTorch's own calls, measured in turn with it.
        source: When and on what.
        times: Of all that were tried, by kernel and grid, in microseconds; of those that failed, why.
    """

    key: str
    kernel: str
    grid: tuple[int, ...]
    microseconds: float
    library_us: float
    source: str
    times: dict[str, float | str] = field(default_factory=dict)

    def tell(self) -> None:
        """To the native code of this process, which takes it from now on wherever it may run."""
        torch.ops.shrank.remember_measured(
            self.key, self.kernel, list(self.grid), self.microseconds, self.library_us, self.source
        )


def keep(device: str, measured: Measured) -> None:
    """Write the file of one problem; what another process wrote of it before is replaced."""
    path = machine.folder(device) / "tuned" / f"{name_of({'key': measured.key})}.json"
    write_facts(path, machine.facts(device), asdict(measured))


def load(device: str) -> list[Measured]:
    """All that holds for a device: the table of the card that comes with shrank, then what was measured here."""
    about = machine.facts(device)
    paths = sorted((machine.folder(device) / "tuned").glob("*.json"))
    here = (_measured(read_facts(path, about)) for path in paths)
    return [*shipped(str(about["device"])), *(each for each in here if each)]


def shipped(device_name: str) -> list[Measured]:
    """The table that comes with shrank for a card; empty where the card was not measured."""
    path = SHIPPED / f"{device_name.replace(' ', '_')}.json"
    listed = json.loads(path.read_text())["measured"] if path.exists() else []
    return [each for each in map(_measured, listed) if each]


def _measured(facts: object) -> Measured | None:
    """None for what is no measurement, as of another version of shrank with the same kernels."""
    if not isinstance(facts, dict) or facts.keys() | {"times"} != Measured.__dataclass_fields__.keys():
        return None
    words, times = (facts[name] for name in ("key", "kernel", "source")), facts.get("times", {})
    numbers = microseconds, library_us = facts["microseconds"], facts["library_us"]
    if not (
        all(isinstance(word, str) for word in words)
        and isinstance(facts["grid"], list)
        and all(type(number) is int and number >= 0 for number in facts["grid"])
        and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        and 0 < microseconds <= library_us  # never slower than PyTorch's own calls
        and isinstance(times, dict)
    ):
        return None
    return Measured(**{**facts, "grid": tuple(facts["grid"])})


_loaded: set[str] = set()


def use(device: str) -> None:
    """Tell the native code what is known of a device, once in a process."""
    if device not in _loaded:
        _loaded.add(device)
        for measured in load(device):
            measured.tell()


def adopt(device: str, others: Iterable[Measured]) -> None:
    """Take what another process knows in place of what this one knew, and keep what is new on this machine."""
    here = load(device)
    torch.ops.shrank.forget_measured()
    for measured in others:
        if measured not in here:
            keep(device, measured)
        measured.tell()
