"""The dense model's answers in files, for a healing that does not hold the dense model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, as_batches, bound
from ..calibration.losses import NotComparable, TrainingLoss, main_output, require_logits
from ..calibration.sameness import agree_on
from ..model.hooks import in_eval_mode
from ..util import nested, tensor_file
from ..util.files import write_text
from ..util.fingerprint import Unhashable, fingerprint
from ..util.names import checks_keywords
from ..util.processes import current
from ..util.progress import track
from .distance import rows_of, with_task

_ABOUT = "about.json"


@dataclass(frozen=True)
class RecordedLogits:
    """The largest logits of a dense model for every token of some data, in a folder: a teacher for `heal`.

    `record_logits` makes them.

    Args:
        folder: Where the files are, one for every batch.
        key: What the dense model is known again by, and how much of its logits was kept.
    """

    folder: Path
    key: str

    def distance(self, student: nn.Module, batch: Batch, loss: TrainingLoss | None = None) -> Tensor:
        """The divergence of the student's logits from those recorded, where all tokens that were not recorded count as
        one, plus half the student's own mean `loss`; scalar. Raises NotComparable."""
        file = self.folder / f"{_digest(batch)}.safetensors"
        if not file.exists():
            raise ValueError(f"batch {batch.number}: {self.folder} has no logits of it; record_logits with this data")
        answer = batch.call(student)
        logits = rows_of(main_output(answer), batch.mask_for)
        held = tensor_file.read(file, ("log_probs", "tokens", "rest"))
        total = _divergence(logits, *(held[name].to(logits.device) for name in ("log_probs", "tokens", "rest")))
        return with_task(total, answer, batch, loss)


@checks_keywords
@torch.no_grad()
def record_logits(
    teacher: nn.Module, data: Iterable[object], folder: str | os.PathLike, *, top: int = 64
) -> RecordedLogits:
    """Run a dense model once, and keep its largest logits for every token that counts.

    A batch takes 8 bytes for each token and logit kept. Batches that the folder has already are not run again.

    Args:
        teacher: The dense model, which is not changed.
        data: What `shrank.batches` made, or takes without further arguments: all of it, the held-out part as well.
        folder: Where to write the files, one for every batch.
        top: How many logits of every token are kept.

    Returns:
        What `heal` takes as a teacher.

    Raises:
        ValueError: The model gives no logits, they are not finite, or the folder has logits of another model.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    batches, folder = bound(as_batches(data), teacher), Path(folder)
    agree_on(teacher, batches)
    recorded = RecordedLogits(folder, _known(folder, teacher, top))
    with in_eval_mode(teacher):
        for batch in track(current().share(batches), "recording"):
            file = folder / f"{_digest(batch)}.safetensors"
            if not file.exists():
                tensor_file.write(file, _largest(batch.call(teacher), batch, top), {})
    current().exchange(None)  # all files are there
    return recorded


def _known(folder: Path, teacher: nn.Module, top: int) -> str:
    """The key of these logits, also written to the folder; ValueError where that has others."""
    try:
        key = fingerprint({"teacher": teacher, "top": top})
    except Unhashable as error:
        raise ValueError(f"the logits of this model could not be known again: {error}") from error
    file = folder / _ABOUT
    if any(current().exchange(file.exists())) and (found := json.loads(file.read_text())["key"]) != key:
        raise ValueError(f"{folder} has logits of another model, or another number of them ({found[:8]}): give another")
    if current().is_first:
        write_text(file, json.dumps({"key": key, "top": top}))
    return key


def _digest(batch: Batch) -> str:
    try:
        return fingerprint(batch.args, dict(sorted(batch.kwargs.items())))[:32]
    except Unhashable as error:
        raise ValueError(f"batch {batch.number} could not be known again: {error}") from error


def _largest(output: object, batch: Batch, top: int) -> dict[str, Tensor]:
    """log_probs (tokens, top) with the `tokens` that they are of, and `rest` (tokens,), that of all others."""
    logits = next((t for t in nested.named(output, "logits") if t is not None), None)
    if logits is None:
        raise ValueError(f"batch {batch.number}: the model gives no logits, but {type(output).__name__}")
    rows = rows_of(logits, batch.mask_for)
    require_logits("the dense model's", rows)
    log_probs = rows.log_softmax(-1)
    largest, tokens = log_probs.topk(min(top, log_probs.shape[-1]), sorted=False)
    rest = log_probs.scatter(1, tokens, -torch.inf).logsumexp(-1)
    return {"log_probs": largest.cpu(), "tokens": tokens.int().cpu(), "rest": rest.cpu()}


def _divergence(logits: Tensor, log_probs: Tensor, tokens: Tensor, rest: Tensor) -> Tensor:
    """Mean KL(recorded || logits) over tokens, nats; at most the one of all logits, and that if all were recorded."""
    if len(logits) != len(log_probs):
        raise ValueError(f"the model gives {len(logits)} rows of logits where {len(log_probs)} were recorded")
    require_logits("the model's", logits)
    answer, tokens = logits.log_softmax(-1), tokens.long()
    found = _terms(log_probs, answer.gather(1, tokens)).sum(-1)
    if tokens.shape[1] < logits.shape[1]:
        found = found + _terms(rest, answer.scatter(1, tokens, -torch.inf).logsumexp(-1))
    return found.sum() / max(len(found), 1)


def _terms(target: Tensor, answer: Tensor) -> Tensor:
    """p log(p / q) from log p and log q; nothing where p is 0."""
    ruled_out = target == -torch.inf
    if bool(((answer == -torch.inf) & ~ruled_out).any()):
        raise NotComparable("the model's logits are -inf where the dense model's are not: their divergence is infinite")
    return target.exp() * (target - answer).masked_fill(ruled_out, 0.0)
