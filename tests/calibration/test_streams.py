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
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrModel,
    EncoderDecoderModel,
    LongformerConfig,
    LongformerModel,
    MarianConfig,
    MarianMTModel,
    PerceiverConfig,
    PerceiverForMaskedLM,
    ResNetConfig,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from shrank import Calibration, auto_fact, batches, calibrate, measure_errors
from shrank.calibration.masks import resampled
from shrank.model.adapters import target
from tests.common.conv_models import wav2vec2
from tests.common.models import VOCAB, WIDTH, draw, hf_model, seeded, tokens
from tests.common.tolerances import assert_close

LENGTH = 8
ENCODER, DECODER = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
ENCODER[1, 3:], DECODER[0, 7:], DECODER[1, 6:] = 0, 0, 0  # 11 and 13 that count
IDS = tokens(2, LENGTH)
LABELS = IDS.flip(1).masked_fill(DECODER == 0, -100)
STARTS = {"two berts": 2, "t5gemma2": 2}  # the others with what pads

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
_SIDES = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    **_SPECIAL,
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
    },
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def two_berts() -> nn.Module:
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**_BERT), add_pooling_layer=False),
        decoder=BertLMHeadModel(BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)),
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    return model


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(**_SIDES, num_mel_bins=16, max_source_positions=LENGTH, max_target_positions=LENGTH)
    )


def t5gemma2() -> nn.Module:
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    }
    return T5Gemma2ForConditionalGeneration(
        T5Gemma2Config(
            encoder={
                "text_config": _GEMMA,
                "vision_config": vision,
                "mm_tokens_per_image": 4,
                "image_token_index": VOCAB - 1,
                "boi_token_index": VOCAB - 2,
                "eoi_token_index": VOCAB - 3,
            },
            decoder=_GEMMA,
            image_token_index=VOCAB - 1,
            eoi_token_index=VOCAB - 3,
        )
    )


def transformer(batch_first: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Transformer(WIDTH, 2, 1, 1, 64, batch_first=batch_first)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: hf_model("t5"),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_SIDES)),
    "marian": lambda: MarianMTModel(MarianConfig(**_SIDES)),
    "two berts": two_berts,
    "t5gemma2": t5gemma2,
}
SAID: dict[str, Callable[[str], dict[str, Tensor]]] = {
    "by masks": lambda family: {"decoder_attention_mask": DECODER, "labels": IDS},
    "by labels": lambda family: {"labels": LABELS},
    "by ids": lambda family: {
        "decoder_input_ids": torch.cat([torch.full((2, 1), STARTS.get(family, 0)), LABELS[:, :-1]], 1).masked_fill(
            DECODER == 0, 0
        )
    },
}


