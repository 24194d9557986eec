"""A model whose parameters are the bytes of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shrank.streaming.mapped import MappedModel
from shrank.streaming.values import Unstreamable
from tests.common.models import hf_inputs, hf_model, seeded
from tests.common.tolerances import assert_close

_WIDE = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 4, "vocab_size": 64}


def resident() -> int:
    """Bytes of this process in memory that are those of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_it_is_the_model_and_lets_go_of_what_was_touched(tmp_path) -> None:
    dense = seeded(lambda: LlamaForCausalLM(LlamaConfig(**_WIDE, num_hidden_layers=2)))
    dense.save_pretrained(tmp_path, max_shard_size="20MB")
    size = sum(p.nbytes for p in dense.parameters())
    mapped = MappedModel(str(tmp_path))
    assert len(mapped.files) > 2
    untouched = resident()
    ids = {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        assert_close(mapped.model(**ids).logits, dense(**ids).logits)
    touched = resident()
    mapped.release(mapped.model)
    assert touched - untouched > 0.8 * size and resident() - untouched < 0.1 * size
    with torch.no_grad():
        assert_close(mapped.model(**ids).logits, dense(**ids).logits)


def test_tied_weights_stay_tied(tmp_path) -> None:
    model = hf_model("llama")
    model.save_pretrained(tmp_path)
    mapped = MappedModel(str(tmp_path)).model
    assert mapped.lm_head.weight is mapped.model.embed_tokens.weight
    with torch.no_grad():
        assert_close(mapped(**hf_inputs(mapped)).logits, model(**hf_inputs(model)).logits)


def test_what_is_converted_as_it_loads_is_not_mapped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shrank.streaming.mapped._CONVERTED", 1 << 20)
    config = LlamaConfig(**_WIDE, num_hidden_layers=2)
    model = seeded(lambda: LlamaForCausalLM(config))
    model.save_pretrained(tmp_path)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    with pytest.raises(Unstreamable, match=r"transformers converts \d+ tensors of .*, such as .* becomes bfloat16"):
        MappedModel(str(tmp_path))


def test_other_weights_are_not_mapped(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unstreamable, match=r"neither model\.safetensors nor"):
        MappedModel(str(tmp_path))
    with pytest.raises(Unstreamable, match="is no folder on this machine"):
        MappedModel("someone/some-model")
