"""Commands in several processes that torchrun started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..util.processes import Processes, across_processes, current

if TYPE_CHECKING:
    from accelerate import Accelerator

# One may have much more to do than another, as where a file is written. torchrun itself ends all where one dies.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return count() == 1 or os.environ["RANK"] == "0"


@contextmanager
def group(wanted: bool) -> Iterator[None]:
    """Join the processes of torchrun, if there are any and it is wanted. None leaves before the first one does, which
    torchrun would end then, with what it still has to say."""
    if not wanted or count() == 1:
        yield
        return
    if not is_first():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            with suppress(RuntimeError):  # one that was killed does not come
                dist.barrier()
        dist.destroy_process_group()


def together(wanted: bool) -> AbstractContextManager[Processes]:
    """Let the processes of this group do together what is inside of the `with` block."""
    return across_processes() if wanted and count() > 1 else nullcontext(current())


def accelerator(accumulate: int, bf16: bool) -> Accelerator | None:
    """Of the processes here; None where nothing is asked of it."""
    if accumulate == 1 and not bf16:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision="bf16" if bf16 else "no")
