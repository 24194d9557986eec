"""One healing, step by step: what is trained, evaluated, kept and written."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.losses import NotComparable, TrainingLoss
from ..compression.masters import Masters
from ..compression.schedule import batch_of_step, rate
from ..model.hooks import in_eval_mode
from ..util import tensor_file
from ..util.fingerprint import Unhashable, fingerprint
from ..util.processes import current
from ..util.progress import track
from .accelerated import Means
from .distance import distance, masking_of_blocks
from .options import RunOptions
from .parts import outermost_blocks, run_again, trained_parameters
from .recorded import RecordedLogits

_AFTER_A_SETBACK = 1 / 3  # of the rate, from the best weights on


class Run:
    """One healing: the models, the masters of the trained weights in float32, and how far it has come.

    distance: of the student from the dense model in one batch. teacher: that model, where it is there.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | RecordedLogits,
        batches: list[Batch],
        held: list[Batch],
        options: RunOptions,
        loss: TrainingLoss | None,
        means: Means,
    ) -> None:
        self.student, self.teacher, self.batches, self.held = student, teacher, batches, held
        self.options, self.loss, self.means = options, loss, means
        self.trained = trained_parameters(student, options.train)
        self.masters = Masters(self.trained)
        self.best = self.masters.copies()
        self.optimizer = self.masters.optimizer(options.learning_rate)
        if isinstance(teacher, RecordedLogits):
            self.models = (student,)
            self.distance = partial(teacher.distance, student, loss=loss)
        else:
            self.models = (student, teacher)
            masking = masking_of_blocks(student, teacher, (*batches, *held))
            self.distance = partial(distance, student, teacher, masking=masking, hidden=options.hidden, loss=loss)
        blocks = outermost_blocks(student) if options.recompute else []
        self.again = partial(run_again, student, blocks) if blocks else nullcontext
        self.step, self.best_step, self.curve = 0, 0, []

    def all_of_it(self, checkpoint: Path | None) -> None:
        """Train, and leave the student with its best weights and both models' flags as they were."""
        self.key = self._key_of() if checkpoint is not None else ""
        flags = {p: p.requires_grad for model in self.models for p in model.parameters()}
        try:
            with in_eval_mode(*self.models):  # with dropout the teacher's outputs could not be reached
                for parameter in flags:
                    parameter.requires_grad_(False)
                for parameter in self.trained.values():
                    parameter.requires_grad_(True)
                self.train(checkpoint)
        finally:
            self.take_best()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def train(self, checkpoint: Path | None) -> None:
        if checkpoint is not None and _is_there(checkpoint):
            self._resume(checkpoint)
        if not self.curve:
            self._evaluate()
        todo = range(self.step, self.options.steps)
        for _ in track(todo, "healing"):
            self._take_step()
            if self.step % self.options.evaluate_every == 0 or self.step == self.options.steps:
                self._evaluate()
                if checkpoint is not None and current().is_first:
                    self._save(checkpoint)

    def take_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.best[name])
                parameter.grad = None

    def _take_step(self) -> None:
        count = self.options.batches
        self.masters.clear_gradients()
        for number in current().share(range(self.step * count, (self.step + 1) * count)):
            loss = self._loss(batch_of_step(self.batches, number, self.options.seed), "")
            (loss / count).backward()
            self.masters.take_gradients()
        self.masters.step(
            self.optimizer, self.options.learning_rate * rate(self.step, self.options.steps) * self._slowed()
        )
        self.step += 1

    @torch.no_grad()
    def _evaluate(self) -> None:
        loss = self._held_out_loss()
        if not self.curve or loss < min(value for _, value in self.curve):
            self.best_step = self.step
            self.best = self.masters.copies()
        else:
            self.masters.take(self.best)
            for master in self.masters.values():
                self.optimizer.state[master]["exp_avg"].zero_()
        self.curve.append((self.step, loss))

    def _held_out_loss(self) -> float:
        """Every process runs as many batches, some twice: a teacher that is sharded between them waits for all."""
        here, count = current(), len(self.held)
        own = here.share(i % count for i in range(-(-count // here.size) * here.size))
        losses = {i: self._loss(self.held[i], "held-out ").item() for i in own}
        losses = {i: loss for part in here.exchange(losses) for i, loss in part.items()}
        return sum(losses[i] for i in range(count)) / count

    def _slowed(self) -> float:
        """What setbacks have left of the rate."""
        losses = [loss for _, loss in self.curve]
        return _AFTER_A_SETBACK ** sum(loss >= min(losses[:i]) for i, loss in enumerate(losses) if i)

    def _loss(self, batch: Batch, kind: str) -> Tensor:
        """Of one batch; RuntimeError where it is not finite."""
        try:
            with self.means.autocast(), self.again():
                loss = self.distance(batch=batch)
            if bool(loss.isfinite()):
                return loss
            problem = NotComparable(f"the loss is {loss.item()}")
        except NotComparable as error:
            problem = error
        raise RuntimeError(
            f"step {self.step}, {kind}batch {batch.number}: {problem}; the student has its best "
            f"weights, of step {self.best_step}; a smaller learning_rate may help"
        ) from problem

    def _save(self, path: Path) -> None:
        state = self.optimizer.state
        tensors = {
            f"{part}:{name}": value
            for name, master in self.masters.items()
            for part, value in (
                ("master", master),
                ("best", self.best[name]),
                *((key, state[master][key]) for key in ("exp_avg", "exp_avg_sq", "step")),
            )
        }
        metadata = {
            "key": self.key,
            "step": str(self.step),
            "best_step": str(self.best_step),
            "curve": json.dumps(self.curve),
        }
        tensor_file.write(path, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)

    def _resume(self, path: Path) -> None:
        shapes, metadata = tensor_file.read_table(path)
        if metadata.get("key") != self.key:
            raise ValueError(f"{path}: a checkpoint of another healing: its models, data or arguments differ")
        held = tensor_file.read(path, shapes)
        for name, master in self.masters.items():
            master.copy_(held[f"master:{name}"])
            self.best[name].copy_(held[f"best:{name}"])
            self.optimizer.state[master] = {
                key: held[f"{key}:{name}"].to(master.device if key != "step" else "cpu")
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
        self.step, self.best_step = int(metadata["step"]), int(metadata["best_step"])
        self.curve = [tuple(point) for point in json.loads(metadata["curve"])]
        self.masters.show()

    def _key_of(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self.trained.items()}
        data = [[batch.content() for batch in batches] for batches in (self.batches, self.held)]
        try:
            return fingerprint(
                {
                    "options": asdict(self.options),
                    "loss": self.loss,
                    "shapes": shapes,
                    "teacher": self.teacher.key if isinstance(self.teacher, RecordedLogits) else self.teacher,
                    "data": data,
                }
            )
        except Unhashable as error:
            raise ValueError(f"checkpoint: this healing could not be known again: {error}; do without") from error


def _is_there(checkpoint: Path) -> bool:
    """For all processes; ValueError where only some see it."""
    seen = current().exchange(checkpoint.exists())
    if any(seen) and not all(seen):
        raise ValueError(f"{checkpoint}: process {seen.index(False)} does not see it; give a place that all see")
    return all(seen)