def counted(model: nn.Module, batch: object, mask: Callable | None = None, **options: object) -> dict[str, int]:
    """Tokens by layer, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masks padding")
        warnings.filterwarnings("ignore", message=".*no batch reaches")
        found = calibrate(model, batches([batch], mask=mask), **options)
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


@pytest.mark.parametrize(
    "said",
    [
        {"labels": LABELS},
        {"labels": LABELS.masked_fill(DECODER == 0, 0)},
        {"labels": IDS.flip(1), "decoder_attention_mask": DECODER},
    ],
    ids=["ignored", "padded", "masked"],
)
def test_moments_and_gradients_are_those_of_the_tokens_that_count(said: dict[str, Tensor]) -> None:
    model = hf_model("t5")
    batch = {"input_ids": IDS, "attention_mask": ENCODER, **said}
    found, rows = calibrate(model, [batch], loss="lm"), {}
    batch["labels"] = batch["labels"].masked_fill(DECODER == 0, -100)
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
    found = counted(
        seeded(whisper), {"input_features": draw(2, 16, 2 * LENGTH), "attention_mask": frames, "labels": LABELS}
    )
    assert found.pop("model.encoder.conv1") == 22
    assert all(count == (11 if sees_the_encoder(name) else 13) for name, count in found.items())


@pytest.mark.parametrize("length", [LENGTH, 2])  # 2: as long as there are sequences
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_masks_of_torch(batch_first: bool, length: int) -> None:
    masks = {"encoder": ENCODER[:, :: LENGTH // length].bool(), "decoder": DECODER[:, -length:].bool()}
    x = draw(2, length, WIDTH) if batch_first else draw(length, 2, WIDTH)
    added = torch.zeros(2, length).masked_fill(~masks["decoder"], -torch.inf)  # to scores
    batch = {
        "src": x,
        "tgt": 2 * x,
        "src_key_padding_mask": ~masks["encoder"],
        "tgt_key_padding_mask": added,
        "memory_key_padding_mask": ~masks["encoder"],
    }
    model, rows = seeded(transformer(batch_first)), {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masks padding")
        found = calibrate(model, [batch], loss="none")

    def note(name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        mask = masks[name.partition(".")[0]]
        rows[name] = [t.detach()[mask if batch_first else mask.mT].double() for t in (args[0], y - module.bias)]

    for name in found:
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: note(name, m, a, y))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model(**batch)
    torch.backends.mha.set_fastpath_enabled(fast)
    assert len(rows) == 4
    for name, (x, y) in rows.items():
        data = x if found[name].of_inputs else y
        assert found.tokens(name) == len(data)
        assert_close(found[name].data[0], data.mT @ data / len(data))


def test_fused_encoders_call_their_layers_and_are_fused_again_afterwards() -> None:
    model = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 1))
    batch = {"src": draw(2, LENGTH, WIDTH), "src_key_padding_mask": ENCODER == 0}
    assert torch.backends.mha.get_fastpath_enabled()
    found = counted(model, batch, loss="none")
    assert found == {"layers.0.linear1": 11, "layers.0.linear2": 11} and torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(AssertionError, match="embedding dimension"):
        calibrate(model, [draw(2, LENGTH, WIDTH + 1)])
    assert torch.backends.mha.get_fastpath_enabled()
    small = auto_fact(copy.deepcopy(model), 8)
    plan = measure_errors(small.shrank_plan, model, small, [batch])
    assert all(layer.measured > 0 for layer in plan.low_rank) and len(plan.low_rank) == 2


def reference(found: Calibration, model: nn.Module, batch: dict, masks: dict[int, Tensor]) -> None:
    """Compare the inputs that were counted with those that these masks, by positions, let through."""
    seen: dict[str, list[Tensor]] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: seen.setdefault(name, []).append(target(m).tokens(y.detach()))
        )
    with torch.no_grad():
        model(**batch)
    assert len(found) > 5
    for name, outputs in seen.items():
        rows = torch.cat(
            [
                y[masks[y.shape[1:-1].numel()].view(y.shape[:-1])]
                if y.shape[1:-1].numel() in masks
                else y.flatten(0, -2)
                for y in outputs
            ]
        ).double()
        assert found.tokens(name) == len(rows), name
        if not found.of_inputs(name):
            bias, groups = model.get_submodule(name).bias, len(found[name].data)
            rows = (rows if bias is None else rows - bias.detach()).unflatten(1, (groups, -1)).transpose(0, 1)
            assert_close(found[name].data, rows.mT @ rows / rows.shape[1])


def test_speech_is_subsampled_by_the_models_own_rule() -> None:
    model = seeded(wav2vec2)
    mask = torch.ones(2, 800, dtype=torch.long)
    mask[1, 410:] = 0
    batch = {"input_values": draw(2, 800), "attention_mask": mask}
    found = calibrate(model, [batch], loss="none")
    frames = model._get_feature_vector_attention_mask(39, mask)
    reference(found, model, batch, {39: frames, **{n: resampled(mask.bool(), (n,)) for n in (79, 159)}})
    logits = seeded(lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**model.config.to_dict() | {"vocab_size": VOCAB})))
    assert counted(logits, batch)["lm_head"] == int(frames.sum())  # and the loss leaves padding out


def test_images_are_masked_by_their_pixels() -> None:
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, :, 16:] = 0
    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], out_features=["stage2"])
    model = seeded(
        lambda: DetrModel(
            DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                backbone_config=backbone,
                d_model=WIDTH,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_queries=5,
            )
        )
    )
    batch = {"pixel_values": draw(2, 3, 32, 32), "pixel_mask": mask}
    found = calibrate(model, [batch], loss="none")
    reference(found, model, batch, {n * n: resampled(mask.bool(), (n, n)) for n in (16, 8, 4)})


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
BIAS = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill((ENCODER == 0)[:, None, None], torch.finfo(torch.float32).min)
FORMS: dict[str, tuple[Callable[[], nn.Module], object]] = {
    "by position": (lambda: BertModel(BertConfig(**_BERT)), (IDS, ENCODER)),
    "of scores": (lambda: BertModel(BertConfig(**_BERT)), {"input_ids": IDS, "attention_mask": BIAS}),
    "time first": (
        lambda: XLNetModel(XLNetConfig(vocab_size=VOCAB, d_model=WIDTH, n_layer=1, n_head=2, d_inner=64)),
        {"input_ids": IDS, "input_mask": 1.0 - ENCODER},
    ),
    "whole windows": (
        lambda: LongformerModel(LongformerConfig(**TEXT, attention_window=[12])),
        {"input_ids": IDS, "attention_mask": ENCODER},
    ),
    "latents": (
        lambda: PerceiverForMaskedLM(
            PerceiverConfig(
                vocab_size=VOCAB,
                num_latents=6,
                d_latents=WIDTH,
                d_model=WIDTH,
                num_blocks=1,
                num_self_attends_per_block=1,
                num_self_attention_heads=2,
                num_cross_attention_heads=2,
                max_position_embeddings=LENGTH,
            )
        ),
        {"inputs": IDS, "attention_mask": ENCODER},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_masks_and_of_layers(form: str) -> None:
    build, batch = FORMS[form]
    found = counted(seeded(build), batch)
    assert set(found.values()) <= {11, 2, 12 if form == "latents" else 11} and 11 in found.values()


def test_pictures_as_long_as_their_texts_are_not_masked_as_these() -> None:
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 14,
        "patch_size": 7,
    }
    model = seeded(
        lambda: CLIPModel(CLIPConfig(text_config=TEXT | {"eos_token_id": 1}, vision_config=vision, projection_dim=16))
    )
    found = counted(
        model, {"input_ids": IDS[:, :5], "attention_mask": ENCODER[:, :5], "pixel_values": draw(2, 3, 14, 14)}
    )
    assert found["vision_model.encoder.layers.0.mlp.fc1"] == 10  # four patches and the class token
    assert found["text_model.encoder.layers.0.mlp.fc1"] == 8


class Pooled(nn.Module):
    """Every second position is dropped before the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x[:, ::2])


