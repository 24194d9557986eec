"""LED: interface, arithmetic, initialisation, old checkpoints, and stages that other tools changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shrank.layers.led import LEDConv1D
from shrank.lr_module import LED
from shrank.ops.reference import low_rank_linear
from tests.common.tolerances import assert_close

INPUTS = {
    "vector": lambda: torch.randn(12),
    "matrix": lambda: torch.randn(5, 12),
    "batched": lambda: torch.randn(2, 3, 4, 12),
    "empty": lambda: torch.randn(0, 12),
    "strided": lambda: torch.randn(12, 5).T,
    "sliced": lambda: torch.randn(4, 6, 24)[:, ::2, ::2],
}


def dense(layer: LED, x: Tensor) -> Tensor:
    weight = layer.up.double() @ layer.down.double()
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), weight, bias).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_forward_is_the_two_factors(make, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = LED(12, 20, 5, bias=bias), make()
    assert_close(layer(x), dense(layer, x))


def test_ancestors_arguments_and_names() -> None:
    layer = LED(12, 20, r=5, bias=False, device="cpu")
    assert layer.rank == 5 and layer.bias is None
    assert layer[0] is layer.led_unit[0] and layer[1] is layer.led_unit[1]
    assert LED(12, 20, 5, True, "cpu").bias is not None
    assert list(LED(12, 20, 5).state_dict()) == ["led_unit.0.weight", "led_unit.1.weight", "led_unit.1.bias"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rank": 0}, ValueError, "at least 1, got 0"),
        ({"r": -2}, ValueError, "at least 1, got -2"),
        ({}, TypeError, "give the rank once"),
        ({"rank": 2, "r": 2}, TypeError, "give the rank once"),
    ],
)
def test_bad_ranks_are_refused(arguments: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        LED(12, 20, **arguments)


def test_checkpoints_of_the_ancestors_load() -> None:
    state = {
        "led_unit.0.weight": torch.randn(5, 12),
        "led_unit.1.weight": torch.randn(20, 5),
        "led_unit.1.bias": torch.randn(20),
    }
    layer = LED(12, 20, 5)
    layer.load_state_dict(state)
    assert torch.equal(layer.down, state["led_unit.0.weight"]) and torch.equal(layer.up, state["led_unit.1.weight"])


def test_fresh_outputs_have_the_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 256)
    for rank in (8, 64, 256):
        expected, actual = nn.Linear(256, 512)(x).var(), LED(256, 512, rank)(x).var()
        assert 0.75 < actual / expected < 1.25, (rank, actual, expected)


def test_dtype_and_device_reach_every_parameter() -> None:
    layer = LED(12, 20, 5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_gradients() -> None:
    layer = LED(6, 7, 3, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(low_rank_linear, (x, layer.down, layer.up, layer.bias))
    assert torch.equal(layer(x), low_rank_linear(x, layer.down, layer.up, layer.bias))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_hook_on_a_stage_fires() -> None:
    layer, seen = LED(12, 20, 5), []
    layer.led_unit[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(torch.randn(3, 12))
    assert seen == [(3, 5)]


def test_a_replaced_stage_is_used() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    layer, x = LED(12, 20, 5, bias=False), torch.randn(3, 12)
    before = layer(x)
    layer.led_unit[1] = Adapter(layer.led_unit[1])
    assert_close(layer(x), 2 * before)


def test_a_parametrized_stage_is_used() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer, x = LED(12, 20, 5, bias=False), torch.randn(3, 12)
    before = layer(x)
    nn.utils.parametrize.register_parametrization(layer.led_unit[0], "weight", Double())
    assert_close(layer(x), 2 * before)


def test_set_factors_checks_shapes() -> None:
    layer = LED(12, 20, 5)
    with pytest.raises(ValueError, match=r"stage 0 has shape \(4, 12\), wanted \(5, 12\)"):
        layer.set_factors(torch.zeros(4, 12), torch.zeros(20, 5), torch.zeros(20))
    with pytest.raises(ValueError, match="built with a bias"):
        layer.set_factors(torch.zeros(5, 12), torch.zeros(20, 5), None)


def test_conv1d_twin_reads_transposed() -> None:
    layer = LEDConv1D(12, 20, 5)
    assert (layer.nx, layer.nf) == (12, 20) and layer.weight.shape == (12, 20)
    assert_close(layer.dense_weight(), (layer.up @ layer.down).T)


def test_a_symbolic_trace_without_gradients_reads_no_size() -> None:
    """Of a layer that is small, and of one that kernels for a CPU would compute."""
    for features in (64, 384):
        layer, x = LED(features, features, 200), torch.randn(1, features)
        with torch.no_grad():
            assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
