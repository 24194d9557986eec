"""Healing: the factors of a compressed model are trained to match the dense one's outputs (knowledge distillation)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..calibration.batches import Batch, as_batches, bound
from ..calibration.losses import LossLike, as_training_loss
from ..calibration.sameness import agree_on
from ..calibration.streams import warn_of_masks_that_fit_nothing
from ..layers.corrected import CorrectedLinear
from ..layers.quantized import is_quantized
from ..model.notes import HEALING, note
from ..model.storage import with_pivots, with_plain_factors
from ..util.names import checks_keywords
from ..util.processes import Processes
from .accelerated import means_of, together
from .options import LEARNING_RATE, HealOptions, RunOptions
from .recorded import RecordedLogits
from .run import Run
from .schedule import split

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Healing:
    """What healing did.

    Args:
        steps: Steps that were taken.
        best_step: The step whose weights were kept.
        curve: (step, held-out loss) of every evaluation.
    """

    steps: int
    best_step: int
    curve: tuple[tuple[int, float], ...]

    @property
    def before(self) -> float:
        """The held-out loss before the first step."""
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """The held-out loss of the weights that were kept."""
        return min(loss for _, loss in self.curve)


_DEFAULTS = HealOptions()


@checks_keywords
def heal(
    student: nn.Module,
    teacher: nn.Module | RecordedLogits,
    data: Iterable[object],
    *,
    steps: int = 300,
    learning_rate: float = LEARNING_RATE,
    loss: LossLike = "none",
    held_out: Iterable[object] | None = None,
    checkpoint: str | os.PathLike | None = None,
    options: HealOptions = _DEFAULTS,
    accelerator: Accelerator | None = None,
) -> nn.Module:
    """Distil a compressed model against the dense one, in place.

    What is minimised is the divergence of the logits (Hinton et al., 2015), or where there are none the relative error
    of the output, plus `options.hidden` times the mean relative error of the blocks' outputs, plus half the mean of the
    task's own `loss`. What both models rule out by logits of -inf does not count, nor does padding. Weights in 16 bits
    are trained through copies in 32, pivoted layers with plain factors.

    Args:
        student: The compressed model.
        teacher: The dense model, which is not changed; or what `record_logits` kept of it for all of the data, which
            needs `options.hidden=0`.
        data: What `shrank.batches` made, or takes without further arguments; one batch a step, in a random order.
        steps: At least 1.
        learning_rate: Of the start; where an evaluation is worse than one before, training goes on from the best
            weights at a third of the rate.
        loss: Of the task, to train on as well: "lm" (next-token cross entropy), a function (output, batch) -> scalar,
            summed over rows of the output, or "none".
        held_out: Data that decides which weights are best; by default a tenth of `data`, which then is not trained on.
        checkpoint: A file to resume from, written at every evaluation.
        options: Which parameters are trained, and how.
        accelerator: Of accelerate, with mixed precision "no" or "bf16". A step then takes one batch for each of its
            processes and each of its gradient_accumulation_steps. All processes are given the same models, data and
            options, and all end with the same student, which is whole in each. The same happens inside of
            `across_processes`.

    Returns:
        The student with the best weights it had. Its `shrank_healing` notes what happened.

    Raises:
        ValueError: Arguments do not fit, or the checkpoint is of another healing.
        RuntimeError: The loss is not finite; the text names the batch and the model. The student then is as good as it
            was at best.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    task, means = as_training_loss(loss), means_of(accelerator, student)
    _check(student, teacher, options)
    calls = partial(_calls, student if isinstance(teacher, RecordedLogits) else teacher)
    batches, held = split(calls(data)) if held_out is None else (calls(data), calls(held_out))
    student, pivots = with_plain_factors(student)
    try:
        with together(accelerator) as here:
            _check_teacher(teacher, here)
            how = RunOptions(
                **asdict(options),
                steps=steps,
                learning_rate=learning_rate,
                batches=means.batches * here.size,
                precision=means.precision,
            )
            agree_on(student, (*batches, *held))
            here.agree("the options of healing", how)
            run = Run(student, teacher, batches, held, how, task, means)
            run.all_of_it(Path(checkpoint) if checkpoint else None)
        warn_of_masks_that_fit_nothing((*batches, *held))
    finally:
        student = with_pivots(student, pivots)
    note(student, HEALING, Healing(run.step, run.best_step, tuple(run.curve)))
    return student


def _check(student: nn.Module, teacher: nn.Module | RecordedLogits, options: HealOptions) -> None:
    if isinstance(student, DistributedDataParallel):
        raise ValueError("the student is wrapped in DistributedDataParallel: give student.module and an accelerator")
    if sharded := [name for name, p in student.named_parameters() if hasattr(p, "full_tensor")]:
        raise ValueError(
            f"the student is split between processes, {sharded[0]} for one: every process must hold all of it; "
            "shrank.DistillationTrainer trains sharded ones"
        )
    bases = {id(p) for m in student.modules() if isinstance(m, CorrectedLinear) for p in m.base.parameters()}
    if on_grid := [name for name, p in student.named_parameters() if is_quantized(p) and id(p) not in bases]:
        raise ValueError(
            f"weights of few bits do not train, {on_grid[0]} for one: heal the model first, then quantize its factors"
        )
    if isinstance(teacher, RecordedLogits) and options.hidden:
        raise ValueError("recorded logits have no outputs of blocks: give options=HealOptions(hidden=0)")


def _check_teacher(teacher: nn.Module | RecordedLogits, here: Processes) -> None:
    """ValueError where processes that run data of their own must all run the same."""
    if here.size == 1 or isinstance(teacher, RecordedLogits):
        return
    if any(hasattr(p, "full_tensor") for p in teacher.parameters()):
        from torch.distributed.fsdp import FSDPModule

        if not any(isinstance(m, FSDPModule) for m in teacher.modules()):
            raise ValueError(
                "the teacher is split by tensor parallelism, whose processes must all run the same data, and healing "
                "gives each process its own: shard it with fully_shard, or give what record_logits kept of it"
            )


def _calls(teacher: nn.Module, data: Iterable[object]) -> list[Batch]:
    return bound(as_batches(data), teacher)