def test_a_mask_that_fits_nothing_is_named_and_a_function_can_say_what_counts() -> None:
    batch = {"x": draw(2, LENGTH, WIDTH), "attention_mask": ENCODER}
    with pytest.warns(UserWarning, match=r"attention_mask \(2, 8\) masks padding, but no layer .* mask= can say"):
        calibrate(seeded(Pooled), [batch])
    assert counted(seeded(Pooled), batch, mask=lambda item: item["attention_mask"][:, ::2]) == {"layer": 6}
    sides = {"encoder": DECODER, "decoder": ENCODER}  # the other way round: the function wins
    found = counted(
        hf_model("t5"), {"input_ids": IDS, "attention_mask": ENCODER, "labels": LABELS}, mask=lambda item: sides
    )
    assert all(count == (13 if sees_the_encoder(name) else 11) for name, count in found.items())
    with pytest.raises(TypeError, match='"encoder" and "decoder"'):
        counted(hf_model("t5"), {"input_ids": IDS, "labels": LABELS}, mask=lambda item: {"left": DECODER})


class Experts(nn.Module):
    """An encoder and a decoder with one layer each, the encoder's one of two by the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])})
        self.decoder = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        x = self.encoder["experts"][int(input_ids[0, 0] > 30)](self.embedding(input_ids))
        return self.decoder(self.embedding(decoder_input_ids)) + x.sum(1, keepdim=True)


def test_layers_that_only_later_batches_reach_are_on_the_side_of_their_neighbours() -> None:
    masks = {"attention_mask": ENCODER, "decoder_attention_mask": DECODER, "decoder_input_ids": IDS}
    calls = [{"input_ids": IDS.index_fill(1, torch.tensor(0), first), **masks} for first in (3, 50)]
    found = calibrate(seeded(Experts), calls)
    assert {name: found.tokens(name) for name in found} == {
        "encoder.experts.0": 11,
        "encoder.experts.1": 11,
        "decoder": 26,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_does_not_change_is_still_the_decoders(dtype: torch.dtype) -> None:
    model = seeded(MODELS["marian"]).to(dtype)
    with torch.no_grad():  # so that it attends to everything alike
        for parameter in model.model.decoder.layers[0].encoder_attn.q_proj.parameters():
            parameter.zero_()
    found = counted(model, {"input_ids": IDS, "attention_mask": ENCODER, "labels": LABELS})
    assert found["model.decoder.layers.0.encoder_attn.out_proj"] == 13
    assert found["model.decoder.layers.0.encoder_attn.k_proj"] == 11
