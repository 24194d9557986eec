"""Narrowed models in files: of any widths with their plan, of one width as ordinary models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import shrank
from shrank import Grid, NarrowedBlock, RankPlan, Storage
from shrank.planning.plan import RankPlan as Plan
from tests.common.feed_forward import UNITS, Block, Stacked, data, stack
from tests.common.models import (
    assert_same_state,
    assert_untouched,
    fingerprint,
    hf_inputs,
    hf_model,
    seeded,
    with_statistics,
)
from tests.common.tolerances import assert_close
from tests.common.units import ATTENTION, attention_model, image_model, images, inverted, normed, texts, to_linear


def narrowed(model: nn.Module, inputs: list, widths: list[int], **options: object) -> nn.Module:
    """The model with feed-forward blocks of these widths; other layers as a budget has them."""
    calibration = shrank.calibrate(model, inputs, narrow=True)
    plan: Plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True, **options)
    for block in plan.narrowed:
        if block.width is not None:
            plan = plan.with_width(block.consumer, None)
    for block, width in zip([block for block in plan.narrowed if is_feed_forward(block)], widths, strict=False):
        plan = plan.with_width(block.consumer, width)
    return shrank.apply(model, plan, calibration)


def is_feed_forward(block: NarrowedBlock) -> bool:
    return block.able and not block.rows and "pooler" not in block.producers[0]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert_same_state(fingerprint(one)["state"], fingerprint(other)["state"])


@pytest.mark.parametrize("make", [lambda: Block(gated=True), Stacked])
@pytest.mark.parametrize("on_meta", [False, True])
def test_files_of_shrank(make, on_meta: bool, tmp_path: Path) -> None:
    model = narrowed(stack(make, make), data(), [30, 12])
    shrank.save(model, tmp_path / "model.safetensors")
    with torch.device("meta" if on_meta else "cpu"):
        other = stack(make, make) if not on_meta else nn.Sequential(*stack(make, make).to("meta"))
    loaded = shrank.load(other, tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert shrank.describe(loaded) == shrank.describe(model) and len(shrank.describe(model).narrower) == 2
    assert torch.equal(loaded.eval()(data()[0]), model(data()[0]))
    assert_same(shrank.load(loaded, tmp_path / "model.safetensors"), model)  # again


def test_low_rank_layers_in_narrowed_blocks(tmp_path: Path) -> None:
    model = shrank.auto_fact(narrowed(stack(Block, Block), data(), [30, 12]), {"*.up": 6, "3.down": 5})
    shrank.save(model, tmp_path / "model.safetensors")
    loaded = shrank.load(stack(Block, Block), tmp_path / "model.safetensors")
    assert_same(loaded, model)


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_narrowed_layers_of_few_bits(keep: float, tmp_path: Path) -> None:
    """Corrected ones too, which the larger budget buys."""
    model = stack(Block, Block)
    with torch.no_grad():
        for block in (model[2], model[3]):
            block.up.weight[: UNITS // 2] *= 1e-3
    calibration = shrank.calibrate(model, data(), narrow=True, inputs=True)
    budget = shrank.Budget(keep_bytes=keep, group_sizes=(8,))
    options = {"calibration": calibration, "narrow": True, "min_features": 8, "round_to": 8}
    small = shrank.apply(model, shrank.make_plan(model, budget, **options), calibration)
    plan = shrank.describe(small)
    rounded = [x.storage for x in plan if x.narrowed and x.storage.grid]
    assert len(rounded) == 4 and any(storage.corrected for storage in rounded) == (keep == 0.3)
    shrank.save(small, tmp_path / "model.safetensors")
    loaded = shrank.load(stack(Block, Block), tmp_path / "model.safetensors")
    assert shrank.describe(loaded) == plan
    assert torch.equal(loaded.eval()(data()[0]), small.eval()(data()[0]))


def test_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shrank.save(narrowed(stack(Block, Block), data(), [30, 12]), file)
    for other in (stack(Block), stack(lambda: Block(gated=True), Block)):
        before = fingerprint(other)
        with pytest.raises(ValueError, match="does not fit the model"):
            shrank.load(other, file)
        assert_untouched(other, before)
    model, before = stack(Block, Block), None
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["shrank"])
    metadata["plan"]["narrowed"][0]["width"] = 20
    for layer in metadata["plan"]["layers"]:
        if layer["fqn"].startswith("2."):
            key = "in_features" if layer["fqn"] == "2.down" else "out_features"
            layer["shape"][key] = 20
    save_file(load_file(file), file, {"shrank": json.dumps(metadata)})
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"2.up.weight: \(30, 24\) in the file, \(20, 24\) in the model"):
        shrank.load(model, file)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_transformers_with_widths_of_their_own(name: str, tmp_path: Path) -> None:
    model = narrowed(hf_model(name), [hf_inputs(hf_model(name))], [40, 24, 32, 16], include=["*attn*", "*.[0-9].*"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert RankPlan.from_dict(config["quantization_config"]["plan"]).narrower
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert [b.width for b in shrank.describe(loaded).narrowed] == [b.width for b in shrank.describe(model).narrowed]
    loaded.save_pretrained(tmp_path / "again")
    assert_same(type(model).from_pretrained(tmp_path / "again"), model)


def test_a_base_model_and_its_model_with_a_head(tmp_path: Path) -> None:
    """Whose layers have other names."""
    model = narrowed(hf_model("llama"), [hf_inputs(hf_model("llama"))], [40, 24])
    model.save_pretrained(tmp_path)
    base = type(model.model).from_pretrained(tmp_path)
    assert_same(base, model.model)


_PLAINLY = """
import sys, torch, transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
assert not any(name.startswith("shrank") for name in sys.modules)
torch.save(model.state_dict(), sys.argv[3])
"""


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "vit"])
def test_one_width_is_an_ordinary_model(name: str, tmp_path: Path) -> None:
    model = narrowed(hf_model(name), [hf_inputs(hf_model(name))], [40] * 4, include="nothing", min_features=8)
    assert not model.shrank_plan.narrower  # nothing may change
    model = hf_model(name)
    calibration = shrank.calibrate(model, [hf_inputs(model)], narrow=True)
    plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True)
    for layer in plan.low_rank:
        plan = plan.with_rank(layer.fqn, None)
    for block in plan.narrowed:
        if block.able:
            plan = plan.with_width(block.consumer, 40 if is_feed_forward(block) else None)
    shrank.apply(model, plan, calibration)
    width = model.config.to_dict()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config and 40 in config.values() and 40 not in width.values()
    assert_same(type(model).from_pretrained(tmp_path / "model"), model)
    if name == "gpt2":  # one process is enough, and slow
        state = tmp_path / "state.pt"
        call = [sys.executable, "-c", _PLAINLY, str(tmp_path / "model"), type(model).__name__, str(state)]
        subprocess.run(call, check=True, cwd=tmp_path)
        loaded = torch.load(state)
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("widths", [(40, 40), (40, 24)], ids=["one", "two"])
def test_ranks_and_bits_beside_widths(widths: tuple[int, int], tmp_path: Path) -> None:
    """Of one width only they are left in the plan, so that servers, which know no widths of blocks, build the model of
    the config."""
    model = hf_model("llama")
    calibration = shrank.calibrate(model, [hf_inputs(model)], narrow=True, inputs=True)
    plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True)
    for number, width in enumerate(widths):
        plan = plan.with_width(f"model.layers.{number}.mlp", width)
    plan = plan.with_rank("model.layers.0.self_attn.o_proj", 8).with_rank("model.layers.0.mlp.up_proj", 8)
    in_bits = {"model.layers.0.mlp.down_proj": Grid(4, 8), "model.layers.1.mlp.gate_proj": Grid(8)}
    layers = [replace(x, storage=Storage(in_bits[x.fqn])) if x.fqn in in_bits else x for x in plan]
    shrank.apply(model, replace(plan, layers=tuple(layers)), calibration)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    saved = RankPlan.from_dict(config["quantization_config"]["plan"])
    assert (config["intermediate_size"] == 40 and not saved.narrowed) == (len(set(widths)) == 1)
    assert {x.fqn: x.storage.grid for x in saved if x.storage.grid} == in_bits
    loaded = type(model).from_pretrained(tmp_path)
    found, made = ({x.fqn: (x.rank, x.storage) for x in shrank.describe(m).changed} for m in (loaded, model))
    assert found == made
    inputs = hf_inputs(model)
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def narrower(model: nn.Module, inputs: list, *widths: int, heads: bool = False) -> nn.Module:
    """The model with these widths, in turns, of its blocks of channels, or of heads; all else as it is."""
    calibration = shrank.calibrate(model, inputs, narrow=True)
    plan = shrank.make_plan(model, 0.9, calibration=calibration, narrow=True, min_features=4)
    for layer in plan.low_rank:
        plan = plan.with_rank(layer.fqn, None)
    wanted = [block for block in plan.narrowed if block.able and (block.rows or not heads)]
    for block in plan.narrower:
        plan = plan.with_width(block.consumer, None)
    for i, block in enumerate(wanted):
        plan = plan.with_width(block.consumer, widths[i % len(widths)])
    return shrank.apply(model, plan, calibration)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: image_model(normed, inverted), to_linear, lambda: to_linear(by_position=True)],
    ids=["convolutions", "flattened", "by position"],
)
def test_channels_in_files(make, on_meta: bool, tmp_path: Path) -> None:
    """With the statistics of those that are left."""
    model = narrower(make(), images(), 13, 9)
    shrank.save(model, tmp_path / "model.safetensors")
    other = make().to("meta") if on_meta else make()
    loaded = shrank.load(other, tmp_path / "model.safetensors").eval()
    assert_same(loaded, model)
    assert torch.equal(loaded(images()[0]), model(images()[0]))
    assert shrank.describe(loaded) == shrank.describe(model) and shrank.describe(model).narrower
    assert_same(shrank.load(loaded, tmp_path / "model.safetensors"), model)  # again


def test_channels_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shrank.save(narrower(image_model(normed, inverted), images(), 13, 9), file)
    for other in (image_model(inverted, normed), image_model(normed, normed)):
        before = fingerprint(other)
        with pytest.raises(ValueError, match="does not fit the model"):
            shrank.load(other, file)
        assert_untouched(other, before)


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_in_files_of_transformers(name: str, tmp_path: Path) -> None:
    """As many in each block as it has; the model generates with them."""
    model = narrower(attention_model(name), texts(), 3, 1, heads=True)
    assert [block.width for block in model.shrank_plan.narrower] == [3, 1]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(**texts()[0])[0], model(**texts()[0])[0])
    if name != "bert":
        options = {"do_sample": False, "max_new_tokens": 4}
        cached, again = (loaded.generate(**texts()[0], **options, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, again)


def small_resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
    return with_statistics(seeded(lambda: ResNetForImageClassification(ResNetConfig(**sizes))))


def test_channels_in_files_of_transformers(tmp_path: Path) -> None:
    """Into the model with a head, and into the one without, where layers have other names."""
    model = narrower(small_resnet(), images(), 3)
    assert all(block.carriers for block in model.shrank_plan.narrower) and model.shrank_plan.narrower
    model.save_pretrained(tmp_path)
    for whole, loaded in (
        (model, type(model).from_pretrained(tmp_path)),
        (model.resnet, type(model.resnet).from_pretrained(tmp_path)),
    ):
        assert_same(loaded, whole)
        with torch.no_grad():
            # Not to the last bit, as no convolution of transformers: weights lie in memory as they do in the file.
            assert_close(loaded(images()[0])[0], whole(images()[0])[0])
