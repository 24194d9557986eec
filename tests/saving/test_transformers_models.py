"""Heads of low-rank transformers models: other labels, more and fewer words, ties; and loading with a config object."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import shrank
from shrank import LED
from shrank.saving.transformers_models import resized
from tests.common.models import draw, hf_model, hf_outputs, seeded
from tests.common.tolerances import assert_close

WORDS = 64


def factors(model: nn.Module, without: str = "") -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if "_unit." in name and not (without and name.startswith(without))
    }


@pytest.fixture(params=[False, True], ids=["dense head", "low-rank head"])
def labelled(request, tmp_path):
    """A classifier of 32 labels in a folder."""
    config = copy.deepcopy(hf_model("bert").config)
    config.num_labels = 32
    model = shrank.auto_fact(
        seeded(lambda: BertForSequenceClassification(config)), 8, exclude=None if request.param else ["classifier"]
    )
    assert isinstance(model.classifier, LED) == request.param
    model.save_pretrained(tmp_path)
    return model


def test_another_number_of_labels(labelled, tmp_path):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert type(model.classifier) is nn.Linear and model.classifier.weight.shape == (7, 32)
    assert "classifier.weight" in {name for name, *_ in found["mismatched_keys"]}
    kept = factors(labelled, without="classifier")
    assert factors(model).keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in factors(model).items())
    model.save_pretrained(tmp_path / "again")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(hf_outputs(again), hf_outputs(model.eval()))


def test_no_factor_is_drawn_where_sizes_are_ignored(tmp_path):
    hf_small = shrank.auto_fact(hf_model("bert"), 8)
    hf_small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["plan"]["layers"][3]["rank"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks weights that its plan asks for"):
        BertForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_another_head(labelled, tmp_path):
    model = BertForTokenClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert type(model.classifier) is nn.Linear and model.classifier.weight.shape == (5, 32)
    kept = factors(labelled)
    assert factors(model) and all(torch.equal(value, kept[name]) for name, value in factors(model).items())


def test_a_config_object_without_a_plan(labelled, tmp_path):
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    config = loaded.config
    again = BertForSequenceClassification.from_pretrained(tmp_path, config=config).eval()
    assert torch.equal(hf_outputs(again), hf_outputs(labelled))
    assert "quantization_config" not in config.to_dict()


def language_model(tied: bool = False, pivot: bool = False, kind: type = LlamaForCausalLM) -> nn.Module:
    config = copy.deepcopy(hf_model("t5" if kind is T5ForConditionalGeneration else "llama").config)
    config.tie_word_embeddings = False
    model = seeded(lambda: kind(config))
    model = shrank.auto_fact(model, 8, pivot=pivot)
    model.config.tie_word_embeddings = tied
    assert isinstance(model.lm_head, LED) and model.lm_head.pivoted == pivot
    return model


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("words", [80, WORDS, 50, 4])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, T5ForConditionalGeneration])
@pytest.mark.filterwarnings("ignore:the dense weight of a")
def test_another_number_of_words(kind, words, pivot, tmp_path):
    model = language_model(pivot=pivot, kind=kind)
    before = model.lm_head.dense_weight()
    model.resize_token_embeddings(words)
    after = model.lm_head.dense_weight()
    kept = min(words, WORDS)
    assert model.lm_head.out_features == words == model.get_input_embeddings().num_embeddings
    assert_close(after[:kept], before[:kept])
    if words > WORDS:
        assert_close(after[WORDS:], before.mean(0).expand(words - WORDS, -1))
    assert model.lm_head.down.requires_grad
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == words
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_added_words_that_are_drawn_are_fitted():
    model = language_model()
    down = model.lm_head.down.detach().clone()
    torch.manual_seed(3)
    model.resize_token_embeddings(80, mean_resizing=False)
    added = model.lm_head.dense_weight()[WORDS:].detach()
    assert torch.equal(model.lm_head.down, down) and added.norm(dim=1).min() > 0
    assert added.std() < 2 * model.config.initializer_range


@pytest.mark.parametrize("pivot", [False, True])
def test_a_resized_layer_keeps_its_bias_mode_and_flags(pivot):
    head = LED(12, 10, 4, pivot=pivot).eval().requires_grad_(False)
    x, rows = draw(3, 12), draw(2, 4) @ head.down  # rows that the down factor can give
    larger = resized(head, 12, rows)
    assert_close(larger(x)[:, :10], head(x))
    assert_close(larger(x)[:, 10:], x @ rows.mT + head.bias.mean())
    smaller = resized(head, 7)
    assert_close(smaller(x), head(x)[:, :7])
    assert not smaller.training and not any(p.requires_grad for p in smaller.parameters())


def test_a_low_rank_head_is_tied_to_nothing(tmp_path):
    model = language_model(tied=True)
    expected = hf_outputs(model)
    model.tie_weights()
    assert torch.equal(hf_outputs(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(hf_outputs(LlamaForCausalLM.from_pretrained(tmp_path).eval()), expected)
    model.resize_token_embeddings(80)
    assert_close(hf_outputs(model)[..., :WORDS], expected)
