"""By which gradients a layer's error is weighted, and what is trained on beside the dense model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..util import nested
from ..util.names import meant
from .batches import Batch

# Rows of outputs to draw gradients for: fewer know too few directions, where one row gathers many tokens.
_ROWS_PER_BATCH, _MOST_DRAWS = 64, 8
_IS_ONE = 1e-3  # how near the sum of probabilities is to it, in half precision too


# "output": the sensitivity of the outputs; "kl": their divergence as distributions; "lm": next-token cross entropy;
# "none"; or (output, batch) -> scalar.
LossLike = str | Callable[[object, Batch], Tensor]


class NotComparable(ValueError):
    """Outputs between which there is no finite distance; says whose they are, and why."""


class Sensitivity(Protocol):
    """Whose gradients say how much an error of a layer matters."""

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        """Send gradients to the layers that are observed, if it depends on any; how many rows of output they stem
        from."""


class TrainingLoss(Sensitivity, Protocol):
    """What a model can be trained on."""

    def mean(self, output: object, batch: Batch) -> Tensor:
        """The loss per row of the output."""


@dataclass(frozen=True)
class OutputSensitivity(Sensitivity):
    """Random projections of the main output: their gradients have the moment of the output's Jacobian, so that a
    layer's weighted error is the squared change of the output that it causes."""

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        output = main_output(output)
        return _drawn(output, batch, lambda: torch.randn(output.shape, generator=generator).to(output))


@dataclass(frozen=True)
class Divergence(Sensitivity):
    """The log-likelihood of classes that are drawn from the model's own distributions, its main output as logits or
    probabilities: the moment of its gradients is the Hessian of KL(dense || compressed), and no label is needed.

    Source: that of the Fisher matrix (Martens and Grosse, 2015), of which cross entropy with labels knows an estimate.
    """

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        output = main_output(output)
        rows = output.detach().float().reshape(-1, output.shape[-1])
        require_logits("the model's", rows)
        given = are_probabilities(rows)
        probabilities = rows if given else rows.softmax(-1)
        drawable = probabilities.cpu()

        def gradient() -> Tensor:
            drawn = drawable.multinomial(1, generator=generator).to(rows.device)
            made = torch.zeros_like(rows) if given else probabilities.clone()
            made.scatter_add_(1, drawn, -1 / probabilities.gather(1, drawn) if given else -torch.ones_like(rows[:, :1]))
            return made.view(output.shape).to(output.dtype)

        return _drawn(output, batch, gradient)


