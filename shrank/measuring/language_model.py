"""What a compressed language model says, beside the dense one: perplexity, agreement, divergence and repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.batches import device_of
from ..calibration.losses import NotComparable, divergences, main_output
from ..util.progress import track

_LOOP = 3  # times that a phrase must follow itself to be a loop
_LONGEST_PHRASE = 16  # tokens


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of the texts; of a model beside a dense one, the share of equal predictions of the next token, and the
    mean divergence KL(dense || model) in nats per token."""

    tokens: int
    perplexity: float
    agreement: float | None = None
    divergence: float | None = None

    def to_dict(self) -> dict:
        """The figures by name, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Repetition:
    """Greedy continuations: shares of different n-grams among all (n = 1, 2, 3), and of continuations that end in a
    loop."""

    distinct: tuple[float, float, float]
    loops: float

    def to_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer: Callable,
    texts: Iterable[str],
    reference: nn.Module | None = None,
    *,
    window: int = 512,
    limit: int | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Measure a causal language model on texts, joined and cut into windows of `window` tokens.

    Each window is read on its own. All its tokens but the first are predicted, the second from one token and the last
    from `window` - 1. With a stride, windows overlap. Of all but the first then only the last `stride` tokens count,
    each predicted from at least `window` - `stride`. What both models rule out by logits of -inf does not count.

    Args:
        model: A causal language model, whose output has `logits` (batch, tokens, vocabulary).
        tokenizer: Called with a text; gives `input_ids`.
        texts: Joined by blank lines.
        reference: The dense model, for agreement and divergence.
        window: Tokens that are read together, at least 2.
        limit: The most windows to measure, spread evenly over the texts; None for all.
        stride: Tokens between the beginnings of windows, from 1 to `window`, which is the default.

    Returns:
        Perplexity, and beside a reference agreement and divergence in nats per token.

    Raises:
        ValueError: The texts fill no window, there is nothing to predict in them, the model gives no logits for every
            token, the vocabularies of the two models differ, or logits cannot be compared.
    """
    stride = window if stride is None else stride
    if window < 2 or (limit is not None and limit < 1) or not 1 <= stride <= window:
        raise ValueError(
            "window must be at least 2, limit at least 1 and stride from 1 to window, "
            f"got {window}, {limit} and {stride}"
        )
    nll = kl = equal = count = 0.0
    for number, ids in enumerate(track(windows(tokenizer, texts, window, limit, stride), "evaluating")):
        first = window - stride - 1 if number and stride < window else 0  # of the predictions that count
        logits, targets = _predictions(model, ids)[first:], ids[1 + first :]
        nll += F.cross_entropy(logits, targets.to(logits.device), reduction="sum").item()
        count += len(targets)
        if reference is None:
            continue
        expected = _predictions(reference, ids)[first:].to(logits.device)
        if expected.shape != logits.shape:
            raise ValueError(f"the vocabularies differ: {expected.shape[-1]} and {logits.shape[-1]}")
        equal += (logits.argmax(-1) == expected.argmax(-1)).sum().item()
        kl += _divergence(logits, expected, number)
    perplexity = torch.tensor(nll / count).exp().item()
    compared = (None, None) if reference is None else (equal / count, kl / count)
    return Evaluation(int(count), perplexity, *compared)


def _divergence(logits: Tensor, expected: Tensor, number: int) -> float:
    try:
        return divergences(logits, expected).sum().item()
    except NotComparable as error:
        raise NotComparable(f"window {number}: {error}") from error


@torch.inference_mode()
def repetition(
    model: nn.Module,
    tokenizer: Callable,
    texts: Iterable[str],
    *,
    prompts: int = 8,
    prompt_tokens: int = 16,
    new_tokens: int = 64,
) -> Repetition:
    """Continue the beginnings of some texts greedily and look for repetition: a compressed model may loop although its
    perplexity looks well. Raises ValueError if no text has `prompt_tokens` tokens."""
    starts = [ids[:prompt_tokens] for text in texts if len(ids := _ids(tokenizer, text)) >= prompt_tokens][:prompts]
    if not starts:
        raise ValueError(f"no text has {prompt_tokens} tokens to start from")
    batch = torch.stack(starts).to(device_of(model))
    made = model.generate(
        batch, attention_mask=torch.ones_like(batch), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )[:, prompt_tokens:].tolist()
    grams = [[tuple(row[i : i + n]) for row in made for i in range(len(row) - n + 1)] for n in (1, 2, 3)]
    distinct = tuple(len(set(found)) / max(len(found), 1) for found in grams)
    return Repetition(distinct, sum(map(ends_in_a_loop, made)) / len(made))


def ends_in_a_loop(tokens: list[int]) -> bool:
    """Whether the tokens end in one phrase, of up to sixteen tokens, three times in a row."""
    return any(
        tokens[-_LOOP * n :] == tokens[-n:] * _LOOP for n in range(1, min(_LONGEST_PHRASE, len(tokens) // _LOOP) + 1)
    )


def windows(
    tokenizer: Callable, texts: Iterable[str], length: int, limit: int | None = None, stride: int | None = None
) -> list[Tensor]:
    """Windows of this length of the texts as one sequence of tokens; ValueError if they do not fill one.

    limit: the most, spread evenly. stride: tokens between their beginnings, at least; by default the length.
    """
    ids = _ids(tokenizer, "\n\n".join(texts))
    if len(ids) < length:
        raise ValueError(f"the texts have {len(ids)} tokens, fewer than one window of {length}")
    step = max(length if stride is None else stride, 0 if limit is None else (len(ids) - length) // limit)
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, step)[:limit]]


def _ids(tokenizer: Callable, text: str) -> Tensor:
    return tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]


def _predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (tokens - 1, vocabulary), float32, of all tokens but the first."""
    logits = main_output(model(input_ids=ids[None].to(device_of(model))))
    if logits.dim() != 3 or logits.shape[:2] != (1, len(ids)):
        raise ValueError(
            f"a causal language model gives logits (1, {len(ids)}, vocabulary), this one {tuple(logits.shape)}"
        )
    return logits[0, :-1].float()
