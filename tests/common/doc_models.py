"""What the hidden setup of the documentation's pages puts into the working folder: a tiny model and data for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.common.model_folders import tokenizer
from tests.common.models import seeded

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def texts(count: int = 24, words: int = 20) -> list[str]:
    numbers = torch.randint(0, 50, (count, words), generator=torch.Generator().manual_seed(0))
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def token_batches(count: int = 4) -> list[dict[str, Tensor]]:
    numbers = torch.randint(5, 55, (count, 6, 20), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in numbers]


def encoder() -> PreTrainedModel:
    """A tiny BERT in the folder my-model, with its tokenizer and texts.txt beside it."""
    return _in_folder(seeded(lambda: BertModel(BertConfig(**_SIZES))))


def language_model() -> PreTrainedModel:
    """A tiny Llama in the folder my-model, with its tokenizer and texts.txt beside it."""
    return _in_folder(seeded(lambda: LlamaForCausalLM(LlamaConfig(**_SIZES))))


def _in_folder(model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained("my-model")
    tokenizer().save_pretrained("my-model")
    Path("texts.txt").write_text("\n\n".join(texts()))
    return model
