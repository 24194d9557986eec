"""Weights of few bits in files: exact round trips, their size, and whatever is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shrank
from shrank.layers.quantized import packed_state, quantized_of
from tests.common.models import assert_untouched, draw, fingerprint, hf_inputs, hf_model, seeded
from tests.common.tolerances import assert_close

K = 32
# bits, group size, activations.
FORMS = {
    "int8": (8, None, None),
    "int8-groups": (8, 8, None),
    "int4": (4, None, None),
    "int4-groups": (4, 8, None),
    "int8-dynamic": (8, None, "int8"),
}
WEIGHTS = ("0.led_unit.0.weight", "0.led_unit.1.weight", "1.weight")
each_form = pytest.mark.parametrize("form", FORMS)


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, 48), nn.Linear(48, K, bias=False), nn.Linear(K, 3))


def model_of(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A low-rank layer and a dense one in few bits, and one that is neither."""
    bits, group_size, activations = FORMS[form]
    model = shrank.auto_fact(seeded(build).to(dtype), {"0": 16, "*": None}, pivot=False, min_features=4)
    return shrank.quantize_factors(model, bits, group_size, activations=activations, dense=True, exclude="2")


def other(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.no_grad():
        model = seeded(build).to(dtype)
        for tensor in model.state_dict().values():
            tensor.add_(1)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
def test_round_trip(form: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    saved, x = model_of(form, dtype), draw(3, K).to(dtype)
    shrank.save(saved, tmp_path / "x.safetensors")
    with torch.device(device):
        loaded = shrank.load(other(dtype) if device == "cpu" else build().eval(), tmp_path / "x.safetensors")
    assert torch.equal(loaded(x), saved(x))
    assert shrank.describe(loaded) == shrank.describe(saved)
    assert fingerprint(loaded)["types"] == fingerprint(saved)["types"]
    for name in WEIGHTS:
        one, two = (quantized_of(m.get_parameter(name)) for m in (loaded, saved))
        assert torch.equal(one.values, two.values) and torch.equal(one.scales, two.scales) and one.grid == two.grid


@each_form
def test_the_file_has_the_bytes_of_the_plan(form: str, tmp_path: Path) -> None:
    model = model_of(form)
    shrank.save(model, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    weights = sum(t.nbytes for name, t in tensors.items() if name.endswith((".values", ".scales")))
    assert weights == sum(layer.bytes() for layer in shrank.describe(model))
    assert {name for name, t in tensors.items() if t.numel() == 6} == {"0.weight", "1.weight"}, "seals"


def test_outputs_are_the_same_in_a_new_process(tmp_path: Path) -> None:
    x = draw(3, K)
    for form in FORMS:
        model = model_of(form)
        shrank.save(model, tmp_path / f"{form}.safetensors")
        torch.save(model(x), tmp_path / f"{form}.pt")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, shrank; from torch import nn; from pathlib import Path\n"
        "folder = Path(sys.argv[1]); x = torch.load(folder / 'x.pt')\n"
        "for path in folder.glob('*.safetensors'):\n"
        f"    model = nn.Sequential(nn.Linear({K}, 48), nn.Linear(48, {K}, bias=False), nn.Linear({K}, 3)).eval()\n"
        "    assert torch.equal(shrank.load(model, path)(x), torch.load(path.with_suffix('.pt'))), path\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, timeout=300)


def test_a_model_of_few_bits_takes_no_file(tmp_path: Path) -> None:
    model = model_of("int8")
    shrank.save(model, tmp_path / "x.safetensors")
    before = model(draw(2, K))
    with pytest.raises(ValueError, match="already low-rank"):
        shrank.load(model, tmp_path / "x.safetensors")
    assert torch.equal(model(draw(2, K)), before)


def test_shared_layers_are_stored_once(tmp_path: Path) -> None:
    first = model_of("int4-groups")[0]
    saved = nn.Sequential(first, nn.Linear(48, K), first)
    shrank.save(saved, tmp_path / "x.safetensors")
    assert not any(name.startswith("2.led_unit") for name in load_file(tmp_path / "x.safetensors"))
    shared = nn.Linear(K, 48)
    loaded = shrank.load(nn.Sequential(shared, nn.Linear(48, K), shared), tmp_path / "x.safetensors")
    assert loaded[0] is loaded[2] and torch.equal(loaded(draw(2, K)), saved(draw(2, K)))


def test_loaders_that_do_not_know_shrank_fail(tmp_path: Path) -> None:
    shrank.save(model_of("int8"), tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        seeded(build).load_state_dict(load_file(tmp_path / "x.safetensors"), strict=False)


def test_a_file_is_inspected(tmp_path: Path) -> None:
    model = model_of("int4-groups")
    shrank.save(model, tmp_path / "x.safetensors")
    from shrank.saving.checkpoint import inspect_file

    plan, problems = inspect_file(tmp_path / "x.safetensors")
    assert plan == shrank.describe(model) and not problems


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    for form in FORMS:
        shrank.save(model_of(form), folder / f"{form}.safetensors")
    return {form: folder / f"{form}.safetensors" for form in FORMS}


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict, str], None]:
    def apply(tensors: dict, name: str) -> None:
        tensors[name + part] = change(tensors[name + part]).contiguous()

    return apply


# What is done to the arrays of a weight.
DAMAGE = {
    "no-values": (lambda t, name: t.pop(f"{name}.values"), r"weight\.values: missing"),
    "no-scales": (lambda t, name: t.pop(f"{name}.scales"), r"weight\.scales: missing"),
    "nan": (changed(".scales", lambda s: s * torch.nan), "scales hold NaN or infinity"),
    "one-infinity": (changed(".scales", lambda s: s.index_fill(0, torch.tensor([1]), torch.inf)), "NaN or infinity"),
    "fewer-rows": (changed(".values", lambda v: v[:-1]), r"weight\.values: \("),
    "fewer-columns": (changed(".values", lambda v: v[:, :-1]), r"weight\.values: \("),
    "more-columns": (changed(".values", lambda v: torch.cat((v, v), 1)), r"weight\.values: \("),
    "flat": (changed(".values", Tensor.flatten), r"weight\.values: \("),
    "no-groups": (changed(".scales", lambda s: s[:, :0]), r"weight\.scales: \("),
    "more-groups": (changed(".scales", lambda s: torch.cat((s, s), 1)), r"weight\.scales: \("),
    "fewer-scales": (changed(".scales", lambda s: s[1:]), r"weight\.scales: \("),
    "flat-scales": (changed(".scales", Tensor.flatten), r"weight\.scales: \("),
    "float-values": (changed(".values", Tensor.float), "float32"),
    "wide-values": (changed(".values", lambda v: v.to(torch.int32)), "values are torch.int32, wanted"),
    "other-sign": (
        changed(".values", lambda v: v.view(torch.uint8 if v.dtype == torch.int8 else torch.int8)),
        r"values are torch\.u?int8, wanted",
    ),
    "whole-scales": (changed(".scales", lambda s: s.to(torch.int16)), "int16|floating"),
}


def refused(path: Path, tensors: dict, content: dict, cause: str) -> None:
    save_file(tensors, path, {"shrank": json.dumps(content)})
    model = seeded(build)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=cause) as caught:
        shrank.load(model, path)
    assert str(path) in str(caught.value)
    assert_untouched(model, before)


def contents(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["shrank"])


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", [f for f in FORMS if f != "int8-dynamic"])
def test_damaged_arrays_are_refused(form: str, damage: str, weight: str, good: dict[str, Path], tmp_path: Path) -> None:
    tensors, content = contents(good[form])
    damaged, cause = DAMAGE[damage]
    damaged(tensors, weight)
    refused(tmp_path / "bad.safetensors", tensors, content, cause)


def grid_set(**changes: object) -> Callable[[dict], None]:
    return lambda content: content["plan"]["layers"][1]["storage"]["grid"].update(changes)


def storage_set(**changes: object) -> Callable[[dict], None]:
    return lambda content: content["plan"]["layers"][1]["storage"].update(changes)


def layer_set(**changes: object) -> Callable[[dict], None]:
    return lambda content: content["plan"]["layers"][1].update(changes)


# What is done to the plan of a dense layer in few bits, and to what else the file says.
PLANS = {
    **{f"bits-{bits!r}": (grid_set(bits=bits), "bits of grid must be 3, 4 or 8") for bits in (2, 0, -8, "8", None, 16)},
    **{f"group-{n!r}": (grid_set(group_size=n), "group_size of grid must be") for n in (0, -1, "8", 2.5, True)},
    "group-indivisible": (grid_set(group_size=7), "groups of 7 do not divide its 48 inputs"),
    "group-endless": (grid_set(group_size=10**9), "groups of 1000000000 do not divide"),
    "other-groups": (grid_set(group_size=16), r"weight\.scales: \(32, \d\) in the file, \(32, 3\) in the model"),
    "grid-list": (storage_set(grid=[8, None]), "grid must have exactly the keys"),
    "grid-key": (grid_set(zero_point=1), "exactly the keys bits and group_size"),
    "no-grid": (storage_set(grid=None, activations=None), r"1\.weight: missing"),
    "storage-list": (layer_set(storage=[8]), "storage must have the keys"),
    "storage-key": (storage_set(evil=1), "storage must have the keys"),
    "storage-null": (layer_set(storage=None), r"1\.weight: missing"),
    "corrected": (storage_set(corrected=True), "a correction needs a rank"),
    "corrected-text": (storage_set(corrected="yes"), "corrected must be true or false"),
    "factor-grid": (storage_set(factor_grid={"bits": 8, "group_size": None}), "factor_grid without a correction"),
    "activations": (storage_set(activations="fp8"), "activations must be 'int8'"),
    "activations-true": (storage_set(activations=True), "activations must be 'int8'"),
    "activations-alone": (storage_set(grid=None, activations="int8"), "activations must be 'int8', beside a grid"),
    "no-shape": (layer_set(shape=None), "has a grid but no shape"),
    "a-rank": (layer_set(rank=4), r"1\.led_unit\.0\.weight\.values: missing|groups of 8 do not divide"),
    "kind": (layer_set(kind="Conv1d"), "it is a Linear here and a Conv1d in the plan"),
    "unknown-layer": (layer_set(fqn="7"), "no such layer"),
    "dtypes-list": (lambda content: content.update(dtypes=["a"]), "dtypes of weights must be"),
    "dtypes-unknown": (lambda content: content.update(dtypes={"7.weight": "float32"}), "7.weight: a dtype of what"),
    "dtypes-of-none": (lambda content: content.update(dtypes={"1.weight": "device"}), "weights are float32, .* got"),
}


@pytest.mark.parametrize("change", PLANS)
@pytest.mark.parametrize("form", ["int8", "int4-groups"])
def test_damaged_plans_are_refused(form: str, change: str, good: dict[str, Path], tmp_path: Path) -> None:
    tensors, content = contents(good[form])
    damage, cause = PLANS[change]
    damage(content)
    refused(tmp_path / "bad.safetensors", tensors, content, cause)


def test_bits_that_are_others_in_the_file(good: dict[str, Path], tmp_path: Path) -> None:
    tensors, content = contents(good["int8"])
    grid_set(bits=4)(content)
    refused(tmp_path / "bad.safetensors", tensors, content, r"1\.weight\.values: \(32, 48\) in the file, \(32, 24\)")


FAMILIES = ("llama", "gpt2")


@pytest.mark.parametrize("form", ["int8", "int4-groups"])
@pytest.mark.parametrize("name", FAMILIES)
def test_folders_of_transformers(name: str, form: str, tmp_path: Path) -> None:
    bits, group_size, _ = FORMS[form]
    model = shrank.auto_fact(hf_model(name), 8, bits=bits, group_size=group_size, min_features=8)
    inputs = hf_inputs(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert shrank.describe(loaded) == shrank.describe(model) and shrank.describe(model).changed
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(**inputs).logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in load_file(tmp_path / "model.safetensors").items())


def test_layers_that_are_stored_in_two_ways_are_named(tmp_path: Path) -> None:
    model = shrank.auto_fact(hf_model("llama"), 8, bits=8, min_features=8, include="*q_proj")
    name, layer = next((name, m) for name, m in model.named_modules() if isinstance(m, shrank.LED))
    layer.stages[0].weight = nn.Parameter(layer.down.detach())
    with pytest.raises(ValueError, match=rf"{name}: its stages are stored in two ways"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.glob("model/*"))


FOLDER_DAMAGE = {
    "no-values": (lambda t, name: t.pop(f"{name}.values"), "lacks weights that its plan asks for"),
    "no-scales": (lambda t, name: t.pop(f"{name}.scales"), "lacks weights that its plan asks for"),
    "nan": (DAMAGE["nan"][0], "scales hold NaN or infinity"),
    "fewer-columns": (DAMAGE["fewer-columns"][0], "size|shape|fit"),
    "more-groups": (DAMAGE["more-groups"][0], "size|shape|fit"),
    "fewer-rows": (DAMAGE["fewer-rows"][0], "size|shape|fit"),
    "float-values": (DAMAGE["float-values"][0], "values are|int8"),
    "wide-values": (DAMAGE["wide-values"][0], "values are|int8"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_damaged_folders_are_refused(damage: str, kind: str, tmp_path: Path) -> None:
    rule = {"*": None} if kind == "dense" else 8
    model = shrank.auto_fact(hf_model("llama"), rule, bits=8, min_features=8, include="*q_proj")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".values")).removesuffix(".values")
    damaged, cause = FOLDER_DAMAGE[damage]
    damaged(tensors, name)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=cause):
        type(model).from_pretrained(tmp_path)


