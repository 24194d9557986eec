"""What models take and give, read off their classes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from shrank.model_inputs import (
    inputs_of,
    is_causal_language_model,
    positions,
    predicts_next_token,
    require_causal_language_model,
    require_next_token,
)
from tests.common.model_folders import FOLDERS, POSITIONS

TEXT, IMAGE, AUDIO = "text", "image", "audio"


def built(name: str) -> nn.Module:
    with torch.device("meta"):
        return FOLDERS[name][0]()


@pytest.mark.parametrize(("name", "needs", "decoder", "labels", "joins", "next_token", "causal"), [
    ("bert", {TEXT}, False, False, False, False, False),
    ("roberta", {TEXT}, False, False, False, False, False),
    ("gpt2", {TEXT}, False, False, False, True, True),
    ("llama", {TEXT}, False, False, False, True, True),
    ("t5", {TEXT}, True, True, False, True, False),
    ("t5_base", {TEXT}, True, False, False, False, False),
    ("t5_encoder", {TEXT}, False, False, False, False, False),
    ("bart_classifier", {TEXT}, True, False, False, False, False),
    ("marian", {TEXT}, True, True, False, True, False),
    ("whisper", {AUDIO}, True, True, False, True, False),
    ("whisper_base", {AUDIO}, True, False, False, False, False),
    ("wav2vec2", {AUDIO}, False, False, False, False, False),
    ("vit", {IMAGE}, False, False, False, False, False),
    ("clip", {TEXT, IMAGE}, False, False, False, False, False),
    ("captioner", {IMAGE}, True, True, False, True, False),
    ("llava", {TEXT}, False, False, True, True, True),
])
def test_what_models_take(name, needs, decoder, labels, joins, next_token, causal) -> None:
    model = built(name)
    found = inputs_of(model)
    assert (found.needs, found.decoder, found.labels, found.joins_images) == (needs, decoder, labels, joins)
    assert (predicts_next_token(model), is_causal_language_model(model)) == (next_token, causal)


def test_a_line_shows_all_that_is_needed() -> None:
    assert inputs_of(built("clip")).line == '{"text": "a cat on a roof", "image": "cat.jpg"}'


class _Patches(nn.Module):
    main_input_name = "pixel_values"

    def forward(self, pixel_values, grid):
        return pixel_values


class _Music(nn.Module):
    main_input_name, output_modalities = "input_ids", ("audio",)
    forward = transformers.MusicgenForConditionalGeneration.forward


@pytest.mark.parametrize(("build", "says"), [
    (lambda: built("speech_t5"), "its decoder takes decoder_input_values, which no text makes"),
    (_Music, "its decoder takes codes of audio, which no text makes"),
    (lambda: transformers.PatchTSTModel(transformers.PatchTSTConfig(d_model=16, num_hidden_layers=1)),
     "takes past_values, which no text, image or sound makes"),
    (lambda: nn.Linear(2, 2), "Linear takes None"),
    (_Patches, "_Patches needs grid, which no text, image or sound makes"),
])
def test_models_that_files_cannot_feed_are_refused(build, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        inputs_of(build())
    assert "give shrank.calibrate and shrank.heal the batches themselves" in str(caught.value)


@pytest.mark.parametrize(("name", "encoder", "decoder"), [
    ("bert", POSITIONS, POSITIONS), ("gpt2", POSITIONS, POSITIONS), ("clip", POSITIONS, POSITIONS),
    ("roberta", POSITIONS - 1, POSITIONS - 1),  # counts from behind the padding, token 0 here
    ("t5", None, None), ("marian", POSITIONS, POSITIONS), ("whisper", None, POSITIONS),
    ("captioner", None, POSITIONS), ("llava", POSITIONS, POSITIONS), ("vit", None, None),
])
def test_positions(name: str, encoder: int | None, decoder: int | None) -> None:
    model = built(name)
    assert (positions(model), positions(model, decoder=True)) == (encoder, decoder)


def test_what_only_some_models_can_do_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM predicts no next token"):
        require_next_token(built("bert"))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal language model"):
        require_causal_language_model(built("t5"), 8)
    with pytest.raises(ValueError, match=f"has positions for {POSITIONS} tokens.*--window {POSITIONS}"):
        require_causal_language_model(built("gpt2"), POSITIONS + 1)
    require_causal_language_model(built("gpt2"), POSITIONS)
    require_next_token(built("whisper"))
