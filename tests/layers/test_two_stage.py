"""Pivoted storage in the layers: the same outputs, weights and checkpoints as plain factors, in fewer numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import CED, LED
from shrank.layers.led import LEDConv1D
from shrank.layers.pivots import Pivots
from shrank.linalg import Shape, factorize, pivoted
from shrank.ops import dispatch, reference
from tests.common.models import Mixed, TiedLM, assert_same_state, draw, fingerprint, hf_model, hf_outputs, mlp, seeded
from tests.common.tolerances import assert_close

CONVS = {"1d": (1, 1), "2d": (2, 1), "3d": (3, 1), "grouped": (2, 4)}


def scattered(order_of: Pivots) -> None:
    """Another order, of pivots in many pieces; each group has its own."""
    generator = torch.Generator().manual_seed(5)
    groups = order_of.order.view(order_of.groups, -1)
    order_of.order = torch.cat([each[torch.randperm(len(each), generator=generator)] for each in groups])
    order_of.settle()
    assert order_of.window is None and not order_of.mixes_groups


def led(kind: type = LED, bias: bool = True, window: int | None = 0, dtype: torch.dtype = torch.float32) -> LED:
    layer = seeded(lambda: kind(24, 20, 7, bias=bias, pivot=True)).to(dtype)
    if window is None:
        scattered(layer.led_unit[2])
    elif window:
        places = torch.cat([torch.arange(7, 7 + window), torch.arange(7), torch.arange(7 + window, 20)])
        layer.set_factors(layer.down, layer.up, layer.bias, places)
        assert layer.led_unit[2].window == window
    return layer


def ced(name: str, window: int | None = 0) -> tuple[CED, Tensor]:
    d, groups = CONVS[name]
    layer = seeded(lambda: CED(16, 20, 8, (3,) * d, 2, 1, 1, groups, groups_out=groups > 1, pivot=True))
    if window is None:
        scattered(layer.ced_unit[2])
    return layer, draw(2, 16, *(9,) * d)


@pytest.mark.parametrize("kind", [LED, LEDConv1D])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("window", [0, 5, 13, None])
def test_the_layer_is_the_linear_layer_of_its_weight(window: int | None, bias: bool, kind: type) -> None:
    layer, x = led(kind, bias, window), draw(3, 4, 24)
    weight = layer.dense_weight() if kind is LED else layer.dense_weight().mT
    assert weight.shape == (20, 24) and torch.linalg.matrix_rank(weight) == 7
    assert (layer.bias is None) == (not bias)
    assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == 7 * (24 + 20 - 7) + (20 if bias else 0)
    assert layer.rank == 7 and layer.pivoted and layer.down.shape == (7, 24) and layer.up.shape == (13, 7)
    assert torch.equal(layer.weight + 0, layer.dense_weight())


@pytest.mark.parametrize("window", [0, None])
@pytest.mark.parametrize("name", CONVS)
def test_the_layer_is_the_convolution_of_its_weight(name: str, window: int | None) -> None:
    layer, x = ced(name, window)
    assert layer.out_channels == 20
    conv = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[x.dim()]
    expected = conv(x, layer.dense_weight(), layer.bias, 2, 1, 1, layer.groups)
    assert_close(layer(x), expected)
    assert_close(layer(x[0]), expected[0])
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last:
        assert_close(copy.deepcopy(layer).to(memory_format=last)(x.contiguous(memory_format=last)), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("window", [0, None])
@pytest.mark.parametrize("name", CONVS)
def test_a_second_factor_with_all_rows_makes_the_same_convolution(
    name: str, window: int | None, residual: bool
) -> None:
    """What kernels compute of pivoted convolutions."""
    layer, x = ced(name, window)
    for given in (x, x[0]):
        z = layer(given)
        end = ("gelu", torch.ones_like(z) if residual else None)
        found, wanted = layer.in_one_op(dispatch, given, *end), reference.finished(z, *end)
        assert_close(found, wanted)
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (found, wanted))
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)


def test_bad_pivots_are_refused() -> None:
    with pytest.raises(ValueError, match="below the 20 outputs, got 20"):
        LED(24, 20, 20, pivot=True)
    with pytest.raises(ValueError, match="same groups in both stages, got 4 and 1"):
        CED(16, 20, 8, (3,), groups=4, pivot=True)
    with pytest.raises(ValueError, match="built with pivots"):
        led().set_factors(draw(7, 24), draw(13, 7), draw(20))
    with pytest.raises(ValueError, match="built without pivots"):
        LED(24, 20, 7).set_factors(draw(7, 24), draw(20, 7), draw(20), torch.arange(20))
    with pytest.raises(ValueError, match=r"order has shape \(19,\), wanted \(20,\)"):
        led().set_factors(draw(7, 24), draw(13, 7), draw(20), torch.arange(19))
    with pytest.raises(ValueError, match="no permutation of 20 places"):
        led().set_factors(draw(7, 24), draw(13, 7), draw(20), torch.zeros(20))


@pytest.mark.parametrize("places", [[2, 6, 0, 3, 4, 5, 1, 7], [0, 1, 2, 4, 3, 5, 6, 7], [4, 0, 6, 1, 2, 5, 3, 7]])
def test_groups_with_pivots_of_one_another_have_no_kernel(places: list[int]) -> None:
    """Outputs 0 to 3 are of the first group, whose pivots have the places 0 and 1, and whose others 4 and 5."""
    layer, x = seeded(lambda: CED(8, 8, 4, (3,), groups=2, groups_out=True, pivot=True)), draw(2, 8, 9)
    layer.ced_unit[2].order = torch.tensor(places).int()
    layer.ced_unit[2].settle()
    assert layer.ced_unit[2].mixes_groups
    with shrank.backend("native"), pytest.raises(RuntimeError, match="groups have pivots of one another"):
        layer(x)
    both = torch.cat((layer.ced_unit[0](x), layer.ced_unit[1](layer.ced_unit[0](x))), 1)
    both[:, :4] += layer.ced_unit[2].bias[:, None]
    assert_close(layer(x), both[:, layer.ced_unit[2].order.long()])


def test_factors_go_in_as_they_come_out_of_the_matrix() -> None:
    W, bias = draw(20, 24), draw(20)
    found = pivoted(factorize(W[None], 7))
    layer = LED(24, 20, 7, pivot=True)
    layer.set_factors(found.down[0], found.up[0], bias, found.order)
    assert_close(layer.dense_weight(), factorize(W[None], 7).merge()[0])
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("window", [0, 5, None])
def test_gradients(window: int | None) -> None:
    layer, x = led(window=window, dtype=torch.float64), draw(3, 24, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    state = {"led_unit.2.order": layer.led_unit[2].order}
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(layer, state | dict(zip(names, p, strict=True)), (x,)),
        (x, *(p.detach().requires_grad_() for p in layer.parameters())),
    )


def test_fresh_outputs_have_the_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = LED(512, 512, 200, bias=False, pivot=True)
    y = layer(torch.randn(2000, 512))
    assert all(0.25 < part.var().item() < 0.42 for part in (y[:, :200], y[:, 200:]))


def test_a_hooked_or_replaced_stage_is_used() -> None:
    layer, x = led(), draw(3, 24)
    expected, fired = layer(x), []
    handle = layer[1].register_forward_hook(lambda *_: fired.append(1))
    assert torch.equal(layer(x), expected) and fired == [1]
    handle.remove()
    layer.led_unit[1] = nn.Sequential(layer.led_unit[1])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("window", [0, 5, None])
def test_compiled_and_exported(window: int | None) -> None:
    layer, x = led(window=window), draw(3, 24)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_loading_another_order_is_noticed() -> None:
    here, there = led(window=0), led(window=5)
    here.load_state_dict(there.state_dict())
    assert here.led_unit[2].window == 5
    assert torch.equal(here(draw(2, 24)), there(draw(2, 24)))


MODELS = {"mlp": (mlp, (4, 32)), "mixed": (lambda: seeded(Mixed), (2, 16, 8, 8))}


@pytest.mark.parametrize("build, x", MODELS.values(), ids=MODELS)
def test_auto_fact_with_pivots(build, x, tmp_path) -> None:
    dense, x = build(), draw(*x)
    plain = shrank.auto_fact(copy.deepcopy(dense), 6, groups_out=True, allow_growth=True)
    model = shrank.auto_fact(copy.deepcopy(dense), 6, groups_out=True, allow_growth=True, pivot=True)
    assert all(layer.shape.pivoted for layer in model.shrank_plan.low_rank)
    assert_close(model(x), plain(x))
    parameters = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert parameters(model) == model.shrank_plan.params_after < parameters(plain)
    assert shrank.describe(model).params_after == parameters(model)
    shrank.save(model, tmp_path / "model.safetensors")
    loaded = shrank.load(build(), tmp_path / "model.safetensors")
    assert_same_state(fingerprint(loaded)["state"], fingerprint(model)["state"])
    assert torch.equal(loaded(x), model(x))
    assert shrank.RankPlan.from_dict(model.shrank_plan.to_dict()) == model.shrank_plan
    assert_close(shrank.merge(model)(x), plain(x))
    assert not any(isinstance(m, Pivots) for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama", "vit"])
def test_transformers_load_pivots(family: str, tmp_path) -> None:
    model = shrank.auto_fact(hf_model(family), 8, pivot=True)
    before = hf_outputs(model)
    assert any(layer.shape.pivoted for layer in model.shrank_plan.low_rank)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(hf_outputs(loaded), before)
    windows = lambda m: [p.window for p in m.modules() if isinstance(p, Pivots)]  # noqa: E731
    assert windows(loaded) == windows(model)


@pytest.mark.parametrize("rank", [4, 0.5])
def test_tied_and_small_layers_stay_as_they_were(rank) -> None:
    model = shrank.auto_fact(seeded(TiedLM), rank, pivot=True)
    assert not model.shrank_plan["head"].rank and model.shrank_plan["body"].shape.pivoted


def test_a_fraction_counts_what_pivots_store() -> None:
    model = shrank.auto_fact(mlp(1), 0.75, pivot=True)
    (layer,) = model.shrank_plan.low_rank
    assert 0.69 < layer.params_after / layer.size <= 0.75 and layer.rank > 0.75 * Shape(32, 32).break_even_rank


@pytest.mark.parametrize(
    "change, cause",
    [
        (torch.zeros_like, "no permutation"),
        (lambda order: order[:-1], "does not fit"),
    ],
)
def test_a_damaged_order_is_refused(change, cause, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from shrank.util.tensor_file import read_table

    path = tmp_path / "model.safetensors"
    shrank.save(shrank.auto_fact(mlp(), 8, pivot=True), path)
    metadata, tensors = read_table(path)[1], load_file(path)
    name = next(n for n in tensors if n.endswith(".order"))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata)
    model = mlp()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=cause):
        shrank.load(model, path)
    assert_same_state(fingerprint(model)["state"], before["state"])
