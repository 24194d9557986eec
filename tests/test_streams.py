"""Masks in whole models: every layer counts the positions of the side that it runs on, whatever their shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from shrank import calibrate
from shrank.targets import target
from tests.common.models import VOCAB, WIDTH, draw, hf_model, seeded, tokens
from tests.common.tolerances import assert_close

LENGTH = 8
ENCODER, DECODER = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
ENCODER[1, 3:], DECODER[0, 7:], DECODER[1, 6:] = 0, 0, 0  # 11 and 13 that count
IDS = tokens(2, LENGTH)
LABELS = IDS.flip(1).masked_fill(DECODER == 0, -100)
STARTS = {"two berts": 2, "t5gemma2": 2}  # the others with what pads

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
_SIDES = {"vocab_size": VOCAB, "d_model": WIDTH, **_SPECIAL, **{
    f"{side}_{name}": n for side in ("encoder", "decoder")
    for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}}
_BERT = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
_GEMMA = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
          "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}


def two_berts() -> nn.Module:
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**_BERT), add_pooling_layer=False),
        decoder=BertLMHeadModel(BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)))
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    return model


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(WhisperConfig(
        **_SIDES, num_mel_bins=16, max_source_positions=LENGTH, max_target_positions=LENGTH))


def t5gemma2() -> nn.Module:
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 16, "patch_size": 4}
    return T5Gemma2ForConditionalGeneration(T5Gemma2Config(
        encoder={"text_config": _GEMMA, "vision_config": vision, "mm_tokens_per_image": 4,
                 "image_token_index": VOCAB - 1, "boi_token_index": VOCAB - 2, "eoi_token_index": VOCAB - 3},
        decoder=_GEMMA, image_token_index=VOCAB - 1, eoi_token_index=VOCAB - 3))


def transformer(batch_first: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Transformer(WIDTH, 2, 1, 1, 64, batch_first=batch_first)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: hf_model("t5"), "bart": lambda: BartForConditionalGeneration(BartConfig(**_SIDES)),
    "marian": lambda: MarianMTModel(MarianConfig(**_SIDES)), "two berts": two_berts, "t5gemma2": t5gemma2,
}
SAID: dict[str, Callable[[str], dict[str, Tensor]]] = {
    "by masks": lambda family: {"decoder_attention_mask": DECODER, "labels": IDS},
    "by labels": lambda family: {"labels": LABELS},
    "by ids": lambda family: {"decoder_input_ids": torch.cat(
        [torch.full((2, 1), STARTS.get(family, 0)), LABELS[:, :-1]], 1).masked_fill(DECODER == 0, 0)},
}


def counted(model: nn.Module, batch: object, **options: object) -> dict[str, int]:
    """Tokens by layer, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masks padding")
        warnings.filterwarnings("ignore", message=".*no batch reaches")
        found = calibrate(model, [batch], **options)
    return {name: found.tokens(name) for name in found}


def sees_the_encoder(name: str) -> bool:
    """Whether a layer of a model here runs on the encoder's positions."""
    keys = name.endswith((".k", ".v", ".k_proj", ".v_proj", ".key", ".value"))
    return "decoder." not in name or (keys and any(x in name for x in ("EncDec", "encoder_attn", "crossattention")))


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("family", MODELS)
def test_sides_of_one_length_are_told_apart(family: str, said: str) -> None:
    model = seeded(MODELS[family])
    found = counted(model, {"input_ids": IDS, "attention_mask": ENCODER, **SAID[said](family)})
    for name, count in found.items():
        both = family == "t5gemma2" and ".decoder." in name and name.endswith(("k_proj", "v_proj"))
        assert count == (11 + 13 if both else 11 if sees_the_encoder(name) else 13), name
    assert {sees_the_encoder(name) for name in found} == {True, False}


def test_one_side_without_padding_is_not_given_that_of_the_other() -> None:
    found = counted(hf_model("t5"), {"input_ids": IDS, "labels": LABELS})
    assert all(count == (16 if sees_the_encoder(name) else 13) for name, count in found.items())
    found = counted(hf_model("t5"), {"input_ids": IDS, "attention_mask": ENCODER, "labels": IDS})
    assert all(count == (11 if sees_the_encoder(name) else 16) for name, count in found.items())


def test_moments_and_gradients_are_those_of_the_tokens_that_count() -> None:
    model = hf_model("t5")
    batch = {"input_ids": IDS, "attention_mask": ENCODER, "labels": LABELS}
    found, rows = calibrate(model, [batch], loss="lm"), {}
    exact = copy.deepcopy(model).double()

    def note(name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        mask = (ENCODER if sees_the_encoder(name) else DECODER).bool()
        rows[name] = [args[0].detach()[mask], y.detach()[mask]]
        y.register_hook(lambda g: rows[name].append(g[mask]))

    for name, module in exact.named_modules():
        if name in found:
            module.register_forward_hook(lambda m, a, y, name=name: note(name, m, a, y))
    (exact(**batch).loss * 13).backward()
    for name in found:
        got, (x, y, gradient) = found[name], rows[name]
        data = x if got.of_inputs else y
        assert_close(got.data[0], data.T @ data / len(data))
        if got.of_inputs and y.shape[1] > x.shape[1]:
            gradient = gradient @ target(exact.get_submodule(name)).matrices(None)[0]
        assert_close(got.gradient[0], gradient.T @ gradient / len(gradient))


def test_the_frames_of_speech_and_what_is_said() -> None:
    frames = torch.ones(2, 2 * LENGTH, dtype=torch.long)
    frames[1, 6:] = 0
    found = counted(seeded(whisper), {"input_features": draw(2, 16, 2 * LENGTH), "attention_mask": frames,
                                      "labels": LABELS})
    assert found.pop("model.encoder.conv1") == 22
    assert all(count == (11 if sees_the_encoder(name) else 13) for name, count in found.items())


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_masks_of_torch(batch_first: bool) -> None:
    shape = (2, LENGTH) if batch_first else (LENGTH, 2)
    masks = {"src_key_padding_mask": ENCODER == 0, "tgt_key_padding_mask": torch.zeros(DECODER.shape).masked_fill(
        DECODER == 0, -torch.inf), "memory_key_padding_mask": ENCODER == 0}
    for length in (LENGTH, 2):  # as long as there are sequences: which is which, the layers must say
        cut = {name: mask[:, -length:] for name, mask in masks.items()}
        x = draw(*(n if n != LENGTH else length for n in shape), WIDTH)
        data = {"src": x, "tgt": 2 * x}
        counts = [int((m[:, -length:] > 0).sum()) for m in (ENCODER, DECODER)]
        found = counted(seeded(transformer(batch_first)), {**data, **cut}, loss=False)
        assert found == {f"{side}.layers.0.linear{i}": n for side, n in zip(("encoder", "decoder"), counts, strict=True)
                         for i in (1, 2)}
