"""What the pass finds in real architectures: tiny, with random weights, and in one graph as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

import shrank
from tests.common.models import seeded, with_statistics
from tests.common.ops import pretend_native
from tests.common.tolerances import assert_close

from .test_rewrite import fusing

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = {"input_ids": (torch.arange(10) % 7 + 3).reshape(2, 5)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
SOUND = {"input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32)}
IMAGE = {"input_tensor": torch.linspace(-1, 1, 32 * 64).reshape(1, 32, 8, 8), "temb": None}


def of_transformers(name: str, **settings: object) -> Callable[[], nn.Module]:
    kind = name.removesuffix("Encoder")
    return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{kind}Config")(**settings))


def whisper_encoder() -> nn.Module:
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 16, "num_mel_bins": 8}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return of_transformers("Whisper", d_model=32, **sizes, **heads, **tokens)().encoder


# A model, its inputs, and how many ops have which end in the fused graph: activation, whether a residual is added.
BARE, PLUS, MULTI = ("none", False), ("none", True), ("multi", False)
TRANSFORMER = {MULTI: 3, PLUS: 2, ("gelu", False): 1}  # q, k, v; the output and the second layer of the MLP; its first
GATED = {MULTI: 3, PLUS: 2, ("gated silu", False): 1}  # the same, with a gated MLP
WORDS = {"vocab_size": 20}
FEW_BLOCKS = {
    **{"in_channels": [32, 16], "out_channels": [16, 16], "kernel_sizes": [3, 3], "strides": [1, 1]},
    **{"num_block_repeats": [1, 2], "expand_ratios": [4, 4], "depthwise_padding": []},
}
CASES: dict[str, tuple[Callable[[], nn.Module], dict, dict[tuple[str, bool], int]]] = {
    "Bert": (of_transformers("Bert", **SMALL, **WORDS), TOKENS, TRANSFORMER | {BARE: 1}),  # the pooler
    "ModernBert": (
        of_transformers("ModernBert", **SMALL, **WORDS, pad_token_id=0, cls_token_id=1, sep_token_id=2),
        TOKENS,
        {BARE: 1, PLUS: 2, ("gated gelu", False): 1},  # q, k and v in one layer, as are the gate and what it multiplies
    ),
    "Phi3": (
        of_transformers("Phi3", **SMALL, **WORDS, pad_token_id=0),
        TOKENS,
        {BARE: 1, PLUS: 2, ("gated silu", False): 1},  # as of ModernBert
    ),
    "GPT2": (
        of_transformers("GPT2", n_embd=32, n_layer=1, n_head=2, n_positions=16, eos_token_id=1, **WORDS),
        TOKENS,
        {BARE: 1, PLUS: 2, ("gelu_tanh", False): 1},
    ),
    "Llama": (of_transformers("Llama", **SMALL, **WORDS), TOKENS, GATED),
    "Qwen3": (of_transformers("Qwen3", **SMALL, **WORDS, num_key_value_heads=1, head_dim=16), TOKENS, GATED),
    "Gemma": (
        of_transformers("Gemma", **SMALL, **WORDS, num_key_value_heads=1, head_dim=16),
        TOKENS,
        {MULTI: 3, PLUS: 2, ("gated gelu_tanh", False): 1},
    ),
    "T5": (
        of_transformers("T5Encoder", d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=1, **WORDS),
        TOKENS,
        {MULTI: 3, PLUS: 2, ("relu", False): 1},
    ),
    "Whisper": (whisper_encoder, SOUND, {MULTI: 3, PLUS: 2, ("gelu", False): 3}),  # two are convolutions
    "ViT": (of_transformers("ViT", **SMALL, image_size=16, patch_size=8), PIXELS, TRANSFORMER | {BARE: 2}),
    "ConvNext": (
        of_transformers("ConvNext", hidden_sizes=[16, 24], depths=[1, 1], num_stages=2),
        PIXELS,
        {BARE: 3, ("gelu", False): 2},  # dimensions are permuted between layer scale and residual
    ),
    "ResNet": (
        of_transformers("ResNet", embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic"),
        PIXELS,
        {BARE: 1, PLUS: 1, ("relu", False): 1},  # with their batch norms
    ),
    "MobileNetV2": (
        of_transformers("MobileNetV2", depth_multiplier=0.35, image_size=16),
        PIXELS,
        {BARE: 19, PLUS: 9},  # with their batch norms; relu6 is no activation of the ops
    ),
    "MobileNetV1": (
        of_transformers("MobileNetV1", depth_multiplier=0.25, image_size=16, hidden_act="relu"),
        PIXELS,
        {("relu", False): 12},  # the pointwise convolutions behind depthwise ones, with their batch norms
    ),
    "EfficientNet": (
        of_transformers("EfficientNet", width_coefficient=0.5, image_size=16, hidden_dim=640, **FEW_BLOCKS),
        PIXELS,
        {("silu", False): 1},  # the others have so few channels that they stay dense
    ),
    "Dinov2": (
        of_transformers("Dinov2", **SMALL, mlp_ratio=2, image_size=16, patch_size=8),
        PIXELS,
        TRANSFORMER | {BARE: 1},  # their layer scales are a part of the factors
    ),
    "a block of a UNet": (
        lambda: ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=None, groups=8),
        IMAGE,
        {BARE: 1, PLUS: 1},  # norm and activation come first
    ),
}

GATE_AND_VALUE_IN_ONE_LAYER = ("ModernBert", "Phi3")


NORMS = {"ResNet": 3, "MobileNetV1": 12, "MobileNetV2": 28, "EfficientNet": 1}  # that follow low-rank layers


def norms_of_ops(graph: torch.fx.Graph) -> int:
    """How many batch norms follow ops of shrank."""
    norms = [node for node in graph.nodes if node.target is F.batch_norm]
    return sum("shrank" in str(node.args[0].target) for node in norms)


def compressed(name: str) -> nn.Module:
    return shrank.auto_fact(with_statistics(seeded(CASES[name][0])), rank=4)


def output_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("name", CASES)
def test_a_models_ops_take_over_what_follows_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    torch._dynamo.reset()
    before, after, norms = [], [], []
    model, inputs, ends = compressed(name), *CASES[name][1:]

    def backend(module: torch.fx.GraphModule, given: list) -> torch.fx.GraphModule:
        norms.append(norms_of_ops(module.graph))
        fused = fusing(before, after)(module, given)
        norms.append(norms_of_ops(module.graph))
        return fused

    with shrank.backend("native"), torch.no_grad():
        wanted = output_of(model, inputs)
        found = output_of(torch.compile(model, backend=backend), inputs)
    assert_close(found, wanted)
    assert norms == [NORMS.get(name, 0), 0]
    assert len(before) == 1, "one graph, as without the pass"
    pairs = sum("gated" in activation for activation, _ in after[0]) * (name not in GATE_AND_VALUE_IN_ONE_LAYER)
    assert set(before[0]) == {BARE} and len(before[0]) == len(after[0]) + pairs
    assert Counter(after[0]) == ends