def test_cards_count_the_bytes_that_are_stored(tmp_path: Path) -> None:
    from shrank.saving.transformers_folder import save_model

    hf_model("llama").save_pretrained(tmp_path / "dense")
    for rule, title in ((8, "# Low-rank copy of dense"), ({"*": None}, "# Copy in few bits of dense")):
        model = shrank.auto_fact(hf_model("llama"), rule, bits=4, min_features=8)
        save_model(model, str(tmp_path / "dense"), tmp_path / "small")
        card = (tmp_path / "small" / "README.md").read_text()
        assert title in card and "Weights have few bits: int4 in" in card
        tensors = load_file(tmp_path / "small" / "model.safetensors")
        stored = sum(t.nbytes for name, t in tensors.items() if t.dtype != torch.uint8 or name.endswith(".values"))
        told = next(line for line in card.splitlines() if line.startswith("| bytes")).split("|")[3].split()[0]
        assert 0 <= int(told.replace(",", "")) - stored < 4096, "tables of positions are in no file"


@pytest.mark.filterwarnings("ignore")
def test_folders_of_diffusers_and_safetensors(tmp_path: Path) -> None:
    from diffusers import UNet2DModel
    from safetensors.torch import load_model, save_model

    def unet() -> nn.Module:
        kinds = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        return UNet2DModel(sample_size=8, block_out_channels=(32,), norm_num_groups=8, layers_per_block=1, **kinds)

    model = shrank.auto_fact(seeded(unet), {"*to_q": 8, "*": None}, bits=8, include="*.to_*")
    assert len(shrank.describe(model).changed) > len(shrank.describe(model).low_rank) > 0
    x, time = draw(1, 3, 8, 8), torch.tensor([3])

    def same(one: nn.Module, other: nn.Module) -> None:
        states = packed_state(one.state_dict()), packed_state(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
        # Not bit for bit: where a tensor lies in memory decides which vectorised path a kernel takes.
        assert_close(one(x, time).sample, other(x, time).sample)

    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path).eval()
    same(loaded, model)
    save_model(model, str(tmp_path / "x.safetensors"))
    again = seeded(unet)
    load_model(again, str(tmp_path / "x.safetensors"))
    same(again, model)


def test_who_refuses_few_bits(tmp_path: Path) -> None:
    from shrank.serving.shares import served_layers

    model = hf_model("llama")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="stream: weights of few bits are made of a model in memory"):
        shrank.auto_fact(shrank.Checkpoint(tmp_path / "dense"), 8, stream=tmp_path / "small", bits=8)
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match=r"weights of few bits are not served: .* is int8"):
        served_layers(shrank.describe(shrank.auto_fact(model, 8, bits=8, min_features=8)))
