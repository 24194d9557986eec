"""Distillation by the Trainer of transformers, which brings all else: processes, sharding, precision, checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from transformers import Trainer

from ..calibration.batches import as_batches, bound
from ..model.hooks import hooked
from .distance import distance, masking_of_blocks
from .parts import trained_parameters


class DistillationTrainer(Trainer):
    """transformers' Trainer, which trains a compressed model to match the dense one's outputs.

    The loss is that of `heal`: the divergence of the logits, or where there are none the relative error of the output,
    plus that of the blocks' outputs. Padding does not count. Everything else is the Trainer's: accumulation, precision,
    DistributedDataParallel, FSDP, activation checkpointing, schedules, evaluation, checkpoints and resuming.

    Args:
        *args: Of Trainer.
        teacher: The dense model. It is put where the Trainer puts models for evaluation, unless accelerate has placed
            it.
        hidden: Weight of the mean relative error of the blocks' outputs.
        task: Weight of the model's own loss, for data with labels.
        train: The parameters of the "low_rank" and narrowed layers, or "all"; others stop requiring gradients.
        **kwargs: Of Trainer.

    Raises:
        ValueError: The model has no low-rank layers to train.
    """

    loss_is_scaled_for_ga = False  # a mean of the batch

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        hidden: float = 1.0,
        task: float = 0.0,
        train: Literal["low_rank", "all"] = "low_rank",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.hidden, self.task = hidden, task
        student = self.accelerator.unwrap_model(self.model)
        chosen = {id(p) for p in trained_parameters(student, train).values()}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        placed = any(hasattr(m, "_hf_hook") for m in teacher.modules())
        self.teacher = teacher if placed else self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.teacher.eval()
        self._masking = masking_of_blocks(student, self.accelerator.unwrap_model(self.teacher), ())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The mean distance of a batch from the dense model; as the Trainer calls it.

        Args:
            model: The compressed model, wrapped or not.
            inputs: Keyword arguments of both models.
            return_outputs: Whether to return the compressed model's output too.
            num_items_in_batch: Not used: the loss is a mean.

        Returns:
            The loss, scalar, or it and the output.
        """
        student = self.accelerator.unwrap_model(model)
        (batch,) = bound(as_batches([inputs]), student)
        self._masking.prepare([batch])
        outputs: list[object] = []
        with hooked([(model, lambda *seen: outputs.append(seen[-1]))]):
            loss = distance(student, self.teacher, batch, self._masking, self.hidden, called=model)
        (output,) = outputs
        if self.task and (own := getattr(output, "loss", None)) is not None:
            loss = loss + self.task * own
        return (loss, output) if return_outputs else loss
