"""Surgery on models that fight back: sharing, tying, hooks, fast paths, foreign state, and what must stay untouched."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import shrank
from shrank import CED, LED
from tests.common.models import WIDTH, Mixed, SharedLayer, TiedLM, draw, mlp, seeded
from tests.common.tolerances import assert_close

FULL = {"rank": 10**9, "allow_growth": True}


def is_low_rank(module: nn.Module) -> bool:
    return isinstance(module, (LED, CED))


def low_rank_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if is_low_rank(module)}


# Layers that must stay dense: how to make one, and a word of the reason that the plan must give.
class SubLinear(nn.Linear):
    pass


class SubTensor(torch.Tensor):
    pass


def tampered(change) -> nn.Module:
    change(layer := nn.Linear(WIDTH, WIDTH))
    return layer


def spoiled(value: float) -> nn.Module:
    return tampered(lambda layer: layer.weight.data[3:4].fill_(value))


def weighted(weight: torch.Tensor, **kwargs) -> nn.Module:
    return tampered(lambda layer: setattr(layer, "weight", nn.Parameter(weight, **kwargs)))


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(WIDTH, WIDTH)), {nn.Linear})[0]


STUBBORN = {
    "subclass": (lambda: SubLinear(WIDTH, WIDTH), "subclass"),
    "parametrized": (lambda: tampered(parametrizations.weight_norm), "parametrized"),
    "orthogonal": (lambda: tampered(parametrizations.orthogonal), "parametrized"),
    "old-weight-norm": (lambda: tampered(weight_norm), "weight_norm"),
    "old-spectral-norm": (lambda: tampered(spectral_norm), "plain parameter"),
    "pruned": (lambda: tampered(lambda layer: prune.random_unstructured(layer, "weight", 0.5)), "pruning"),
    "quantized": (quantized, "quant"),
    "tensor-subclass": (lambda: weighted(draw(WIDTH, WIDTH).as_subclass(SubTensor)), "SubTensor"),
    "integer": (lambda: weighted(torch.ones(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False), "int8"),
    "meta": (lambda: nn.Linear(WIDTH, WIDTH, device="meta"), "meta"),
    "lazy": (lambda: nn.LazyLinear(WIDTH), "initialized"),
    "extra-buffer": (lambda: tampered(lambda layer: layer.register_buffer("scale", torch.ones(1))), "scale"),
    "patched-forward": (lambda: tampered(lambda layer: setattr(layer, "forward", lambda x: x)), "forward"),
    "offloaded": (lambda: tampered(lambda layer: cpu_offload(layer, execution_device="cpu")), "meta"),
    "nan": (lambda: spoiled(float("nan")), "NaN"),
    "inf": (lambda: spoiled(float("-inf")), "infinity"),
    "transposed-conv": (lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3), "not a supported"),
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), "not a supported"),
}


@pytest.mark.parametrize("build, reason", STUBBORN.values(), ids=STUBBORN)
@pytest.mark.filterwarnings("ignore")
def test_stays_dense_with_the_reason_and_the_rest_is_done(build, reason):
    model = nn.ModuleDict({"before": nn.Linear(WIDTH, WIDTH), "odd": build(), "after": nn.Linear(WIDTH, WIDTH)})
    odd, before = model["odd"], sorted(vars(model["odd"]))
    shrank.auto_fact(model, 0.5)
    assert model["odd"] is odd and sorted(vars(odd)) == before
    assert model.shrank_plan["odd"].rank is None and reason in model.shrank_plan["odd"].reason
    assert is_low_rank(model["before"]) and is_low_rank(model["after"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_failed_factorisation_warns_with_the_layers_name(value):
    model = nn.Sequential(OrderedDict(bad=spoiled(value), good=nn.Linear(WIDTH, WIDTH)))
    with pytest.warns(UserWarning, match=r"bad stays dense.*NaN or infinity"):
        shrank.auto_fact(model, 0.5)
    assert low_rank_names(model) == {"good"}


def test_a_module_under_two_names_is_replaced_once():
    model, x = seeded(SharedLayer), draw(5, WIDTH)
    expected = model(x)
    shrank.auto_fact(model, **FULL)
    assert is_low_rank(model.first) and model.first is model.blocks["again"]
    assert len(model.shrank_plan) == 2
    assert_close(model(x), expected)
    shrank.merge(model)
    assert type(model.first) is nn.Linear and model.first is model.blocks["again"]
    assert_close(model(x), expected)


def tie_two_linears(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def tie_by_views(model: nn.Sequential) -> None:
    whole = draw(2 * WIDTH, WIDTH)
    model[0].weight, model[2].weight = nn.Parameter(whole[:WIDTH]), nn.Parameter(whole[WIDTH // 2 : WIDTH * 3 // 2])


def tie_by_strided_views(model: nn.Sequential) -> None:
    whole = draw(2 * WIDTH, WIDTH)
    model[0].weight, model[2].weight = nn.Parameter(whole[::2]), nn.Parameter(whole[WIDTH:])


@pytest.mark.parametrize("tie", [tie_two_linears, tie_by_views, tie_by_strided_views], ids=lambda tie: tie.__name__)
def test_weights_that_share_memory_stay_dense(tie):
    model = mlp()
    tie(model)
    shrank.auto_fact(model, 0.5)
    assert low_rank_names(model) == {"1"}
    assert "tied to 2.weight" in model.shrank_plan["0"].reason and "tied to 0.weight" in model.shrank_plan["2"].reason


def test_a_head_tied_to_an_embedding_stays_dense():
    model = seeded(TiedLM)
    shrank.auto_fact(model, 0.5)
    assert low_rank_names(model) == {"body"} and model.head.weight is model.embedding.weight
    assert "tied to embedding.weight" in model.shrank_plan["head"].reason


def test_a_shared_bias_keeps_a_layer_dense_for_the_right_reason_or_stays_shared():
    model = mlp()
    model[2].bias = model[0].bias
    shrank.auto_fact(model, 0.5)
    assert model[2].bias is model[0].bias
    assert "its weight is tied" not in model.shrank_plan["0"].reason


def transformer(kind: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True, activation="gelu")
    return layer if kind == "layer" else nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("kind", ["layer", "encoder"])
@pytest.mark.parametrize("mode", ["eval", "train", "compiled"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_transformer_encoders(kind, mode, masked):
    model, x = seeded(lambda: transformer(kind)), draw(2, 6, WIDTH)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if masked else None
    model.train(mode == "train")
    keep = torch.ones(2, 6, dtype=bool) if mask is None else ~mask
    with torch.set_grad_enabled(mode == "train"):
        expected = model(x, src_key_padding_mask=mask)
        run = shrank.auto_fact(model, **FULL)
        assert len(low_rank_names(model)) == (2 if kind == "layer" else 4)
        if mode == "compiled":
            torch._dynamo.reset()
            run = torch.compile(model, backend="aot_eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the fused path would read linear1.weight
            assert_close(run(x, src_key_padding_mask=mask)[keep], expected[keep])


@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_merge_restores_the_fast_path(kind):
    model = seeded(lambda: transformer(kind))
    encoders = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    before = {name: dict(vars(module)) for name, module in model.named_modules() if isinstance(module, encoders)}
    merged = shrank.merge(shrank.auto_fact(model, 0.5))
    for name, attributes in before.items():
        now = vars(merged.get_submodule(name))
        assert now.keys() - {"shrank_plan"} == attributes.keys()
        assert {key: now[key] for key in attributes} == attributes


class OwnAttention(nn.Module):
    """Attention whose projection also lives elsewhere; `first` says which of the two places comes first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        projection, attention = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2)
        attention.out_proj = projection
        for name in sorted(("projection", "attention"), key=lambda name: name != first):
            setattr(self, name, locals()[name])


