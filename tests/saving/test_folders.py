"""Folders of compressed copies: all that the source has, but neither the dense weights nor their card."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import nn

import shrank
from shrank.saving.transformers_folder import inspect_folder, load_model, save_model
from tests.common.models import hf_model, hf_outputs
from tests.common.sentences import TEXTS, sentence_model

CARD = """---
license: mit
language: en
pipeline_tag: sentence-similarity
library_name: sentence-transformers
tags: [small]
model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: acc, value: 1}]}]}]
---
# Dense sentences

```python
# a comment
```
Right in 99% of all cases.
"""


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["", "0_Transformer"], ids=["at the root", "in a folder"])
def sentences(request, tmp_path) -> tuple[Path, Path]:
    """A sentence-transformers folder, its transformer where newer or where older versions put it, and its copy."""
    source, place = tmp_path / "dense", request.param
    sentence_model(tmp_path / "transformer").save_pretrained(str(source))
    if place:
        (source / place).mkdir()
        for name in (
            "config.json",
            "model.safetensors",
            "sentence_bert_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            shutil.move(source / name, source / place / name)
        modules = (source / "modules.json").read_text()
        (source / "modules.json").write_text(modules.replace('"path": ""', f'"path": "{place}"'))
    (source / "README.md").write_text(CARD)
    weights = source / place / "model.safetensors"
    for name in ("onnx/model.onnx", "checkpoint-5/model.safetensors", ".cache/model.safetensors", "pytorch_model.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(weights, source / name)
    (source / "checkpoint-5" / "config.json").write_text("{}")
    (source / "settings").mkdir()
    (source / "settings" / "prompts.txt").write_text("query:")
    model = shrank.auto_fact(load_model(str(source)), 8)
    save_model(model, str(source), tmp_path / "copy")
    return source, tmp_path / "copy"


def test_a_sentence_transformers_folder(sentences):
    source, copy = sentences
    gone = {
        "onnx/model.onnx",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/config.json",
        ".cache/model.safetensors",
        "pytorch_model.bin",
    }
    assert files_in(copy) == files_in(source) - gone
    loaded, expected = (SentenceTransformer(str(folder), device="cpu") for folder in (copy, source))
    shrank.auto_fact(expected[0], 8)
    assert np.array_equal(loaded.encode(TEXTS), expected.encode(TEXTS))
    plan, problems = inspect_folder(copy)
    assert plan.low_rank and not problems


def test_the_card_is_that_of_the_copy(sentences):
    source, copy = sentences
    card = ModelCard.load(copy / "README.md")
    data = card.data.to_dict()
    assert data == {
        "license": "mit",
        "language": "en",
        "pipeline_tag": "sentence-similarity",
        "base_model": "dense",
        "library_name": "sentence-transformers",
        "tags": ["small", "shrank", "low-rank"],
    }
    plan = shrank.describe(load_model(str(copy)))
    assert f"replaced {len(plan.low_rank)} layers of `dense`" in card.text and "ranks 8 to 8" in card.text
    assert f"| parameters | {plan.params_before:,} | {plan.params_after:,} (" in card.text
    assert "import shrank\n" in card.text and f'SentenceTransformer("{copy.name}")' in card.text
    own, _, dense = card.text.partition("## The card of the dense model")
    assert "99%" not in own and "99%" in dense
    assert "\n### Dense sentences\n" in dense and "\n# a comment\n" in dense
    model = load_model(str(source))
    dense_bytes = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert f"| bytes | {dense_bytes:,} |" in own


def test_copies_of_copies_and_merged_copies(sentences, tmp_path):
    _, copy = sentences
    for step in ("twice", "thrice"):
        save_model(load_model(str(copy)), str(copy), tmp_path / step)
        text = (tmp_path / step / "README.md").read_text()
        assert text.count("The card of the dense model") == text.count("### Dense sentences") == 1
        assert ModelCard(text).data.base_model == "dense"
        copy = tmp_path / step
    save_model(shrank.merge(load_model(str(copy))), str(copy), tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "import shrank" not in card.text and "dense again" in card.text and card.data.tags == ["small"]
    assert files_in(tmp_path / "merged") == files_in(copy)


@pytest.mark.parametrize("card", [None, "no metadata at all\n", "---\n[broken: yaml\n---\n# Title\n"])
def test_sources_without_a_proper_card(card, tmp_path):
    dense = hf_model("bert")
    dense.save_pretrained(tmp_path / "owner--name")
    if card is not None:
        (tmp_path / "owner--name" / "README.md").write_text(card)
    save_model(shrank.auto_fact(dense, 8), str(tmp_path / "owner--name"), tmp_path / "copy")
    written = ModelCard.load(tmp_path / "copy" / "README.md")
    assert written.data.library_name == "transformers" and "low-rank" in written.data.tags
    assert 'BertForSequenceClassification.from_pretrained("copy")' in written.text
    assert (card or "").strip().splitlines()[-1:] in ([], ["no metadata at all"], ["# Title"])
    assert ("no metadata at all" in written.text) == (card == "no metadata at all\n")


def test_the_hubs_name_of_a_cached_source(tmp_path):
    source = tmp_path / "models--someone--bert-tiny" / "snapshots" / "0123abc"
    hf_model("bert").save_pretrained(source)
    save_model(shrank.auto_fact(load_model(str(source)), 8), str(source), tmp_path / "copy")
    assert ModelCard.load(tmp_path / "copy" / "README.md").data.base_model == "someone/bert-tiny"


def test_another_models_weights_beside_the_transformer_are_kept(tmp_path):
    model = hf_model("bert")
    model.save_pretrained(tmp_path / "dense")
    for name, tensors in (
        ("vocoder", {"conv.weight": torch.ones(3)}),
        ("old", {"encoder.layer.0.output.dense.weight": torch.ones(3)}),
    ):  # without the base's name
        (tmp_path / "dense" / name).mkdir()
        save_file(tensors, tmp_path / "dense" / name / "model.safetensors")
    save_model(shrank.auto_fact(model, 8), str(tmp_path / "dense"), tmp_path / "copy")
    assert {name for name in files_in(tmp_path / "copy") if "/" in name} == {"vocoder/model.safetensors"}


def test_a_model_with_adapters_is_not_written(tmp_path):
    model: nn.Module = shrank.auto_fact(hf_model("bert"), 8)
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="transformers saves nothing but these"):
        save_model(model, str(tmp_path), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_plain_folder_is_copied_as_ever(tmp_path):
    model = hf_model("bert")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "vocab.txt").write_text("a\nb\n")
    save_model(shrank.auto_fact(model, 8), str(tmp_path / "dense"), tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.txt").read_text() == "a\nb\n"
    assert torch.equal(hf_outputs(load_model(str(tmp_path / "copy")).eval()), hf_outputs(model))


def test_names_of_the_hub_are_passed_on_as_they_are(monkeypatch) -> None:
    asked = []

    def from_pretrained(name: str) -> None:
        asked.append(name)
        raise OSError("there is no network here")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="no network"):
        load_model("organisation/model")
    assert asked == ["organisation/model"]
