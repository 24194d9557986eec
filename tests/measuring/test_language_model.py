"""Language models beside each other: perplexity, agreement, divergence, repetition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shrank.measuring.language_model import ends_in_a_loop, evaluate, repetition, windows
from tests.common.models import VOCAB, hf_model


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, return_tensors: str, truncation: bool) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[2 + ord(c) % (VOCAB - 2) for c in text]])}


TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


def test_perplexity_is_that_of_the_windows() -> None:
    model = hf_model("llama")
    cut = windows(Letters(), TEXTS, 10)
    with torch.inference_mode():
        losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="sum") for w in cut]
    expected = math.exp(sum(losses).item() / (9 * len(cut)))
    found = evaluate(model, Letters(), TEXTS, window=10)
    assert found.perplexity == pytest.approx(expected, rel=1e-5) and found.tokens == 9 * len(cut)
    assert found.agreement is None and found.divergence is None
    assert evaluate(model, Letters(), TEXTS, window=10, limit=2).tokens == 18


def test_a_model_agrees_with_itself_and_not_with_another() -> None:
    model, other = hf_model("llama"), hf_model("gpt2")
    same = evaluate(model, Letters(), TEXTS, model, window=10)
    assert same.agreement == 1 and abs(same.divergence) < 1e-6
    apart = evaluate(other, Letters(), TEXTS, model, window=10)
    assert 0 <= apart.agreement < 1 and apart.divergence > 0
    assert apart.to_dict()["divergence"] == apart.divergence


class Padded(nn.Module):
    """A language model whose vocabulary has more places than tokens."""

    def __init__(self, model: nn.Module, value: float, first: int = VOCAB - 4) -> None:
        super().__init__()
        self.model, self.value, self.first = model, value, first

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=input_ids).logits.clone()
        logits[..., self.first :] = self.value
        return logits


class FewLetters(Letters):
    def __call__(self, text: str, return_tensors: str, truncation: bool) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[2 + ord(c) % (VOCAB - 8) for c in text]])}


def test_places_without_tokens_do_not_count() -> None:
    model, other = hf_model("llama"), hf_model("gpt2")
    far, none = (
        evaluate(Padded(other, value), FewLetters(), TEXTS, Padded(model, value), window=10)
        for value in (-1e4, -math.inf)
    )
    assert none.divergence == pytest.approx(far.divergence, rel=1e-5) and none.divergence > 0
    assert none.perplexity == pytest.approx(far.perplexity, rel=1e-5) and none.agreement == far.agreement
    with pytest.raises(ValueError, match=r"window 0: the model's logits are -inf where .* token 60 in row 0"):
        evaluate(Padded(other, -math.inf), FewLetters(), TEXTS, model, window=10)
    with pytest.raises(ValueError, match="window 0: the dense model's logits hold NaN"):
        evaluate(other, FewLetters(), TEXTS, Padded(model, math.nan), window=10)


@pytest.mark.parametrize("stride", [4, 11])
def test_windows_that_overlap_predict_every_token_once_and_from_a_long_context(stride: int) -> None:
    model, window = hf_model("llama"), 12
    (whole,) = windows(Letters(), TEXTS, len("\n\n".join(TEXTS)))
    losses, last = [], len(whole) - (len(whole) - window) % stride  # that a window ends with
    with torch.inference_mode():
        for start in range(0, last - window + 1, stride):
            cut = whole[start : start + window]
            each = F.cross_entropy(model(cut[None]).logits[0, :-1], cut[1:], reduction="none")
            losses.append(each[-stride:] if start else each)
    found = evaluate(model, Letters(), TEXTS, model, window=window, stride=stride)
    assert found.tokens == last - 1 == len(torch.cat(losses)) and found.agreement == 1
    assert found.perplexity == pytest.approx(math.exp(torch.cat(losses).mean().item()), rel=1e-5)
    apart = evaluate(model, Letters(), TEXTS, window=window)
    assert apart == evaluate(model, Letters(), TEXTS, window=window, stride=window)


def test_a_few_windows_are_spread_over_the_texts() -> None:
    (whole,) = windows(Letters(), TEXTS, len("\n\n".join(TEXTS)))
    for limit in (1, 2, 3, 100):
        cut = windows(Letters(), TEXTS, 10, limit)
        step = max(10, (len(whole) - 10) // limit)
        assert len(cut) == min(limit, len(whole) // 10)
        assert all(torch.equal(each, whole[n * step : n * step + 10]) for n, each in enumerate(cut))


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 10, "limit": 0}, {"window": 10, "stride": 0}, {"window": 10, "stride": 11}]
)
def test_nothing_to_predict_is_an_error(options: dict) -> None:
    with pytest.raises(ValueError, match="window must be at least 2, limit at least 1 and stride from 1 to window"):
        evaluate(hf_model("llama"), Letters(), TEXTS, **options)


def test_bad_input_is_named() -> None:
    model = hf_model("llama")
    with pytest.raises(ValueError, match="fewer than one window of 512"):
        evaluate(model, Letters(), TEXTS)
    with pytest.raises(ValueError, match="causal language model"):
        evaluate(hf_model("bert"), Letters(), TEXTS, window=10)
    smaller = hf_model("llama")
    smaller.lm_head = nn.Linear(32, VOCAB - 1)
    with pytest.raises(ValueError, match="vocabularies differ"):
        evaluate(smaller, Letters(), TEXTS, model, window=10)
    with pytest.raises(ValueError, match="no text has 100 tokens"):
        repetition(model, Letters(), TEXTS, prompt_tokens=100)


@pytest.mark.parametrize(
    "tokens, loops",
    [
        ([1, 2, 3, 4, 5, 6], False),
        ([9, 1, 1, 1], True),
        ([7, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1], False),
        ([1, 1, 1, 2], False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], loops: bool) -> None:
    assert ends_in_a_loop(tokens) is loops


def test_a_model_that_repeats_itself_is_found_out() -> None:
    model = hf_model("gpt2")
    said = repetition(model, Letters(), TEXTS, prompt_tokens=8, new_tokens=12)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.eye(VOCAB)[5])  # always the same token
    stuck = repetition(model, Letters(), TEXTS, prompt_tokens=8, new_tokens=12)
    assert stuck.loops == 1 and stuck.distinct[0] == pytest.approx(1 / 24)
    assert all(0 < share <= 1 for share in said.distinct)
