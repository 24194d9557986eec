"""Texts as tokens, and what decoders get: labels, masks, what begins a text, and what a model generates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shrank.data.model_inputs import inputs_of
from shrank.data.token_batches import generated, tokenized
from tests.common.model_folders import END, FOLDERS, PAD, POSITIONS, START, tokenizer, word_ids
from tests.common.models import seeded

TEXTS = ["w1 w2 w3", "w4"]
LONG, SHORT = [*word_ids(TEXTS[0]), END], [*word_ids(TEXTS[1]), END]


def built(name: str) -> nn.Module:
    return seeded(FOLDERS[name][0])


def says(name: str, texts: list[str] = TEXTS, **options) -> dict:
    model = built(name)
    (call,) = tokenized(texts, tokenizer(**options), inputs_of(model), model, 512, 8, decoder=True)
    return {key: value.tolist() for key, value in call.items()}


@pytest.mark.parametrize("name", ["t5", "marian", "whisper", "captioner"])
def test_labels_are_the_tokens_and_padding_does_not_count(name: str) -> None:
    found = says(name)
    assert found.pop("labels") == [LONG, [*SHORT, -100, -100]]
    assert found == {"decoder_attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}


@pytest.mark.parametrize(
    ("name", "begins"), [("t5_base", PAD), ("bart_base", END), ("bart_classifier", END), ("whisper_base", START)]
)
def test_a_decoder_without_a_head_gets_what_begins_a_text_and_all_but_its_last_token(name: str, begins: int) -> None:
    found = says(name)
    assert found["decoder_input_ids"] == [[begins, *LONG[:-1]], [begins, *SHORT, PAD]]
    assert found["decoder_attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]] and len(found) == 2


def test_what_begins_a_text_is_not_there_twice() -> None:
    assert says("whisper", start=True)["labels"] == [LONG, [*SHORT, -100, -100]]
    # BART's decoder starts with another token than its tokenizer.
    assert says("bart", start=True)["labels"] == [[START, *LONG], [START, *SHORT, -100, -100]]


def test_a_models_own_shift_gives_the_same_input() -> None:
    t5, base = built("t5"), says("t5_base")
    labels = torch.tensor(says("t5")["labels"])
    assert t5.prepare_decoder_input_ids_from_labels(labels).tolist() == base["decoder_input_ids"]


@pytest.mark.parametrize(
    ("name", "decoder", "most"),
    [
        ("bert", False, POSITIONS),
        ("roberta", False, POSITIONS - 1),
        ("clip", False, POSITIONS),
        ("t5", False, 40),
        ("whisper", True, POSITIONS),
        ("captioner", True, POSITIONS),
    ],
)
def test_texts_are_as_long_as_the_model_has_positions_for(name: str, decoder: bool, most: int) -> None:
    model, text = built(name), " ".join(["w1"] * 60)
    (call,) = tokenized([text], tokenizer(), inputs_of(model), model, 40, 8, decoder)
    assert call["labels" if decoder else "input_ids"].shape == (1, most)
    if not decoder and name != "clip" and name != "t5":
        assert model(**call)[0].isfinite().all()


def test_only_what_forward_takes_is_given() -> None:
    made = tokenizer()
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for name, keys in (
        ("bert", {"input_ids", "token_type_ids", "attention_mask"}),
        ("llama", {"input_ids", "attention_mask"}),
    ):
        (call,) = tokenized(TEXTS, made, inputs_of(built(name)), built(name), 512, 8)
        assert call.keys() == keys


def test_the_tokenizer_of_another_model_is_refused() -> None:
    model = built("llama")
    model.config.vocab_size = 20
    with pytest.raises(ValueError, match=r"token 54, and LlamaForCausalLM knows 20 tokens: is it the tok"):
        tokenized(["w49"], tokenizer(), inputs_of(model), model, 512, 8)


class _Speaker(nn.Module):
    """Generates what it is told to."""

    main_input_name, output_modalities, can_generate = "input_features", ("text",), staticmethod(lambda: True)

    def __init__(self, ids: list[list[int]], end: int | list[int] | None = END) -> None:
        super().__init__()
        self.ids, self.asked = torch.tensor(ids, dtype=torch.long).reshape(len(ids), -1), {}
        self.config = SimpleNamespace(decoder_start_token_id=START, max_target_positions=POSITIONS)
        self.config.get_text_config = lambda: self.config
        self.generation_config = SimpleNamespace(eos_token_id=end)

    def forward(self, input_features, decoder_input_ids=None, labels=None):
        return input_features

    def generate(self, **asked):
        self.asked = asked
        return self.ids


@pytest.mark.parametrize(
    ("ids", "end", "labels"),
    [
        ([[START, 9, 8, END], [START, 7, END, PAD]], END, [[9, 8, END], [7, END, -100]]),
        ([[9, 8, 7], [6, END, END]], END, [[9, 8, 7], [6, END, -100]]),  # Whisper's lack what begins them
        ([[START, 9, 5, PAD]], [5, 6], [[9, 5, -100]]),
        ([[START, 9, 8]], None, [[9, 8]]),
        ([[], []], END, [[END], [END]]),
        ([[START], [START]], END, [[START], [START]]),
    ],
)
def test_what_is_generated_counts_up_to_its_end(ids, end, labels) -> None:
    model = _Speaker(ids, end)
    call = {"input_features": torch.zeros(len(ids), 4)}
    assert generated(call, inputs_of(model), model, 512)["labels"].tolist() == labels
    assert model.asked["input_features"] is call["input_features"]
    assert model.asked["max_new_tokens"] == POSITIONS // 2 and model.asked["do_sample"] is False


def test_generation_is_the_models_own() -> None:
    model = built("captioner")
    call = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    labels = generated(call, inputs_of(model), model, 6)["labels"]
    best = model(**call, labels=labels).logits.argmax(-1)
    assert labels.shape[1] <= 6 and torch.equal(best[labels != -100], labels[labels != -100])


def test_a_decoder_that_starts_with_nothing_is_named() -> None:
    model = built("t5_base")
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    with pytest.raises(ValueError, match=r"T5Model: its config\.json has no decoder_start_token_id"):
        tokenized(TEXTS, tokenizer(), inputs_of(model), model, 512, 8, decoder=True)
