"""What an Accelerator of accelerate decides of a healing: which processes do it, how many batches make a step, and in
which precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..calibration.batches import device_of
from ..util.processes import Processes, across_processes, current

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class Means:
    """How a healing computes. batches: that each process has in a step; precision: as accelerate calls it; autocast:
    around every run of a model."""

    batches: int = 1
    precision: str = "no"
    autocast: Callable[[], AbstractContextManager] = nullcontext


def means_of(accelerator: Accelerator | None, student: nn.Module) -> Means:
    """ValueError where it asks for what a healing does not do, or the student is elsewhere."""
    if accelerator is None:
        return Means()
    if accelerator.mixed_precision not in _PRECISIONS:
        raise ValueError(
            f"the accelerator has mixed_precision={accelerator.mixed_precision!r}, and heal takes "
            f"{' or '.join(map(repr, _PRECISIONS))}"
        )
    if (here := device_of(student)).type != accelerator.device.type:
        raise ValueError(
            f"the student is on {here} and the accelerator on {accelerator.device}: move the models there first, "
            "student.to(accelerator.device)"
        )
    return Means(accelerator.gradient_accumulation_steps, accelerator.mixed_precision, accelerator.autocast)


def together(accelerator: Accelerator | None) -> AbstractContextManager[Processes]:
    """The accelerator's processes do together what is inside of the `with` block, if they do not already."""
    alone = accelerator is None or accelerator.num_processes == 1 or current().size > 1
    return nullcontext(current()) if alone else across_processes()
