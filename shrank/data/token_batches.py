"""Texts as the tokens that a model's side takes, and what the decoder of an encoder-decoder gets of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..calibration.batches import batches
from .model_inputs import ModelInputs, positions, text_config

IGNORED = -100  # a label that no loss counts


def tokenized(
    texts: list[str],
    tokenizer: Callable,
    takes: ModelInputs,
    model: nn.Module,
    max_length: int,
    batch_size: int,
    decoder: bool = False,
) -> list[dict[str, Tensor]]:
    """The texts in batches, (batch, tokens) each, of at most as many tokens as the model has positions for; decoder: as
    what its decoder is to say. Raises ValueError if the tokenizer is one of another model."""
    most = min(max_length, positions(model, decoder) or max_length)
    side = _Side(tokenizer, decoder)
    calls = [dict(batch.kwargs) for batch in batches(texts, side, batch_size=batch_size, max_length=most)]
    known = getattr(text_config(model, decoder), "vocab_size", None)
    largest = max((int(call["input_ids"].max()) for call in calls if call["input_ids"].numel()), default=0)
    if known is not None and largest >= known:
        raise ValueError(
            f"the tokenizer gives token {largest}, and {takes.model} knows {known} tokens: is it the "
            "tokenizer of another model?"
        )
    if decoder:
        ids = [_without_start(call["input_ids"], model) for call in calls]
        counted = [call["attention_mask"][:, -x.shape[1] :].bool() for call, x in zip(calls, ids, strict=True)]
        return [_decoder_arguments(x, mask, takes, model) for x, mask in zip(ids, counted, strict=True)]
    return [{name: value for name, value in call.items() if name in takes.arguments} for call in calls]


def generated(call: dict[str, Tensor], takes: ModelInputs, model: nn.Module, max_length: int) -> dict[str, Tensor]:
    """What the decoder gets if it is to say what the model generates greedily of a call."""
    room = positions(model, decoder=True)
    most = min(max_length, room // 2 if room else max_length)  # the prompt needs room too
    ids = model.generate(**call, max_new_tokens=most, do_sample=False, num_beams=1)
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, dtype=ids.dtype).reshape(-1)
    if not ids.shape[1]:  # it says nothing at all
        ids = torch.full((len(ids), 1), int(ends[0]) if len(ends) else _start(model), dtype=ids.dtype)
    ids = _without_start(ids, model)
    is_end = torch.isin(ids, ends).long()
    return _decoder_arguments(ids, is_end.cumsum(1) == is_end, takes, model)


class _Side:
    """A tokenizer as `batches` calls it, for the texts of the encoder or of the decoder."""

    def __init__(self, tokenizer: Callable, decoder: bool) -> None:
        self.tokenizer, self.decoder, self.pad_token = tokenizer, decoder, tokenizer.pad_token

    def __call__(self, texts: list[str], **options: object) -> dict[str, Tensor]:
        # Tokenizers of translation treat the two languages differently.
        return self.tokenizer(
            **{"text_target" if self.decoder else "text": texts}, return_attention_mask=True, **options
        )


def _decoder_arguments(ids: Tensor, counted: Tensor, takes: ModelInputs, model: nn.Module) -> dict[str, Tensor]:
    """What the decoder gets to say these tokens (batch, tokens), where `counted`: `labels`, or for a model without a
    head `decoder_input_ids`, which begin with the token that starts a text."""
    if takes.labels:
        found = {"labels": ids.masked_fill(~counted, IGNORED)}
    else:
        before = torch.full_like(ids[:, :1], _start(model))
        found = {"decoder_input_ids": torch.cat([before, ids[:, :-1]], dim=1)}
    return found | ({"decoder_attention_mask": counted.long()} if "decoder_attention_mask" in takes.arguments else {})


def _without_start(ids: Tensor, model: nn.Module) -> Tensor:
    """The tokens without the one that starts a text, which the model puts in front itself."""
    return ids[:, 1:] if ids.shape[1] > 1 and bool((ids[:, 0] == _start(model)).all()) else ids


def _start(model: nn.Module) -> int:
    """The token that a decoder's text starts with."""
    configs = [model.config, getattr(model, "generation_config", None), text_config(model, decoder=True)]
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, name, None), int):
                return token
    raise ValueError(f"{type(model).__name__}: its config.json has no decoder_start_token_id")
