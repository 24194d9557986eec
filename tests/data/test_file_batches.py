"""Files of texts, images and sounds as calls: what the batches hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from shrank.data.file_batches import batches_from_file
from shrank.data.media import read_image, read_sound
from shrank.data.processors import load_feature_extractor, load_image_processor
from shrank.saving.transformers_folder import load_model
from tests.common.model_folders import (
    END,
    IMAGE_TOKEN,
    RATE,
    SIDE,
    sentences,
    word_ids,
    write_image,
    write_lines,
    write_sound,
)


def batches(source: Path, path: Path, **options) -> tuple[torch.nn.Module, list]:
    model = load_model(str(source))
    found = batches_from_file(path, model, str(source), **options)
    with torch.no_grad():
        for batch in found:
            batch.call(model)
    return model, found


@pytest.mark.parametrize("name", ["bert", "llama", "t5_encoder", "roberta"])
def test_texts(name: str, model_folder, data_folder) -> None:
    _, found = batches(model_folder(name), data_folder / "texts.txt", batch_size=4)
    assert [len(batch.kwargs["input_ids"]) for batch in found] == [4, 4, 2]
    first, mask = found[0].kwargs["input_ids"], found[0].kwargs["attention_mask"].bool()
    assert [row[keep].tolist() for row, keep in zip(first, mask, strict=True)] == [
        [*word_ids(text), END] for text in sentences(10)[:4]
    ]
    assert len(found[0].masks) == 1 and found[0].kwargs.keys() == {"input_ids", "attention_mask"}


def test_texts_are_run_alone_where_nothing_pads_them(model_folder, data_folder) -> None:
    _, found = batches(model_folder("gpt2"), data_folder / "texts.txt")
    assert [batch.kwargs["input_ids"].tolist() for batch in found] == [[[*word_ids(t), END]] for t in sentences(10)]


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_an_encoder_decoder_says_the_target_or_else_the_text(name: str, model_folder, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "w1 w2", "target": "w3"}, {"text": "w4 w5"}])
    _, (batch,) = batches(model_folder(name), path)
    labels = batch.kwargs["labels"][:, 1:] if name == "bart" else batch.kwargs["labels"]
    assert labels.tolist() == [[*word_ids("w3"), END, -100], [*word_ids("w4 w5"), END]]
    assert batch.kwargs["input_ids"].shape == batch.kwargs["labels"].shape and len(batch.masks) == 2


def test_images(model_folder, data_folder) -> None:
    source = model_folder("vit")
    _, found = batches(source, data_folder / "images")
    assert [batch.kwargs["pixel_values"].shape for batch in found] == [(8, 3, SIDE, SIDE), (2, 3, SIDE, SIDE)]
    expected = load_image_processor(str(source))(read_image(data_folder / "images" / "9.png"), return_tensors="pt")
    assert torch.equal(found[1].kwargs["pixel_values"][1:], expected["pixel_values"])


def test_images_with_texts_for_a_model_of_both(model_folder, data_folder) -> None:
    source = model_folder("clip")
    _, (first, second) = batches(source, data_folder / "captioned")
    assert first.kwargs["pixel_values"].shape == (8, 3, SIDE, SIDE) and first.kwargs["input_ids"].shape[0] == 8
    assert second.kwargs["input_ids"][1].tolist()[:4] == word_ids(sentences(10)[9])[:4]
    expected = load_image_processor(str(source))(read_image(data_folder / "captioned" / "9.jpg"), return_tensors="pt")
    assert torch.equal(second.kwargs["pixel_values"][1:], expected["pixel_values"])


def test_a_captioner_says_the_caption_or_what_it_generates(model_folder, data_folder) -> None:
    model, (batch, _) = batches(model_folder("captioner"), data_folder / "captioned")
    assert [row[row != -100].tolist() for row in batch.kwargs["labels"]] == [
        [*word_ids(text), END] for text in sentences(10)[:8]
    ]
    model, (batch, _) = batches(model_folder("captioner"), data_folder / "images", max_length=6)
    best = model(**batch.kwargs).logits.argmax(-1)
    counted = batch.kwargs["labels"] != -100
    assert torch.equal(best[counted], batch.kwargs["labels"][counted]) and batch.kwargs["labels"].shape[1] <= 6


def test_speech_with_and_without_transcripts(model_folder, data_folder) -> None:
    source = model_folder("whisper")
    _, (batch, _) = batches(source, data_folder / "spoken")
    assert [row[row != -100].tolist() for row in batch.kwargs["labels"]] == [
        [*word_ids(text), END] for text in sentences(10)[:8]
    ]
    process = load_feature_extractor(str(source))
    expected = process(read_sound(data_folder / "spoken" / "1.flac", RATE), sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(batch.kwargs["input_features"][1:2], expected["input_features"])
    _, (batch, _) = batches(source, data_folder / "sounds", max_length=5)
    assert batch.kwargs["labels"].shape[0] == 8 and 1 <= batch.kwargs["labels"].shape[1] <= 5


def test_a_target_goes_before_a_transcript(model_folder, tmp_path) -> None:
    write_sound(tmp_path / "a.wav")
    path = write_lines(tmp_path / "a.jsonl", [{"audio": "a.wav", "text": "w1", "target": "w2"}])
    _, (batch,) = batches(model_folder("whisper"), path)
    assert batch.kwargs["labels"].tolist() == [[*word_ids("w2"), END]]


def test_sounds_of_different_lengths_are_not_padded(model_folder, data_folder) -> None:
    _, found = batches(model_folder("wav2vec2"), data_folder / "spoken")
    assert [batch.kwargs["input_values"].shape for batch in found] == [
        (1, int(RATE * (0.3 + 0.05 * i))) for i in range(10)
    ]
    _, found = batches(model_folder("wav2vec2"), data_folder / "sounds")
    assert [batch.kwargs["input_values"].shape for batch in found] == [(8, RATE // 2), (2, RATE // 2)]


def test_images_within_texts(model_folder, tmp_path) -> None:
    write_image(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": "w1", "image": "a.png"}, {"text": "w2 <image> w3", "image": "a.png"}, {"text": "w4"}],
    )
    _, found = batches(model_folder("llava"), path)
    image = [IMAGE_TOKEN] * (SIDE // 4) ** 2
    assert [batch.kwargs["input_ids"].tolist() for batch in found] == [
        [[*image, *word_ids("w1"), END]],
        [[*word_ids("w2"), *image, *word_ids("w3"), END]],
        [[*word_ids("w4"), END]],
    ]
    assert [batch.kwargs.get("pixel_values", torch.empty(0)).numel() > 0 for batch in found] == [True, True, False]


def test_numbers_have_the_precision_of_the_model(model_folder, data_folder, tmp_path) -> None:
    load_model(str(model_folder("clip"))).bfloat16().save_pretrained(tmp_path)
    for file in model_folder("clip").glob("*.json"):
        if file.name != "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model, (batch, _) = batches(tmp_path, data_folder / "captioned")
    assert model.dtype == batch.kwargs["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("clip", [{"text": "w1", "image": "a.png"}, {"text": "w1"}], "line 2: has no image, which CLIPModel needs"),
        (
            "clip",
            [{"image": "a.png"}],
            r'line 1: has no text, which CLIPModel needs.*\{"text": .*, "image": "cat.jpg"\}',
        ),
        ("vit", [{"text": "w1"}], r'line 1: has no image.*\{"image": "cat.jpg"\}'),
        ("wav2vec2", [{"image": "a.png"}], r'line 1: has no audio.*\{"audio": "cat.wav"\}'),
        ("bert", [{"image": "a.png"}], "line 1: has no text, which BertForMaskedLM needs"),
        ("t5", [{"target": "w1"}], "line 1: has no text, which T5ForConditionalGeneration needs"),
        ("whisper", [{"audio": "a.wav", "text": "w1"}, {"audio": "a.wav"}], "line 2: has no text, which others have"),
        ("whisper_base", [{"audio": "a.wav"}], "no text for the decoder, and WhisperModel has no head"),
        ("wav2vec2", [{"audio": "short.wav"}], r"short\.wav: its 5 samples are too few for Wav2Vec2ForCTC"),
        ("speech_t5", [{"text": "w1"}], "SpeechT5ForTextToSpeech: its decoder takes decoder_input_values"),
    ],
)
def test_what_is_missing_is_said(name: str, lines: list[dict], says: str, model_folder, tmp_path) -> None:
    write_image(tmp_path / "a.png")
    write_sound(tmp_path / "a.wav")
    write_sound(tmp_path / "short.wav", seconds=5 / RATE)
    model, source = load_model(str(model_folder(name))), str(model_folder(name))
    with pytest.raises(ValueError, match=says):
        batches_from_file(write_lines(tmp_path / "a.jsonl", lines), model, source)


class _Grids(torch.nn.Module):
    main_input_name, dtype = "pixel_values", torch.float32

    def forward(self, pixel_values, grid):
        return pixel_values


def test_what_no_processor_makes_is_named(model_folder, data_folder) -> None:
    with pytest.raises(ValueError, match="_Grids needs grid, which none of its processors makes"):
        batches_from_file(data_folder / "images", _Grids(), str(model_folder("vit")))


class _Listener(torch.nn.Module):
    """Sounds stand within its texts."""

    main_input_name, can_generate = "input_ids", staticmethod(lambda: True)

    def forward(self, input_ids=None, input_features=None):
        return input_ids


def test_sounds_within_texts_are_refused(tmp_path) -> None:
    write_sound(tmp_path / "a.wav")
    path = write_lines(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": "w1", "audio": "a.wav"}])
    with pytest.raises(ValueError, match="line 2: _Listener takes sounds within texts or instead of them"):
        batches_from_file(path, _Listener(), str(tmp_path))


def test_the_processor_of_another_model_is_refused(model_folder, data_folder) -> None:
    with pytest.raises(ValueError, match="makes input_features of audio, and Wav2Vec2ForCTC takes input_values"):
        batches_from_file(
            data_folder / "sounds", load_model(str(model_folder("wav2vec2"))), str(model_folder("whisper"))
        )


def test_what_is_left_out_is_warned_of(model_folder, tmp_path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    path = write_lines(tmp_path / "a.jsonl", [{"text": "w1", "image": "a.png", "target": "w2"}])
    with pytest.warns(UserWarning) as caught:
        batches(model_folder("llama"), path)
    assert [str(x.message) for x in caught] == [
        "LlamaForCausalLM takes no image: it is left out",
        "LlamaForCausalLM has no decoder of its own: the target is left out",
    ]
