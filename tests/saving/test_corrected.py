"""Corrected layers in files: bitwise the same after loading, in any process, and damage is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import shrank
from shrank import CorrectedLinear
from shrank.linalg import Storage
from shrank.saving.checkpoint import inspect_file
from tests.common.corrected import STORAGES, corrected
from tests.common.models import WIDTH, draw, hf_inputs, hf_model, hf_outputs, mlp
from tests.saving.test_processes import LOAD_ALL, run

each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


@each_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(storage: Storage, dtype: torch.dtype, tmp_path) -> None:
    small = corrected(mlp(2).to(dtype), storage)
    shrank.save(small, tmp_path / "m.safetensors")
    loaded, x = shrank.load(mlp(2).to(dtype), tmp_path / "m.safetensors"), draw(3, WIDTH, dtype=dtype)
    assert torch.equal(loaded(x), small(x))
    assert shrank.describe(loaded) == shrank.describe(small)
    plan, problems = inspect_file(tmp_path / "m.safetensors")
    assert plan == shrank.describe(small) and problems == []
    names = {name.partition(".")[2] for name in load_file(tmp_path / "m.safetensors")}
    parts = ("", "") if storage.factor_grid is None else (".values", ".scales")
    factors = {f"led_unit.{stage}.weight{part}" for stage in (0, 1) for part in parts}
    assert names == {"weight", "led_base.bias", "led_base.weight.values", "led_base.weight.scales"} | factors


@pytest.mark.parametrize("family", ["bert", "llama"])
@each_storage
def test_transformers(storage: Storage, family: str, tmp_path) -> None:
    small = corrected(hf_model(family), storage)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert {type(loaded.get_submodule(layer.fqn)) for layer in shrank.describe(small)} == {CorrectedLinear}
    assert torch.equal(hf_outputs(loaded), hf_outputs(small))
    loaded.save_pretrained(tmp_path)
    assert torch.equal(hf_outputs(type(small).from_pretrained(tmp_path).eval()), hf_outputs(small))


def test_in_a_new_process(tmp_path) -> None:
    folders = []
    for name, storage in STORAGES.items():
        small = corrected(hf_model("bert"), storage)
        small.save_pretrained(tmp_path / name)
        inputs = hf_inputs(small)
        with torch.no_grad():
            torch.save((inputs, small(**inputs)[0]), tmp_path / name / "expected.pt")
        folders.append(tmp_path / name)
    run(f"import shrank\n{LOAD_ALL}", *folders)


def test_without_its_parts_a_file_is_refused(tmp_path) -> None:
    path, damaged = tmp_path / "m.safetensors", tmp_path / "damaged.safetensors"
    small = corrected(mlp(2), STORAGES["int4"])
    shrank.save(small, path)
    state = load_file(path)
    metadata = {"shrank": json.dumps({"plan": shrank.describe(small).to_dict(), "aliases": {}})}
    for name, value in state.items():
        if name.endswith("bias") or name.count(".") == 1:
            continue
        save_file({k: v for k, v in state.items() if k != name}, damaged, metadata)
        with pytest.raises(ValueError, match=f"{name}: missing"):
            shrank.load(mlp(2), damaged)
        assert inspect_file(damaged)[1]
        save_file(state | {name: value[:-1].clone()}, damaged, metadata)
        model = mlp(2)
        with pytest.raises(ValueError, match=name):
            shrank.load(model, damaged)
        assert type(model[0]) is torch.nn.Linear


def test_a_dense_loader_refuses_it(tmp_path) -> None:
    shrank.save(corrected(mlp(2)), tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        mlp(2).load_state_dict(load_file(tmp_path / "m.safetensors"), strict=False)


def test_a_base_of_another_tool_is_not_saved_and_the_way_out_is_told(tmp_path) -> None:
    model = mlp(1)
    small = shrank.correct(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)), model, 2)
    with pytest.raises(ValueError, match=r"0: its base is a torch.nn.modules.linear.Linear .* shrank.export_lora"):
        shrank.save(small, tmp_path / "m.safetensors")


@each_storage
def test_as_an_adapter_for_its_own_base(storage: Storage, tmp_path) -> None:
    small = corrected(hf_model("llama"), storage)
    shrank.export_lora(small, tmp_path / "adapter")
    expected = hf_outputs(small)
    base = shrank.uncorrect(small)
    base.save_pretrained(tmp_path / "base")
    served = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert (hf_outputs(served.base_model.model) - expected).abs().max() < 2e-2 * expected.abs().max()
