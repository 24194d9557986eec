"""Who computes a low-rank layer: its stages one by one, or the op; and that LED's fast path decides as all others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import CED, LED
from shrank.layers.led import LEDConv1D
from shrank.layers.low_rank import LowRankLayer
from shrank.ops import reference
from tests.common.models import draw, seeded
from tests.common.ops import ops_of, pretend_native
from tests.common.replica import replica
from tests.common.tolerances import assert_close

LAYERS = {
    "led": (lambda: LED(24, 20, 7), (3, 24)),
    "led-no-bias": (lambda: LED(24, 20, 7, bias=False), (3, 24)),
    "led-conv1d": (lambda: LEDConv1D(24, 20, 7), (2, 3, 24)),
    "led-pivoted": (lambda: LED(24, 20, 7, pivot=True), (24,)),
    "ced": (lambda: CED(8, 12, 4, (3, 3), padding=1), (2, 8, 6, 5)),
    "ced-unbatched": (lambda: CED(8, 12, 4, (3,)), (8, 9)),
    "ced-reflect": (lambda: CED(8, 12, 4, (3,), padding=1, padding_mode="reflect"), (2, 8, 9)),
    "ced-pivoted": (lambda: CED(8, 12, 4, (3, 3), pivot=True), (2, 8, 6, 5)),
    "ced-pivoted-unbatched": (lambda: CED(8, 12, 4, (3, 3), pivot=True), (8, 6, 5)),
    "ced-pivoted-grouped": (lambda: CED(8, 12, 4, (3, 3), groups=2, groups_out=True, pivot=True), (2, 8, 6, 5)),
}
OPS = {LED: "low_rank_linear", LEDConv1D: "low_rank_linear", CED: "low_rank_conv"}


def op_of(layer: LowRankLayer) -> str:
    """The op that computes the layer."""
    return "low_rank_pivoted" if layer.pivoted and isinstance(layer, LED) else OPS[type(layer)]


def in_subclass(layer: LowRankLayer) -> LowRankLayer:
    """Whatever a subclass does, it is not what the layer was built with."""
    layer.stages[1].__class__ = type("Sub", (type(layer.stages[1]),), {})
    return layer


def hooked(register: str, number: int) -> Callable[[LowRankLayer], LowRankLayer]:
    def change(layer: LowRankLayer) -> LowRankLayer:
        getattr(layer.stages[number], register)(lambda *_: None)
        return layer

    return change


def patched(layer: LowRankLayer) -> LowRankLayer:
    layer.stages[0].forward = layer.stages[0].forward
    return layer


def wrapped(layer: LowRankLayer) -> LowRankLayer:
    layer.stages[1] = nn.Sequential(layer.stages[1])
    return layer


def parametrized(layer: LowRankLayer) -> LowRankLayer:
    nn.utils.parametrize.register_parametrization(layer.stages[0], "weight", nn.Identity())
    return layer


# Of these the stages are what they were built as, and of those something else.
SAME = {"untouched": lambda layer: layer, "replica": replica, "frozen": lambda layer: layer.requires_grad_(False)}
CHANGED = {
    "hook": hooked("register_forward_hook", 0),
    "pre-hook": hooked("register_forward_pre_hook", 1),
    "backward-hook": hooked("register_full_backward_hook", 0),
    "last-hook": hooked("register_forward_hook", -1),
    "backward-pre-hook": hooked("register_full_backward_pre_hook", 1),
    "patched": patched,
    "wrapped": wrapped,
    "subclass": in_subclass,
    "parametrized": parametrized,
}


def outcome(call: Callable[[], Tensor]) -> tuple[list[str], Tensor | str]:
    """The ops that ran, and the result or the error."""
    results = []
    shrank.why_not()  # asks the extension what it was built for, by an op, once
    try:
        ran = ops_of(lambda: results.append(call()))
    except RuntimeError as error:
        return [], str(error)
    return ran, results[0]


@pytest.mark.parametrize("on_cuda", [False, True], ids=["cpu", "as-on-cuda"])
@pytest.mark.parametrize("kernels", [False, True], ids=["no-kernels", "kernels"])
@pytest.mark.parametrize("backend", shrank.Backend)
@pytest.mark.parametrize("change", SAME | CHANGED)
@pytest.mark.parametrize("name", LAYERS)
def test_who_computes(
    name: str, change: str, backend: shrank.Backend, kernels: bool, on_cuda: bool, monkeypatch
) -> None:
    build, shape = LAYERS[name]
    layer, x = seeded(build), draw(*shape)
    expected, op = layer(x).detach(), op_of(layer)
    changed = (SAME | CHANGED)[change](layer)
    if kernels:
        pretend_native(monkeypatch)
    with monkeypatch.context() as patch, shrank.backend(backend), torch.no_grad():
        if on_cuda:
            patch.setattr(Tensor, "is_cuda", True)
        found, wanted = outcome(lambda: changed(x)), outcome(lambda: LowRankLayer.forward(changed, x))
    insisted = backend is shrank.Backend.NATIVE
    for ran, result in (found, wanted):
        if insisted and change in SAME and not kernels:
            assert ran == [] and "backend is native, but the native kernels cannot run" in result
        else:
            asked = insisted or (on_cuda and backend is shrank.Backend.AUTO and kernels)
            assert ran == ([op] if asked and change in SAME else [])
            assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [shrank.Backend.AUTO, shrank.Backend.TORCH])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "pivoted" in name])
def test_pivots_take_their_op_where_it_may_run(
    name: str, autocast: bool, backend: shrank.Backend, dtype: torch.dtype, monkeypatch
) -> None:
    build, shape = LAYERS[name]
    layer, x = seeded(build).to(dtype), draw(*shape, dtype=dtype)
    expected = layer(x).detach()
    pretend_native(monkeypatch)
    with monkeypatch.context() as patch, shrank.backend(backend), torch.no_grad():
        patch.setattr(Tensor, "is_cuda", True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ran, result = outcome(lambda: layer(x))
    assert ran == [op_of(layer)] * (backend is shrank.Backend.AUTO)
    assert result.dtype == (torch.bfloat16 if autocast else dtype)
    assert_close(result, expected.to(result.dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_follows_the_backend(name: str, monkeypatch) -> None:
    torch._dynamo.reset()
    build, shape = LAYERS[name]
    layer, x = seeded(build), draw(*shape)
    pretend_native(monkeypatch)
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    op = getattr(torch.ops.shrank, op_of(layer)).default
    with torch.no_grad():
        expected = layer(x)
        assert_close(compiled(x), expected)
        with shrank.backend("native"):
            assert_close(compiled(x), expected)
        assert_close(compiled(x), expected)
    calls = [op in {node.target for node in graph.graph.nodes} for graph in graphs]
    assert calls == [False, True]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("end", ["none", "gelu"])
@pytest.mark.parametrize("native", [False, True])
def test_what_follows_a_layer_runs_in_its_op_or_after_it(name: str, end: str, native: bool, monkeypatch) -> None:
    pretend_native(monkeypatch)
    build, shape = LAYERS[name]
    layer, x = seeded(build), draw(*shape)
    y = layer(x)
    with shrank.backend("native" if native else "torch"), torch.no_grad():
        for residual in (None, draw(*y.shape), draw(*y.shape).double(), draw(y.size(-1))):
            wanted = reference.finished(layer(x), end, residual)
            assert_close(layer.finished(x, end, residual), wanted)
        assert len(ops_of(lambda: layer.finished(x, end))) == native


def test_a_hook_on_the_layer_sees_its_output_before_what_follows() -> None:
    layer, x, seen = seeded(lambda: LED(24, 20, 7)), draw(3, 24), []
    layer.register_forward_hook(lambda _module, _args, y: seen.append(y))
    found = layer.finished(x, "relu")
    assert torch.equal(found, seen[0].relu())