def _drawn(output: Tensor, batch: Batch, gradient: Callable[[], Tensor]) -> int:
    """Send gradients at the rows of output that count, drawn anew where these are few; how many rows there were."""
    mask = batch.mask_for(tuple(output.shape[:-1]))
    rows = output[..., 0].numel() if mask is None else int(mask.sum())
    draws = min(max(-(-_ROWS_PER_BATCH // max(rows, 1)), 1), _MOST_DRAWS)
    for draw in range(draws if output.requires_grad and rows else 0):
        direction = gradient()
        if mask is not None:
            direction = direction * mask.view(output.shape[:-1])[..., None].to(output)
        output.backward(direction, retain_graph=draw + 1 < draws)
    return rows * draws


@dataclass(frozen=True)
class NextToken(TrainingLoss):
    """Cross entropy of a language model's logits and the tokens that follow: `labels` if the batch has them (already in
    place for an encoder-decoder, else shifted here), else `input_ids`."""

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        logits, targets = self._targets(output, batch)
        if logits.requires_grad:
            logits.backward(cross_entropy_gradient(logits.detach(), targets))
        return int((targets != -100).sum())

    def mean(self, output: object, batch: Batch) -> Tensor:
        logits, targets = self._targets(output, batch)
        return F.cross_entropy(logits.float(), targets, reduction="sum") / (targets != -100).sum().clamp_min(1)

    @staticmethod
    def _targets(output: object, batch: Batch) -> tuple[Tensor, Tensor]:
        aligned = next(nested.named(output, "encoder_last_hidden_state"), None) is not None
        return next_token_targets(main_output(output), batch, aligned)


@dataclass(frozen=True)
class Custom(TrainingLoss):
    """A user's `(output, batch) -> scalar`, summed over what it averages."""

    function: Callable[[object, Batch], Tensor]

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        loss = self._sum(output, batch)
        if loss.requires_grad:
            loss.backward()
        return self._rows(output)

    def mean(self, output: object, batch: Batch) -> Tensor:
        return self._sum(output, batch).reshape(()) / max(self._rows(output), 1)

    def _sum(self, output: object, batch: Batch) -> Tensor:
        loss = self.function(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss must return a scalar tensor, got {getattr(loss, 'shape', type(loss).__name__)}")
        return loss

    @staticmethod
    def _rows(output: object) -> int:
        return math.prod(main_output(output).shape[:-1])


def as_sensitivity(loss: LossLike) -> Sensitivity | None:
    """What a user's `loss` means to a calibration; None for "none": no gradients, all errors count alike."""
    if callable(loss):
        return Custom(loss)
    if isinstance(loss, str) and loss in _NAMED:
        return _NAMED[loss]
    found = f"got {loss!r}{meant(loss, _NAMED) if isinstance(loss, str) else ''}"
    raise ValueError(f"loss must be {', '.join(map(repr, _NAMED))} or a function, {found}")


def as_training_loss(loss: LossLike) -> TrainingLoss | None:
    """What a user's `loss` means to training; None for "none": the dense model's outputs alone."""
    chosen = as_sensitivity(loss)
    if isinstance(chosen, OutputSensitivity | Divergence):
        raise ValueError(f"loss must be 'lm', 'none' or a function, got {loss!r}: the outputs are compared anyway")
    return chosen


_NAMED: dict[str, Sensitivity | None] = {
    "output": OutputSensitivity(),
    "kl": Divergence(),
    "lm": NextToken(),
    "none": None,
}


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the sum of the cross entropies, by the logits (tokens, vocabulary): one tensor of their size, where automatic
    differentiation would hold three beside them. Tokens with target -100 have none."""
    gradient, counted = logits.float().softmax(-1), targets != -100
    gradient[counted.nonzero()[:, 0], targets[counted]] -= 1
    return (gradient * counted[:, None]).to(logits.dtype) if not counted.all() else gradient.to(logits.dtype)


def main_output(output: object) -> Tensor:
    """The tensor that a model is run for: its logits, its sentence embeddings, its last hidden state, or its first
    tensor of numbers, wherever they are in what it returns."""
    for name in ("logits", "sentence_embedding", "last_hidden_state"):
        if (found := next((t for t in nested.named(output, name) if isinstance(t, Tensor)), None)) is not None:
            return found
    for tensor in nested.tensors(output):
        if tensor.is_floating_point() and tensor.dim() > 0:
            return tensor
    raise TypeError(f"the model returns no tensor of numbers but {type(output).__name__}")


def are_probabilities(rows: Tensor) -> bool:
    """Whether rows (tokens, classes) are distributions, not logits of them."""
    return bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < _IS_ONE).all())


def as_logits(rows: Tensor) -> Tensor:
    """Rows of a model's output (tokens, classes), float32, as logits: their logarithms where they are probabilities."""
    rows = rows.float()
    return rows.clamp_min(torch.finfo(rows.dtype).tiny).log() if are_probabilities(rows) else rows


def divergences(answer: Tensor, target: Tensor) -> Tensor:
    """KL(target || answer) of every row of logits (tokens, vocabulary), nats (tokens,), float32.

    What both rule out by -inf contributes nothing. Raises NotComparable that says whose logits they are, the model's or
    the dense model's, if any hold NaN or +inf, a row of them is -inf, or the model rules out what the dense one does
    not.
    """
    answer, target = answer.float(), target.float()
    require_logits("the dense model's", target)
    require_logits("the model's", answer)
    ruled_out = target == -torch.inf
    if bool((impossible := (answer == -torch.inf) & ~ruled_out).any()):
        row, token = impossible.nonzero()[0].tolist()
        raise NotComparable(
            "the model's logits are -inf where the dense model's are not, first for token "
            f"{token} in row {row}: their divergence is infinite"
        )
    answer, target = (F.log_softmax(logits, -1) for logits in (answer, target))
    difference = (target - answer).masked_fill(ruled_out, 0.0)  # -inf less -inf
    return (target.exp() * difference).sum(-1)


def require_logits(whose: str, logits: Tensor) -> None:
    """NotComparable where a row of logits (tokens, vocabulary) is no distribution."""
    largest = logits.amax(-1) if logits.numel() else logits.new_zeros(())
    if not bool(largest.isfinite().all()):  # the largest is NaN if any is
        raise NotComparable(
            f"{whose} logits hold NaN or +inf, or nothing but -inf, in row {int((~largest.isfinite()).nonzero()[0, 0])}"
        )


def next_token_targets(logits: Tensor, batch: Batch, aligned: bool) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) with the tokens (tokens,) they should predict, -100 where none counts; aligned: the
    labels stand where they are predicted, as those of an encoder-decoder."""
    arguments = batch.arguments()
    labels = arguments.get("labels")
    if labels is not None and aligned:
        labels = labels.to(logits.device)
        if (mask := batch.mask_for(tuple(labels.shape), {"decoder"})) is not None:
            labels = labels.masked_fill(~mask.view(labels.shape).to(labels.device), -100)
        return logits.flatten(0, 1), labels.flatten()
    targets = labels if labels is not None else arguments.get("input_ids", batch.args[0] if batch.args else None)
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:2]:
        raise ValueError(
            "the 'lm' loss needs input_ids (batch, tokens) and logits (batch, tokens, vocabulary), got "
            f"{getattr(targets, 'shape', None)} and {tuple(logits.shape)}"
        )
    targets = targets.to(logits.device)
    if (mask := batch.mask_for(tuple(targets.shape))) is not None:
        targets = targets.masked_fill(~mask.view(targets.shape).to(targets.device), -100)
    return logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