@pytest.mark.parametrize("first", ["projection", "attention"])
def test_children_of_multihead_attention_stay_dense_in_any_order(first):
    model = OwnAttention(first)
    plan = shrank.make_plan(model, 0.5)
    assert plan.low_rank == ()
    assert any("MultiheadAttention reads" in layer.reason for layer in plan if layer.kind == "Linear")


def test_results_do_not_depend_on_module_order():
    layers = {str(i): layer for i, layer in enumerate(seeded(Mixed).children())} | {"linear": mlp(1)[0]}
    one = nn.ModuleDict(copy.deepcopy(layers))
    other = nn.ModuleDict(copy.deepcopy(dict(reversed(layers.items()))))
    one, other = (shrank.auto_fact(model, 0.5).state_dict() for model in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_accelerate_hooks_move_to_the_twin_and_come_off():
    model, x = mlp(), draw(2, WIDTH)
    for layer in model:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    expected = model(x)
    shrank.auto_fact(model, **FULL)
    assert all(isinstance(layer._hf_hook, AlignDevicesHook) for layer in model) and len(low_rank_names(model)) == 3
    assert_close(model(x), expected)
    assert not hasattr(remove_hook_from_module(model, recurse=True)[0], "_hf_hook")
    assert_close(model(x), expected)


def test_a_low_rank_model_can_be_offloaded():
    model, x = nn.Sequential(mlp(), nn.Unflatten(1, (16, 2)), nn.Conv1d(16, 16, 2)), draw(2, WIDTH)
    shrank.auto_fact(model, 0.5, allow_slower=True)
    expected = model(x)
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert_close(model(x), expected)
