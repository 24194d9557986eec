"""Tiny transformers models in folders, with the processors that read files for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from tests.common.models import seeded

PAD, END, START, UNKNOWN, IMAGE_TOKEN, WORDS = 0, 1, 2, 3, 4, 50
RATE, SIDE, POSITIONS = 16000, 16, 24
_VOCABULARY = 64
_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
_IDS = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START, "vocab_size": _VOCABULARY}
_TEXT = {**_SIZES, **_IDS, "max_position_embeddings": POSITIONS}
_SEQ2SEQ = {
    **_IDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": END,
    "forced_eos_token_id": None,
}
_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 1,
    "vocab_size": _VOCABULARY,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": END,
}
_VISION = {**_SIZES, "image_size": SIDE, "patch_size": 4}
_WHISPER = {
    **_SEQ2SEQ,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": POSITIONS,
    "decoder_start_token_id": START,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def word_ids(text: str) -> list[int]:
    """The tokens of words w0, w1, ..., without those that begin or end a text."""
    return [int(word[1:]) + IMAGE_TOKEN + 1 for word in text.split()]


def tokenizer(start: bool = False, padding: bool = True) -> PreTrainedTokenizerFast:
    """Of words, with the end of the text behind it, and with `start` its start before."""
    special = {"<pad>": PAD, "</s>": END, "<s>": START, "<unk>": UNKNOWN, "<image>": IMAGE_TOKEN}
    words = {f"w{i}": i + len(special) for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel({**special, **words}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    inner.post_processor = processors.TemplateProcessing(
        single=("<s> " if start else "") + "$A </s>", special_tokens=[("</s>", END), ("<s>", START)]
    )
    pad = {"pad_token": "<pad>"} if padding else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        **pad,
    )


def _image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _clip_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _captioner() -> nn.Module:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**_VISION), GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS, **_IDS)
    )
    model = VisionEncoderDecoderModel(config)
    for place in (model.config, model.generation_config):
        place.decoder_start_token_id, place.pad_token_id, place.eos_token_id = START, PAD, END
    return model


def _llava() -> nn.Module:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_VISION),
            text_config=LlamaConfig(**_TEXT),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    )


def _clip() -> nn.Module:
    return CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16))


def _wav2vec2() -> nn.Module:
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            **_SIZES,
            vocab_size=_VOCABULARY,
            conv_dim=(16, 16),
            conv_kernel=(10, 8),
            conv_stride=(5, 160),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        )
    )


def _speech_t5() -> nn.Module:
    return SpeechT5ForTextToSpeech(
        SpeechT5Config(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            speech_decoder_prenet_units=16,
        )
    )


def _llava_processor() -> LlavaProcessor:
    return LlavaProcessor(
        _clip_image_processor(),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# The model, and what reads files for it.
FOLDERS: dict[str, tuple[Callable[[], nn.Module], list[Callable[[], object]]]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**_TEXT)), [tokenizer]),
    "roberta": (lambda: RobertaModel(RobertaConfig(**_TEXT)), [tokenizer]),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS, **_IDS)),
        [lambda: tokenizer(padding=False)],
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**_TEXT)), [tokenizer]),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**_T5)), [tokenizer]),
    "t5_base": (lambda: T5Model(T5Config(**_T5)), [tokenizer]),
    "t5_encoder": (lambda: T5EncoderModel(T5Config(**_T5)), [tokenizer]),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**_SEQ2SEQ, max_position_embeddings=POSITIONS)),
        [lambda: tokenizer(start=True)],
    ),
    "bart_base": (lambda: BartModel(BartConfig(**_SEQ2SEQ, max_position_embeddings=POSITIONS)), [tokenizer]),
    "bart_classifier": (
        lambda: BartForSequenceClassification(BartConfig(**_SEQ2SEQ, max_position_embeddings=POSITIONS)),
        [tokenizer],
    ),
    "marian": (
        lambda: MarianMTModel(
            MarianConfig(**{**_SEQ2SEQ, "decoder_start_token_id": PAD}, max_position_embeddings=POSITIONS)
        ),
        [tokenizer],
    ),
    "whisper": (
        lambda: WhisperForConditionalGeneration(WhisperConfig(**_WHISPER)),
        [lambda: tokenizer(start=True), lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=1)],
    ),
    "whisper_base": (
        lambda: WhisperModel(WhisperConfig(**_WHISPER)),
        [tokenizer, lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=1)],
    ),
    "wav2vec2": (_wav2vec2, [Wav2Vec2FeatureExtractor]),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**_VISION)), [_image_processor]),
    "clip": (_clip, [tokenizer, _clip_image_processor]),
    "captioner": (_captioner, [tokenizer, _image_processor]),
    "llava": (_llava, [_llava_processor]),
    "speech_t5": (_speech_t5, [tokenizer]),
}


def write_model(name: str, folder: Path) -> Path:
    """The model of this name with its processors, as from_pretrained reads them."""
    build, readers = FOLDERS[name]
    seeded(build).save_pretrained(folder)
    for reader in readers:
        reader().save_pretrained(folder)
    return folder


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_sound(path: Path, seed: int = 0, seconds: float = 0.5, rate: int = RATE) -> Path:
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype("float32"), rate)
    return path


def sentences(count: int, words: int = 12) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in draw.integers(0, WORDS, words - n % 4)) for n in range(count)]


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_data(folder: Path, count: int = 10) -> Path:
    """texts.txt, and the folders images, captioned, sounds (all of one length) and spoken (of different ones, at half
    the rate)."""
    texts = sentences(count)
    (folder / "texts.txt").write_text("\n\n".join(texts))
    for name in ("images", "captioned", "sounds", "spoken"):
        (folder / name).mkdir()
    for i, text in enumerate(texts):
        write_image(folder / "images" / f"{i}.png", i)
        write_image(folder / "captioned" / f"{i}.jpg", i, size=(16 + i, 30))
        write_sound(folder / "sounds" / f"{i}.wav", i)
        write_sound(folder / "spoken" / f"{i}.flac", i, seconds=0.3 + 0.05 * i, rate=RATE // 2)
        for name in ("captioned", "spoken"):
            (folder / name / f"{i}.txt").write_text(text)
    return folder
