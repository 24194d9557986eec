"""Calibration against straightforward sums: what every layer saw, whatever the model, the batches and the memory."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import shrank
from shrank import Calibration, calibrate, make_plan
from shrank.calibration.batches import Batch
from shrank.model.adapters import target
from tests.common.models import (
    WIDTH,
    Mixed,
    SharedLayer,
    assert_untouched,
    draw,
    fingerprint,
    hf_inputs,
    hf_model,
    mlp,
    seeded,
    tokens,
)
from tests.common.tolerances import assert_close


class Branches(nn.Module):
    """Three layers of one input, wide and narrow ones after them, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (WIDTH, 16, 16))
        self.wide, self.narrow = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) * torch.cat([self.k(x), self.v(x)], -1)
        return self.narrow(torch.relu(self.wide(mixed)))


def observed(model: nn.Module, calls: list[Tensor], mask: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Rows of inputs, of outputs without bias and of gradients of the sum of squares / 2, by layer, in float64."""
    model, rows = copy.deepcopy(model).double(), {}
    chosen = (lambda t: t.flatten(0, -2)) if mask is None else (lambda t: t.flatten(0, -2)[mask.flatten()])

    def note(name: str, found, module: nn.Module, args: tuple, y: Tensor) -> None:
        entry = rows.setdefault(name, {"inputs": [], "outputs": [], "gradients": []})
        entry["inputs"].append(chosen(found.tokens(args[0]).detach()))
        entry["outputs"].append(chosen(found.tokens(y).detach()) - (0 if module.bias is None else module.bias.detach()))
        y.register_hook(lambda g: entry["gradients"].append(chosen(found.tokens(g))))

    for name, module in model.named_modules():
        if found := target(module):
            module.register_forward_hook(lambda m, a, y, name=name, found=found: note(name, found, m, a, y))
    for x in calls:
        (model(x.double()).square().sum() / 2).backward()
    return {name: {key: torch.cat(value) for key, value in entry.items()} for name, entry in rows.items()}


def half_square(output: Tensor, batch: object) -> Tensor:
    return output.square().sum() / 2


def moment(rows: Tensor, groups: int = 1) -> Tensor:
    rows = rows.unflatten(1, (groups, -1)).transpose(0, 1)
    return rows.mT @ rows / rows.shape[1]


def assert_saw(found: Calibration, model: nn.Module, expected: dict[str, dict[str, Tensor]]) -> None:
    for name, rows in expected.items():
        got, shape = found[name], target(model.get_submodule(name)).shape()
        data = rows["inputs" if got.of_inputs else "outputs"]
        groups = 1 if got.of_inputs else shape.groups
        assert got.tokens == len(data)
        assert_close(got.data, moment(data, groups))
        assert_close(got.mean.flatten(), data.mean(0))
        gradients = rows["gradients"]
        if got.of_inputs and shape.out_features > shape.in_features:
            gradients = gradients @ model.get_submodule(name).weight.double()
        assert_close(got.gradient, moment(gradients, groups))
        energy = rows["inputs"].square().mean(0)
        assert_close(got.input_energy.flatten(), energy)


@pytest.mark.parametrize("build, x", [(mlp, (4, 32)), (Branches, (2, 5, 32))], ids=["mlp", "branches"])
def test_moments_are_the_means_of_outer_products(build, x) -> None:
    model, calls = seeded(build), [draw(*x), draw(*x) * 2 + 1]
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layer that is never called
        found = calibrate(model, calls, loss=half_square)
    assert_untouched(model, before)
    assert_saw(found, model, observed(model, calls))


def test_inputs_are_observed_on_request(tmp_path) -> None:
    model, calls = seeded(Branches), [draw(2, 5, 32), draw(2, 5, 32) * 2 + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layer that is never called
        by_outputs, by_inputs = (
            calibrate(model, calls, loss=half_square, cache=tmp_path, inputs=inputs) for inputs in (False, True)
        )
    assert not by_outputs["narrow"].of_inputs and by_inputs["narrow"].of_inputs
    assert_saw(by_inputs, model, observed(model, calls))
    W, ours, theirs = model.narrow.weight.detach(), by_inputs["narrow"], by_outputs["narrow"]
    assert_close(W @ ours.data @ W.mT, theirs.data)  # what the inputs' moment makes of the outputs'


def test_convolutions_are_seen_by_their_outputs_per_group() -> None:
    model, calls = seeded(Mixed), [draw(2, 16, 8, 8)]
    found = calibrate(model, calls, loss=half_square)
    assert not found["grouped"].of_inputs and found["grouped"].data.shape == (2, 32, 32)
    assert "depthwise" not in found
    expected = observed(model, calls)
    for name in ("stem", "grouped", "mixer", "head"):
        got = found[name]
        if not got.of_inputs:
            assert_close(got.data, moment(expected[name]["outputs"], target(model.get_submodule(name)).shape().groups))


def test_layers_of_one_input_share_its_moment(tmp_path) -> None:
    with pytest.warns(UserWarning, match="unused"):
        found = calibrate(seeded(Branches), [draw(3, 7, WIDTH)], cache=tmp_path)
    assert found["q"].of_inputs and torch.equal(found["q"].data, found["k"].data)
    assert found.unseen == ["unused"] and "unused" not in found
    from safetensors.torch import load_file

    names = {name for file in tmp_path.rglob("*.safetensors") for name in load_file(file)}
    assert {n for n in names if n.endswith(":data")} == {"q:data", "wide:data", "narrow:data"}


def test_padding_does_not_count() -> None:
    model = hf_model("bert").bert
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    here = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], seed=1)
    changed = ids.clone()
    changed[1, 5:] = 3
    there = calibrate(model, [{"input_ids": changed, "attention_mask": mask}], seed=1)
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"):
        assert here[name].tokens == 13
        assert_close(here[name].data, there[name].data)
        assert_close(here[name].gradient, there[name].gradient)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama", "vit"])
@pytest.mark.parametrize("loss", ["output", "lm", "none"])
def test_transformers(family: str, loss) -> None:
    if loss == "lm" and family in ("bert", "vit", "t5"):
        with pytest.raises(ValueError, match="'lm' loss needs input_ids"):
            model = hf_model(family)
            calibrate(model, [hf_inputs(model)], loss=loss)
        return
    model = hf_model(family)
    before = fingerprint(model)
    found = calibrate(model, [hf_inputs(model)], loss=loss)
    assert_untouched(model, before)
    assert len(found) > 5 and found.has_gradients == (loss != "none")
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("loss", ["output", half_square])
def test_little_memory_takes_more_passes_and_finds_the_same(loss, tmp_path) -> None:
    model, calls = mlp(4), [draw(5, 32), draw(6, 32)]
    whole = calibrate(model, calls, loss=loss, cache=tmp_path / "whole")
    parts = calibrate(model, calls, loss=loss, cache=tmp_path / "parts", max_memory=1)
    assert len(list((tmp_path / "parts").rglob("*.safetensors"))) == 4
    assert len(list((tmp_path / "whole").rglob("*.safetensors"))) == 1
    for name in ("0", "1", "2", "3"):
        for field in ("data", "mean", "gradient", "input_energy"):
            assert_close(getattr(parts[name], field), getattr(whole[name], field))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_with_activations_on_disk_it_finds_the_same(family: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("shrank.calibration.activation_files._SMALLEST", 1)
    files, write = [], Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: files.append(path) or write(path, data))
    model = hf_model(family).to(dtype)
    here, there = (calibrate(model, [hf_inputs(model)] * 2, spill=spill) for spill in (False, True))
    assert here.has_gradients and list(here) == list(there)
    for name in here:
        assert torch.equal(here[name].gradient, there[name].gradient) and torch.equal(here[name].data, there[name].data)
    assert len(files) > 10 and not any(file.exists() for file in files)


def test_the_cache_is_gone_on_from_and_only_for_the_same(tmp_path, monkeypatch) -> None:
    model, calls = mlp(3), [draw(5, 32)]
    calls_made, call = [], Batch.call
    monkeypatch.setattr(Batch, "call", lambda batch, model: calls_made.append(1) or call(batch, model))
    calibrate(model, calls, cache=tmp_path, max_memory=1)
    assert len(calls_made) == 1 + 3  # to see who shares an input, and three passes
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[0].unlink()
    calibrate(model, calls, cache=tmp_path, max_memory=1)
    assert len(calls_made) == 1 + 3 + 1 and sorted(tmp_path.rglob("*.safetensors")) == files
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    calibrate(model, calls, cache=tmp_path)
    calibrate(model, [calls[0] + 1], cache=tmp_path)
    calibrate(model, calls, cache=tmp_path, loss="none")
    assert len(list(tmp_path.iterdir())) == 4


def test_sums_go_to_float64_in_time(monkeypatch) -> None:
    monkeypatch.setattr("shrank.calibration.moment.ROWS_IN_FLOAT32", 64)
    model, calls = mlp(1), [draw(50, 32) + 100 for _ in range(9)]
    found = calibrate(model, calls, loss=half_square)
    assert_saw(found, model, observed(model, calls))


def test_a_layer_used_twice_sums_both_uses() -> None:
    model, x = seeded(SharedLayer), draw(5, WIDTH)
    found = calibrate(model, [x], loss="none")
    inputs = torch.cat([x, torch.tanh(model.first(x))]).detach()
    outputs = (inputs @ model.first.weight.T).detach()
    assert found.tokens("first") == 10
    assert_close(found["first"].data, moment((inputs if found["first"].of_inputs else outputs).double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    bad = draw(5, 32)
    bad[2, 3] = value
    with pytest.raises(ValueError, match=r"batch 1: 0 has NaN or infinity in its inputs"):
        calibrate(mlp(), [draw(5, 32), bad])
    with pytest.raises(ValueError, match="in its gradients"):
        calibrate(mlp(), [draw(5, 32)], loss=lambda output, batch: output.sum() * value)


def test_the_model_is_as_before_after_an_error() -> None:
    model = mlp().train()
    model[1].weight.requires_grad_(False)
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        calibrate(model, [draw(5, 31)])
    with pytest.raises(ValueError, match="depends on no layer"):
        calibrate(model, [draw(5, 32)], loss=lambda output, batch: torch.ones(()))
    assert_untouched(model, before)
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "loss, error, says",
    [
        ("mse", ValueError, "must be 'output', 'kl', 'lm', 'none' or a function, got 'mse'"),
        ("ouput", ValueError, "did you mean output"),
        (None, ValueError, "or a function, got None"),
        (lambda output, batch: output, TypeError, "scalar"),
    ],
)
def test_bad_losses_are_named(loss, error, says) -> None:
    with pytest.raises(error, match=says):
        calibrate(mlp(), [draw(5, 32)], loss=loss)


def test_in_place_activations_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = calibrate(model, [draw(5, 32)], loss=half_square)
    assert_saw(found, model.requires_grad_(True), observed(model, [draw(5, 32)]))


def test_half_precision_sums_in_float32() -> None:
    model = mlp().to(torch.float16)
    found = calibrate(model, [(draw(5, 32) * 1000).half()], loss="none")
    assert found["0"].data.dtype == torch.float32 and found["0"].data.max() > 70000  # beyond float16


def test_output_sensitivity_is_the_moment_of_the_jacobian() -> None:
    model = mlp(2)
    x = draw(4, 32)
    found = calibrate(model, [x] * 400, layers=["0"])
    jacobian = model[1].weight.detach().double()  # of the output by the first layer's
    assert (found["0"].gradient[0] - jacobian.T @ jacobian).norm() < 0.1 * (jacobian.T @ jacobian).norm()


@pytest.mark.parametrize("loss", ["output", "none"])
def test_parts_of_a_model_may_be_offloaded(loss, tmp_path) -> None:
    whole, parts = hf_model("bert"), hf_model("bert")
    inputs, away = hf_inputs(whole), "bert.encoder.layer.0"
    cpu_offload(parts.get_submodule(away), execution_device="cpu")
    expected, found = (calibrate(m, [inputs], loss=loss, cache=tmp_path) for m in (whole, parts))
    assert len(expected) == 14 and len(found) == 8 and all(p.is_meta for p in parts.get_submodule(away).parameters())
    assert expected.folder == found.folder  # the same weights, wherever they are
    for name in ("bert.encoder.layer.1.attention.self.query", "classifier"):
        assert_close(found[name].data, expected[name].data)
    assert "offloaded" in make_plan(parts, 0.5, calibration=found)[f"{away}.output.dense"].reason


def test_only_the_layers_asked_for_and_a_calibration_as_it_is() -> None:
    found = calibrate(mlp(), [draw(5, 32)], layers=["1"])
    assert "1" in found and "0" not in found and calibrate(mlp(), found) is found
    with pytest.raises(KeyError, match="no layer '0'"):
        found["0"]
    assert isinstance(found, shrank.Calibration)
