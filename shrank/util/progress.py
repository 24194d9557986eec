"""A progress bar for work that takes more than a second; nothing where standard error is no terminal, and of several
processes only the first one's."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from .processes import current

T = TypeVar("T")
_PATIENCE = 1.0  # seconds


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, showing how many are done once that has taken longer than a second; total: how many there are,
    if they cannot tell."""
    console = Console(stderr=True)
    if not (console.is_terminal and current().is_first):
        yield from items
        return
    started = time.monotonic()
    with Progress(console=console, transient=True, disable=False, auto_refresh=False) as progress:
        task = progress.add_task(description, total=len(items) if isinstance(items, Sized) else total, visible=False)
        for item in items:
            yield item
            progress.advance(task)
            if time.monotonic() - started > _PATIENCE:
                progress.update(task, visible=True, refresh=True)
