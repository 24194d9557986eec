"""A tiny sentence-transformers model: a transformer, pooling and a Dense module."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Dense, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TEXTS = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 64))]
_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def sentence_model(folder: Path, convolution: bool = False) -> SentenceTransformer:
    """The model, whose transformer is read from this folder, where it is written first."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**_CONFIG)).save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        ).save_pretrained(folder)
        parts = [Transformer(str(folder)), Pooling(64), Dense(64, 48)]
        if convolution:
            parts[1:] = [CNN(64, 32), Pooling(96)]
        return SentenceTransformer(modules=parts, device="cpu")
