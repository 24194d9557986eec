"""What models take and give, read off their classes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from shrank.data.model_inputs import (
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


@pytest.mark.parametrize(
    ("name", "needs", "decoder", "labels", "joins", "next_token", "causal"),
    [
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
    ],
)
def test_what_models_take(name, needs, decoder, labels, joins, next_token, causal) -> None:
    model = built(name)
    found = inputs_of(model)
    assert (found.needs, found.decoder, found.labels, found.joins_images) == (needs, decoder, labels, joins)
    assert (predicts_next_token(model), is_causal_language_model(model)) == (next_token, causal)


def test_a_line_shows_all_that_is_needed() -> None:
    assert inputs_of(built("clip")).line == '{"text": "a cat on a roof", "image": "cat.jpg"}'


class _Music(nn.Module):
    main_input_name, output_modalities = "input_ids", ("audio",)
    forward = transformers.MusicgenForConditionalGeneration.forward


class _Tasks(nn.Module):
    main_input_name = ["pixel_values", "task_inputs"]

    def forward(self, pixel_values, task_inputs):
        return pixel_values


class _Grid(nn.Module):
    main_input_name = "input_ids"

    def forward(self, hidden_states, grid):
        return hidden_states


class _Codes(nn.Module):
    main_input_name = "inputs"

    def forward(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: built("speech_t5"), "its decoder takes decoder_input_values, which no text makes"),
        (_Music, "its decoder takes codes of audio, which no text makes"),
        (
            lambda: transformers.PatchTSTModel(transformers.PatchTSTConfig(d_model=16, num_hidden_layers=1)),
            "takes past_values, which no text, image or sound makes",
        ),
        (
            lambda: transformers.BertForMultipleChoice(
                transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
            ),
            "BertForMultipleChoice takes several texts at once",
        ),
        (lambda: nn.Linear(2, 2), "Linear takes None"),
        (_Tasks, r"_Tasks takes \['pixel_values', 'task_inputs'\]"),
        (_Codes, "_Codes takes inputs, which no text"),
        (_Grid, "_Grid takes hidden_states, grid, which no text"),
    ],
)
def test_models_that_files_cannot_feed_are_refused(build, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        inputs_of(build())
    assert "give shrank.calibrate and shrank.heal the batches themselves" in str(caught.value)


class _Tower(nn.Module):
    """Its class leaves main_input_name as it is."""

    main_input_name = "input_ids"

    def forward(self, pixel_values, pixel_attention_mask):
        return pixel_values


class _Wrapper(nn.Module):
    """Of an encoder and a decoder."""

    main_input_name, output_modalities, can_generate = "inputs", ("text",), staticmethod(lambda: True)

    def forward(self, inputs=None, decoder_input_ids=None, labels=None, input_values=None):
        return inputs


class _Tokens(nn.Module):
    """Images stand within its texts, and it may have a decoder of its own."""

    main_input_name, output_modalities, can_generate = "pixel_values", ("text",), staticmethod(lambda: True)

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.config = transformers.PreTrainedConfig(is_encoder_decoder=decoder)
        self.config.image_token_id = 4

    def forward(self, pixel_values, input_ids, decoder_input_ids=None, labels=None):
        return pixel_values


@pytest.mark.parametrize(
    ("model", "needs", "decoder", "joins"),
    [
        (_Tower(), {IMAGE}, False, False),
        (_Wrapper(), {AUDIO}, True, False),
        (_Tokens(False), {TEXT, IMAGE}, False, True),
        (_Tokens(True), {TEXT, IMAGE}, True, True),
    ],
)
def test_classes_that_say_little_of_themselves(model: nn.Module, needs: set[str], decoder: bool, joins: bool) -> None:
    found = inputs_of(model)
    assert (found.needs, found.decoder, found.joins_images) == (needs, decoder, joins)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("bert", POSITIONS, POSITIONS),
        ("gpt2", POSITIONS, POSITIONS),
        ("clip", POSITIONS, POSITIONS),
        ("roberta", POSITIONS - 1, POSITIONS - 1),  # counts from behind the padding, token 0 here
        ("t5", None, None),
        ("marian", POSITIONS, POSITIONS),
        ("whisper", None, POSITIONS),
        ("captioner", None, POSITIONS),
        ("llava", POSITIONS, POSITIONS),
        ("vit", None, None),
    ],
)
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
