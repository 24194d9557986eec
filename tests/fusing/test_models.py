"""What the pass finds in real architectures: tiny, with random weights, and in one graph as before."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from torch import nn

import shrank
from shrank.fusing.rewrite import fuse
from tests.common.ops import pretend_native
from tests.common.tolerances import assert_close

from .test_rewrite import ends_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = {"input_ids": (torch.arange(10) % 7 + 3).reshape(2, 5)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
# Model, configuration, inputs, and how many ops have which end in the fused graph: activation, whether a residual is
# added.
BARE, PLUS = ("none", False), ("none", True)
TRANSFORMER = {BARE: 3, PLUS: 2, ("gelu", False): 1}  # q, k, v; the output and the second layer of the MLP; its first
GATED = {BARE: 4, PLUS: 2, ("silu", False): 1}  # the same, and the factor beside the gate
CASES = {
    "Bert": (SMALL | {"vocab_size": 20}, TOKENS, TRANSFORMER | {BARE: 4}),  # the pooler
    "ModernBert": (
        SMALL | {"vocab_size": 20, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        TOKENS,
        {BARE: 2, PLUS: 2},  # q, k and v in one layer, as are the gate and what it multiplies
    ),
    "GPT2": (
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20, "eos_token_id": 1},
        TOKENS,
        {BARE: 1, PLUS: 2, ("gelu_tanh", False): 1},
    ),
    "Llama": (SMALL | {"vocab_size": 20}, TOKENS, GATED),
    "Qwen3": (SMALL | {"vocab_size": 20, "num_key_value_heads": 1, "head_dim": 16}, TOKENS, GATED),
    "ViT": (SMALL | {"image_size": 16, "patch_size": 8}, PIXELS, TRANSFORMER | {BARE: 5}),  # patches and pooler
    "ConvNext": (
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2},
        PIXELS,
        {BARE: 3, ("gelu", False): 2},  # layer_scale comes before the residual
    ),
    "ResNet": (
        {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"},
        PIXELS,
        {BARE: 1, PLUS: 1, ("relu", False): 1},  # with their batch norms
    ),
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    settings, _, _ = CASES[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    return shrank.auto_fact(model.eval(), rank=4)


@pytest.mark.parametrize("name", CASES)
def test_a_models_ops_take_over_what_follows_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    torch._dynamo.reset()
    before, after = [], []

    def backend(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        before.append(ends_of(module.graph))
        fuse(module.graph)
        module.graph.lint()
        module.recompile()
        after.append(ends_of(module.graph))
        return module

    model, inputs, ends = tiny(name), *CASES[name][1:]
    with shrank.backend("native"), torch.no_grad():
        wanted = model(**inputs)[0]
        found = torch.compile(model, backend=backend)(**inputs)[0]
    assert_close(found, wanted)
    assert len(before) == 1, "one graph, as without the pass"
    assert set(before[0]) == {BARE} and len(before[0]) == len(after[0])
    assert Counter(after[0]) == ends
