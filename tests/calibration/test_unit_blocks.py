"""Feed-forward blocks are found wherever they are, and believed only where the model does without some of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from shrank import calibrate
from shrank.calibration.batches import as_batches, bound
from shrank.calibration.unit_blocks import unit_blocks_in
from shrank.model.survey import Survey
from shrank.model.unit_blocks import UnitBlock
from tests.common.feed_forward import UNITS, Between, Block, Leaking, Stacked, data, stack
from tests.common.models import VOCAB, WIDTH, assert_untouched, draw, fingerprint, hf_inputs, hf_model, seeded, tokens
from tests.common.tolerances import assert_close
from tests.common.units import (
    CHANNELS,
    HEAD,
    Bottleneck,
    Gated,
    LeakingChannels,
    attention_model,
    image_model,
    images,
    inverted,
    normed,
    plain,
    texts,
    to_linear,
)


def found(model: nn.Module, inputs: object) -> list[UnitBlock]:
    before = fingerprint(model)
    blocks = unit_blocks_in(Survey(model), bound(as_batches([inputs]), model)[0])
    assert_untouched(model, before)
    return blocks


def is_feed_forward(block: UnitBlock) -> bool:
    return not block.rows and not {"pooler", "qkv_proj", "conv1"} & set(block.producers[0].split("."))


@pytest.mark.parametrize(
    ("make", "producers", "stacked"),
    [
        (Block, ("up",), False),
        (lambda: Block(gated=True), ("gate", "up"), False),
        (lambda: Block(bias=False), ("up",), False),
        (Stacked, ("both",), True),
    ],
    ids=["plain", "gated", "without bias", "stacked"],
)
def test_blocks_are_found(make, producers, stacked) -> None:
    blocks = found(stack(make, make), data()[0])
    assert blocks == [
        UnitBlock(f"{i}", tuple(f"{i}.{name}" for name in producers), f"{i}.down", UNITS, stacked) for i in (2, 3)
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Between(lambda h: F.layer_norm(h, h.shape[-1:])), "meet each other"),
        (lambda: Between(lambda h: h.softmax(-1)), "meet each other"),
        (lambda: Between(lambda h: h.flip(-1)), "meet each other"),
        (lambda: Between(lambda h: torch.relu(h.view(-1, UNITS))), "the model fails: RuntimeError"),
        (lambda: Between(lambda h: torch.relu(h) / h.shape[-1]), "computes something else"),
        (lambda: Stacked(in_turns=True), "meet each other"),
        (Leaking, "go elsewhere"),
    ],
    ids=["norm", "softmax", "flip", "view", "scale", "in turns", "leak"],
)
def test_what_only_looks_like_a_block_is_left_alone(make, reason) -> None:
    """And does not keep others from being narrowed."""
    good, bad = found(stack(Block, make), data()[0])
    assert not good.reason and reason in bad.reason


def test_what_learns_between_is_no_block() -> None:
    norm = nn.LayerNorm(UNITS)
    assert found(stack(lambda: Between(norm)), data()[0]) == []


def test_a_layer_is_in_one_block() -> None:
    chain = seeded(lambda: nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))))
    assert [block.layers for block in found(chain, draw(5, 12))] == [("0", "1"), ("2", "3")]


def small_phi3() -> nn.Module:
    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return Phi3ForCausalLM(Phi3Config(**config, **special, vocab_size=VOCAB, num_key_value_heads=1))


def small_modernbert() -> nn.Module:
    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    return ModernBertModel(ModernBertConfig(**config, **special, vocab_size=VOCAB))


def small_whisper() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=VOCAB, num_mel_bins=8, d_model=WIDTH, **sizes, **heads, **special)
    return WhisperForConditionalGeneration(config)


def gated_t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1}
    config = T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "vit"])
def test_families(name: str) -> None:
    model = hf_model(name)
    blocks = [block for block in found(model, hf_inputs(model)) if is_feed_forward(block)]
    assert len(blocks) == (4 if name == "t5" else 2) and not any(block.reason or block.stacked for block in blocks)
    assert all(len(block.producers) == (2 if name == "llama" else 1) for block in blocks)


@pytest.mark.parametrize(
    ("make", "inputs", "producers", "stacked"),
    [
        (gated_t5, {"input_ids": tokens(2, 8), "decoder_input_ids": tokens(2, 4)}, 2, False),
        (small_whisper, {"input_features": draw(2, 8, 32), "decoder_input_ids": tokens(2, 4)}, 1, False),
        (small_modernbert, {"input_ids": tokens(2, 8)}, 1, True),
        (small_phi3, {"input_ids": tokens(2, 8)}, 1, True),
    ],
    ids=["gated t5", "whisper", "modernbert", "phi3"],
)
def test_further_families(make, inputs, producers, stacked) -> None:
    blocks = [block for block in found(seeded(make), inputs) if is_feed_forward(block) and not block.reason]
    assert len(blocks) == 2
    assert all((len(block.producers), block.stacked) == (producers, stacked) for block in blocks)


def test_a_calibration_keeps_them(tmp_path) -> None:
    """With the inputs of their consumers, in its cache too."""
    model = stack(Block, Leaking)
    assert calibrate(model, data()).unit_blocks is None
    for _ in range(2):
        seen = calibrate(model, data(), narrow=True, cache=tmp_path)
        assert [bool(block.reason) for block in seen.unit_blocks] == [False, True]
        assert seen.of_inputs("2.down") and not seen.of_inputs("3.down")


def test_half_precision() -> None:
    """Where the two ways of leaving units out differ by rounding."""
    model = stack(Block, Block).bfloat16()
    assert [block.reason for block in found(model, data()[0].bfloat16())] == ["", ""]


def test_a_model_without_float_outputs_shows_nothing() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack(Block)

        def forward(self, x):
            return self.body(x).argmax(-1)

    assert "nothing to compare" in found(Classes().eval(), data()[0])[0].reason


def test_gpt2_of_a_given_width() -> None:
    sizes = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_inner": 48}
    model = seeded(lambda: GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCAB, n_positions=32)))
    (block,) = filter(is_feed_forward, found(model, {"input_ids": tokens(2, 8)}))
    assert block.units == 48 and block.consumer == "transformer.h.0.mlp.c_proj"


@pytest.mark.parametrize(
    ("make", "columns", "stacked", "carriers"),
    [
        (plain, 9, False, ()),
        (normed, 9, False, (0,)),
        (inverted, 1, False, (0, 2, 3, 4)),
        (Gated, 9, True, ()),
        (lambda: Bottleneck(nn.MaxPool2d(3, 1, 1)), 9, False, ()),
        (lambda: Bottleneck(nn.PReLU()), 9, False, ()),
    ],
    ids=["plain", "batch norm", "depthwise", "gated", "pooling", "one slope"],
)
def test_channels_are_found(make, columns: int, stacked: bool, carriers: tuple[int, ...]) -> None:
    """With what has numbers for each of them in between."""
    (block,) = found(image_model(make), images()[0])
    names = tuple(f"2.between.{i}" for i in carriers)
    assert block == UnitBlock("2", ("2.first",), "2.second", CHANNELS, stacked, columns=columns, carriers=names)


@pytest.mark.parametrize("by_position", [False, True])
def test_channels_behind_flattened_positions(by_position: bool) -> None:
    (block,) = found(to_linear(by_position), images()[0])
    expected = {"columns": 4, "strided": by_position, "carriers": ("norm",)}
    assert block == UnitBlock("head", ("stem",), "head", CHANNELS, **expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bottleneck(nn.GroupNorm(4, CHANNELS, affine=False)),
        lambda: Bottleneck(nn.ChannelShuffle(4)),
        LeakingChannels,
    ],
    ids=["group norm", "shuffle", "leak"],
)
def test_channels_that_meet_are_left_alone(make) -> None:
    """And do not keep others from being narrowed, which have the same names."""
    good, bad, also_good = found(image_model(plain, make, plain), images()[0])
    assert not good.reason and not also_good.reason and "meet each other, or go elsewhere" in bad.reason


@pytest.mark.parametrize(
    "between",
    [nn.GroupNorm(4, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)],
    ids=["norm", "groups"],
)
def test_what_learns_between_channels_is_no_block(between: nn.Module) -> None:
    assert found(image_model(lambda: Bottleneck(between)), images()[0]) == []


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("llama", (2 * HEAD, HEAD, HEAD), 2 * HEAD),
        ("qwen3", (2 * HEAD, HEAD, HEAD), 2 * HEAD),
        ("bert", (8, 8, 8), 8),
    ],
)
def test_heads_are_found(name: str, rows: tuple[int, ...], columns: int) -> None:
    """Keys and values with all queries that look at them; a norm that all heads share stays as it is."""
    blocks = [block for block in found(attention_model(name), texts()[0]) if block.rows]
    assert len(blocks) == 2
    for block in blocks:
        assert (block.units, block.rows, block.columns, block.reason) == (4, rows, columns, "")
        assert len(block.producers) == 3 and not block.carriers and not block.strided


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("head", [0, 3])
def test_heads_beside_one_that_says_nothing(name: str, head: int) -> None:
    """The first one, or the last."""
    model = attention_model(name)
    layer = (
        model.bert.encoder.layer[0].attention.self.value if name == "bert" else model.model.layers[0].self_attn.v_proj
    )
    with torch.no_grad():
        for value in layer.parameters():
            value.unflatten(0, (4, -1))[head] = 0
    blocks = [block for block in found(model, texts()[0]) if block.rows]
    assert [(block.units, block.reason) for block in blocks] == [(4, ""), (4, "")]


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (lambda: hf_model("gpt2"), {"input_ids": tokens(2, 8)}, "meet each other"),
        (small_whisper, {"input_features": draw(2, 8, 32), "decoder_input_ids": tokens(2, 4)}, "the model fails"),
        (lambda: hf_model("t5"), hf_inputs(hf_model("t5")), "the model fails"),
    ],
    ids=["fused", "fixed number", "positions"],
)
def test_heads_that_cannot_go(make, inputs, reason: str) -> None:
    """Of one layer for queries, keys and values; of a model that knows how many there are."""
    blocks = [block for block in found(seeded(make), inputs) if block.rows]
    assert blocks and all(reason in block.reason for block in blocks)


def test_the_channels_of_a_convolution_are_observed() -> None:
    """Where it is behind some, and only for narrowing; with their means, of all positions."""
    model, data = image_model(normed), images()
    seen = calibrate(model, data, narrow=True)
    held: list[torch.Tensor] = []
    model[2].second.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    for x in data:
        model(x)
    rows = torch.cat(held).movedim(1, -1).flatten(0, -2).double()
    moments = seen["2.second"]
    assert_close(moments.channels[0], (rows.T @ rows / len(rows)).float())
    assert_close(moments.channel_mean[0], rows.mean(0).float())
    assert seen["2.first"].channels is None and calibrate(model, data)["2.second"].channels is None
