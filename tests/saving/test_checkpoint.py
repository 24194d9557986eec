"""shrank.save and shrank.load: exact round trips, hostile files, interruptions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import shrank
from shrank import CED, LED
from tests.common.models import (
    WIDTH,
    Mixed,
    SharedLayer,
    TiedLM,
    assert_same_state,
    assert_untouched,
    draw,
    fingerprint,
    mlp,
    seeded,
    tokens,
)


def by_design() -> nn.Module:
    conv = CED(16, WIDTH, 6, (3, 3), groups=2, groups_out=True)
    return nn.Sequential(conv, nn.Flatten(2), LED(16, 40, 5, bias=False))


IMAGE = (2, 16, 6, 6)
# How to build the dense model, what its input is, and the options that factorise it (None: it is low-rank by design).
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(WIDTH, 48), nn.Linear(48, 16, bias=False)), draw(3, WIDTH), {}),
    "mixed": (Mixed, draw(*IMAGE), {}),
    "grouped-out": (Mixed, draw(*IMAGE), {"groups_out": True}),
    "high-groups": (
        lambda: nn.Sequential(nn.Conv1d(32, 32, 3, groups=8)),
        draw(2, 32, 9),
        {"rank": 4, "skip_high_groups": False, "allow_growth": True},
    ),
    "tied": (TiedLM, tokens(2, 5), {}),
    "shared": (SharedLayer, draw(3, WIDTH), {}),
    "bfloat16": (lambda: Mixed().bfloat16(), draw(*IMAGE, dtype=torch.bfloat16), {}),
    "float64": (lambda: Mixed().double(), draw(*IMAGE, dtype=torch.float64), {}),
    "channels-last": (lambda: Mixed().to(memory_format=torch.channels_last), draw(*IMAGE), {}),
    "by-design": (by_design, draw(*IMAGE), None),
    "nested": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (16, 4)), nn.Conv1d(16, 64, 3)),
        draw(2, 64),
        {"fact_led_unit": True},
    ),
    "root-linear": (lambda: nn.Linear(WIDTH, WIDTH), draw(2, WIDTH), {}),
    "root-conv": (lambda: nn.Conv2d(16, WIDTH, 3), draw(*IMAGE), {}),
    "root-by-design": (lambda: LED(WIDTH, WIDTH, 3), draw(2, WIDTH), None),
    "nothing": (mlp, draw(2, WIDTH), None),
}


def low_rank(build, options: dict | None) -> nn.Module:
    model = seeded(build)
    if options is None:
        return model
    model = shrank.auto_fact(model, **{"rank": 0.8, "allow_slower": True} | options | {"fact_led_unit": False})
    return shrank.auto_fact(model, 0.5, fact_led_unit=True) if "fact_led_unit" in options else model


def other_values(build) -> nn.Module:
    """The same architecture with another state, so that whatever is not loaded shows."""
    model = seeded(build)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    return model


@pytest.mark.parametrize("target", ["cpu", "meta"])
@pytest.mark.parametrize("build, x, options", MODELS.values(), ids=MODELS)
def test_round_trip(build, x, options, target, tmp_path):
    saved = low_rank(build, options)
    shrank.save(saved, tmp_path / "new" / "model.safetensors")
    with torch.device(target):
        model = other_values(build) if target == "cpu" else build().eval()
    loaded = shrank.load(model, tmp_path / "new" / "model.safetensors")
    one, other = fingerprint(loaded), fingerprint(saved)
    assert one["types"] == other["types"] and shrank.describe(loaded) == shrank.describe(saved)
    assert_same_state(one["state"], other["state"])
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("target", ["cpu", "meta"])
@pytest.mark.parametrize(
    "build, one, other", [(TiedLM, "head", "embedding"), (SharedLayer, "first.led_unit.0", "blocks.again.led_unit.0")]
)
def test_sharing_survives(build, one, other, target, tmp_path):
    shrank.save(low_rank(build, {}), tmp_path / "x.safetensors")
    with torch.device(target):
        model = shrank.load(build(), tmp_path / "x.safetensors")
    assert model.get_parameter(f"{one}.weight") is model.get_parameter(f"{other}.weight")


def test_flags_of_the_target_and_layout_survive(tmp_path):
    shrank.save(low_rank(Mixed, {}), tmp_path / "x.safetensors")
    model = Mixed().to(memory_format=torch.channels_last).train()
    model.stem.weight.requires_grad_(False)
    shrank.load(model, tmp_path / "x.safetensors")
    assert all(module.training for module in model.modules())
    assert not model.stem.down.requires_grad and not model.stem.up.requires_grad and model.stem.bias.requires_grad
    assert model.stem.down.is_contiguous(memory_format=torch.channels_last)


def test_a_low_rank_model_takes_the_checkpoint_of_its_own_structure_only(tmp_path):
    shrank.save(shrank.auto_fact(mlp(), 8), tmp_path / "8.safetensors")
    shrank.save(shrank.auto_fact(mlp(), 4), tmp_path / "4.safetensors")
    model = shrank.auto_fact(mlp(), 4)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"8\.safetensors.*\n.*low-rank"):
        shrank.load(model, tmp_path / "8.safetensors")
    assert_untouched(model, before)
    shrank.load(model, tmp_path / "4.safetensors")


def test_a_model_without_data_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="meta"):
        shrank.save(nn.Linear(WIDTH, WIDTH, device="meta"), tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def layer_set(**changes):
    return lambda tensors, content: content["plan"]["layers"][1].update(changes)


def shape_set(**changes):
    return lambda tensors, content: content["plan"]["layers"][1]["shape"].update(changes)


def replaced(name: str, change):
    return lambda tensors, content: tensors.update({name: change(tensors[name]).contiguous()})


# Changes to the tensors and the plan of a good file of `mlp`, and what the error must say.
HOSTILE = {
    "version": (lambda tensors, content: content["plan"].update(format=99), "format 99"),
    "no-plan": (lambda tensors, content: content.pop("plan"), "plan"),
    "layers-no-list": (lambda tensors, content: content["plan"].update(layers={"0": 3}), "must be a list"),
    "unknown-layer": (layer_set(fqn="nowhere"), "no such layer"),
    "container": (layer_set(fqn=""), "no such layer"),
    "fqn-no-string": (layer_set(fqn=["1"]), "fqn"),
    **{f"rank-{rank!r}": (layer_set(rank=rank), "rank") for rank in (0, -1, 10**9, 10**30, "8", True, 4.0, [4], {})},
    "rank-other": (layer_set(rank=7), "led_unit"),
    "rank-null": (layer_set(rank=None), "1.weight: missing"),
    "kind": (layer_set(kind="Conv2d"), "Linear here and a Conv2d"),
    "kind-no-string": (layer_set(kind=None), "kind"),
    "unknown-key": (layer_set(evil="yes"), "evil"),
    "shape": (shape_set(in_features=64), "32x64"),
    "shape-groups": (shape_set(down_groups=10**9), "1000000000"),
    "shape-zero": (shape_set(up_groups=0), "up_groups"),
    "shape-null": (layer_set(shape=None), "shape"),
    "duplicate": (lambda tensors, content: content["plan"]["layers"].append(content["plan"]["layers"][0]), "twice"),
    "missing-tensor": (lambda tensors, content: tensors.pop("1.led_unit.0.weight"), "led_unit.0.weight: missing"),
    "missing-bias": (lambda tensors, content: tensors.pop("1.led_unit.1.bias"), "led_unit.1.bias: missing"),
    "extra-tensor": (lambda tensors, content: tensors.update(extra=torch.ones(1)), "extra: unknown"),
    "wrong-shape": (replaced("1.led_unit.1.weight", lambda t: t.T), "led_unit.1.weight"),
    "wrong-rank": (replaced("1.led_unit.0.weight", lambda t: t[:3]), "led_unit.0.weight"),
    "wrong-dtype": (replaced("1.led_unit.0.weight", lambda t: t.to(torch.int32)), r"led_unit.0.weight.*(int|I)32"),
    "aliases-list": (lambda tensors, content: content.update(aliases=["a"]), "shared tensors"),
    "aliases-nested": (lambda tensors, content: content.update(aliases={"a": ["b"]}), "shared tensors"),
    "aliases-unknown": (lambda tensors, content: content.update(aliases={"a": "b"}), "shared tensors"),
}


@pytest.fixture
def good(tmp_path) -> Path:
    shrank.save(shrank.auto_fact(mlp(), 8), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def assert_refused(path: Path, cause: str, model: nn.Module | None = None) -> None:
    model = mlp() if model is None else model
    before = fingerprint(model)
    with pytest.raises(ValueError, match=cause) as caught:
        shrank.load(model, path)
    assert str(path) in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("change, cause", HOSTILE.values(), ids=HOSTILE)
def test_hostile_contents_are_refused(change, cause, good):
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        content = json.loads(file.metadata()["shrank"])
    change(tensors, content)
    save_file(tensors, good.with_name("bad.safetensors"), {"shrank": json.dumps(content)})
    assert_refused(good.with_name("bad.safetensors"), cause)


def with_header(header: str):
    return lambda good, bad: save_file(load_file(good), bad, {"shrank": header})


# What is written into the place of a good file.
FILES = {
    "empty": (lambda good, bad: bad.write_bytes(b""), "not a complete"),
    "truncated-header": (lambda good, bad: bad.write_bytes(good.read_bytes()[:40]), "not a complete"),
    "truncated-tensors": (lambda good, bad: bad.write_bytes(good.read_bytes()[:-40]), "not a complete"),
    "endless-header": (lambda good, bad: bad.write_bytes(b"\xff" * 8 + good.read_bytes()[8:]), "not a complete"),
    "garbage": (lambda good, bad: bad.write_bytes(bytes(range(256)) * 8), "not a complete"),
    "pickle": (lambda good, bad: torch.save(load_file(good), bad), "pickle"),
    "old-pickle": (lambda good, bad: torch.save(load_file(good), bad, _use_new_zipfile_serialization=False), "pickle"),
    "foreign": (lambda good, bad: save_file(load_file(good), bad), "no plan"),
    "no-json": (with_header("{"), "bad"),
    "json-list": (with_header("[]"), "object"),
    "json-deep": (with_header("[" * 10**5), "bad"),
}


@pytest.mark.parametrize("write, cause", FILES.values(), ids=FILES)
def test_damaged_and_foreign_files_are_refused(write, cause, good):
    bad = good.with_name("bad.safetensors")
    write(good, bad)
    assert_refused(bad, cause)


OTHERS = {
    "shallower": lambda: mlp(2),
    "deeper": lambda: mlp(4),
    "different": TiedLM,
    "narrower": lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))),
    "root": lambda: nn.Linear(WIDTH, WIDTH),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_architectures_are_refused(build, good):
    assert_refused(good, "does not fit", build())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
@pytest.mark.parametrize("exists", [True, False], ids=["over-old", "new"])
def test_an_interrupted_save_changes_nothing(error, exists, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    if exists:
        shrank.save(mlp(), path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def interrupted(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr("shrank.util.tensor_file.save_file", interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        shrank.save(shrank.auto_fact(mlp(), 8), path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_loaders_that_do_not_know_low_rank_layers_fail(tmp_path):
    shrank.save(shrank.auto_fact(mlp(), 4), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        mlp().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_files_without_seals_load(tmp_path):
    saved, path = shrank.auto_fact(mlp(), 4), tmp_path / "model.safetensors"
    shrank.save(saved, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: value for name, value in load_file(path).items() if "led_unit" in name}, path, metadata)
    assert torch.equal(shrank.load(mlp(), path)(draw(2, 32)), saved(draw(2, 32)))
