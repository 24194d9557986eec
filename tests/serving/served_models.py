"""Tiny language models that servers know, compressed in all the forms that a plugin must serve."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
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
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(  # its experts stay dense
        Qwen3MoeConfig(**_SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    ),
    # With one head of keys, which two processes both hold.
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**_SIZES, "num_key_value_heads": 1}, head_dim=32)),
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
                if parameter.dim() > 1:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write(family: str, folder: Path, pivot: bool = False) -> nn.Module:
    """The compressed model, saved to the folder."""
    model = shrank.auto_fact(build(family), RANKS, pivot=pivot)
    model.save_pretrained(folder)
    return model


def write_vision(folder: Path) -> nn.Module:
    """A model of images and texts, whose language model is low-rank, with its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
        text = GemmaConfig(**_SIZES, head_dim=32)
        config = PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=4, projection_dim=128, hidden_size=128
        )
        model = PaliGemmaForConditionalGeneration(config).eval()
    model = shrank.auto_fact(model, RANKS, exclude=["*vision_tower*", "*projector*"])
    model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    PaliGemmaProcessor(images, tokenizer_of(WORDS)).save_pretrained(folder)
    return model


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A LoRA adapter, written to the folder as peft does, and the dense model that it makes of this one."""
    dense, tensors, rank = shrank.merge(copy.deepcopy(model)), {}, 4
    names = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    generator = torch.Generator().manual_seed(1)
    for fqn, module in dense.named_modules():
        if fqn.rpartition(".")[2] not in names:
            continue
        A = torch.randn(rank, module.in_features, generator=generator) / 8
        B = torch.randn(module.out_features, rank, generator=generator) / 8
        module.weight.data += B @ A
        tensors |= {f"base_model.model.{fqn}.lora_A.weight": A, f"base_model.model.{fqn}.lora_B.weight": B}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dense


def tokenizer_of(words: int) -> PreTrainedTokenizerFast:
    """Of words w5, w6, ..., one token each."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4}
    inner = Tokenizer(models.WordLevel(special | {f"w{i}": i for i in range(len(special), words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


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
