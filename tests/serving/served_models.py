"""Tiny language models that servers know, compressed in all the forms that a plugin must serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import shrank

WORDS = 300
_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),  # with biases
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=False)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SIZES, head_dim=32)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),  # one layer for query, key and value on disk as well
}
# One layer of each stack dense, unequal ranks, a stack that is all low-rank and one that is dense.
RANKS = {
    "*.0.*q_proj": 48,
    "*.0.*k_proj": 32,
    "*.0.*v_proj": None,
    "*.0.*gate_proj": 64,
    "*.0.*up_proj": None,
    "*.1.*gate_proj": None,
    "*.1.*up_proj": None,
    "*lm_head": 24,
    "*": 40,
}


def build(family: str) -> nn.Module:
    """The dense model, whose outputs depend on all its weights, norms and biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write(family: str, folder: Path, pivot: bool = False) -> nn.Module:
    """The compressed model, saved to the folder."""
    model = shrank.auto_fact(build(family), RANKS, pivot=pivot)
    model.save_pretrained(folder)
    return model


def prompts(count: int = 3, length: int = 20) -> list[list[int]]:
    drawn = torch.randint(3, WORDS, (count, length), generator=torch.Generator().manual_seed(0))
    return [row[: length - 3 * number].tolist() for number, row in enumerate(drawn)]


@torch.inference_mode()
def continued(model: nn.Module, prompt: list[int], tokens: int = 12) -> tuple[list[int], torch.Tensor]:
    """The greedy continuation by transformers, and the log-probabilities (tokens,) of what it chose."""
    ids, chosen = list(prompt), []
    for _ in range(tokens):
        logits = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        chosen.append(logits.max())
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(chosen)
