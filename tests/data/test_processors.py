"""Processors of a model's folder: those that are there load, and what is wrong with the others is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shrank.data import processors
from tests.common.model_folders import SIDE, word_ids


def test_processors_load_without_torchvision(model_folder, monkeypatch) -> None:
    assert processors.load_tokenizer(str(model_folder("bert")))("w1 w2")["input_ids"][:2] == word_ids("w1 w2")
    made = processors.load_image_processor(str(model_folder("clip")))
    assert type(made).__name__ == "CLIPImageProcessorPil" and made.crop_size["height"] == SIDE
    assert processors.load_feature_extractor(str(model_folder("whisper"))).feature_size == 16
    joined = processors.load_processor(str(model_folder("llava")))
    assert type(joined.image_processor).__name__ == "CLIPImageProcessorPil"


@pytest.mark.parametrize(
    ("model", "load", "file", "content", "says"),
    [
        ("vit", "load_image_processor", "preprocessor_config.json", None, "has no image processor that loads"),
        (
            "vit",
            "load_image_processor",
            "preprocessor_config.json",
            "{broken",
            r"preprocessor_config\.json: is no JSON",
        ),
        ("vit", "load_image_processor", "preprocessor_config.json", "[]", r"preprocessor_config\.json: is not what"),
        (
            "vit",
            "load_image_processor",
            "preprocessor_config.json",
            '{"image_processor_type": "No"}',
            "has no image processor that loads",
        ),
        ("vit", "load_tokenizer", "preprocessor_config.json", None, "has no tokenizer that loads"),
        ("vit", "load_feature_extractor", "preprocessor_config.json", None, "has no feature extractor that loads"),
        ("vit", "load_processor", "preprocessor_config.json", None, "has no processor that loads"),
        ("llama", "load_processor", "preprocessor_config.json", None, "no processor that joins images to texts"),
        ("llama", "load_tokenizer", "tokenizer.json", "{", r"tokenizer\.json: is no JSON"),
        ("llama", "load_tokenizer", "tokenizer.json", "{}", r"tokenizer\.json: is not what"),
        ("llama", "load_tokenizer", "tokenizer.json", '{"model": {}}', "has no tokenizer that loads"),
        ("marian", "load_tokenizer", "tokenizer*", None, "has no tokenizer that loads"),
        # transformers makes one up from nothing
        ("bert", "load_tokenizer", "tokenizer*", None, "has no file with the vocabulary"),
        ("t5", "load_tokenizer", "tokenizer*", None, "has no file with the vocabulary"),
    ],
)
def test_missing_and_damaged_processors_are_named(model, load, file, content, says, model_folder, tmp_path) -> None:
    folder = Path(shutil.copytree(model_folder(model), tmp_path / model))
    for path in folder.glob(file):
        path.unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        getattr(processors, load)(str(folder))
    assert model in str(caught.value) and len(str(caught.value)) < 600
