"""CorrectedLinear: a base as it is, two factors that are added, and who computes the sum."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank.layers.corrected import CorrectedLinear
from shrank.layers.quantized import quantized_weight
from shrank.linalg import Grid, nearest
from shrank.ops import host, reference
from tests.common.models import draw, seeded
from tests.common.ops import needs_host_kernels, ops_of, pretend_native
from tests.common.tolerances import assert_close
from tests.layers.test_run import CHANGED, SAME

K, N, R = 24, 40, 5


class Foreign(nn.Module):
    """A linear layer as quantizing libraries have them: sizes, a forward, and numbers that only that understands."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("packed", draw(N, K).mul(4).round().to(torch.int8))
        self.bias = nn.Parameter(draw(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, self.packed.to(x.dtype) / 4, None if self.bias is None else self.bias.to(x.dtype)
        )


BASES = {
    "plain": lambda: seeded(lambda: nn.Linear(K, N)),
    "no-bias": lambda: seeded(lambda: nn.Linear(K, N, bias=False)),
    "foreign": Foreign,
    "foreign-no-bias": lambda: Foreign(bias=False),
}
each_base = pytest.mark.parametrize("build", BASES.values(), ids=BASES)


def corrected(base: nn.Module, dtype: torch.dtype = torch.float32) -> CorrectedLinear:
    layer = CorrectedLinear(base, R, dtype=dtype).eval()
    layer.set_factors(draw(R, K, dtype=dtype), draw(N, R, dtype=dtype), None)
    return layer


@each_base
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K)], ids=str)
def test_forward_is_the_base_and_the_factors(build, shape: tuple[int, ...]) -> None:
    layer, x = corrected(build()), draw(*shape)
    assert_close(layer(x), layer.base(x) + (x @ layer.down.T) @ layer.up.T)


@each_base
def test_a_new_one_adds_nothing(build) -> None:
    base, x = build(), draw(3, K)
    assert torch.equal(CorrectedLinear(base, R)(x), base(x))


@each_base
def test_it_reads_as_the_layer_that_it_stands_for(build) -> None:
    layer, x = corrected(build()), draw(3, K)
    assert (layer.in_features, layer.out_features, layer.rank, layer.shape) == (K, N, R, shrank.LED(K, N, R).shape)
    assert layer.bias is layer.base.bias
    assert layer.weight.shape == (N, K) and layer.weight.dtype is torch.float32 and layer.weight.device.type == "cpu"
    with pytest.warns(UserWarning, match="multiplied out"):
        assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert repr(layer).startswith(f"CorrectedLinear(\n  in_features={K}, out_features={N}, rank={R}\n")


@each_base
def test_copies_and_dtypes(build) -> None:
    layer, x = corrected(build()), draw(3, K)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
    halved = copy.deepcopy(layer).bfloat16()
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    wide = copy.deepcopy(halved).double()
    assert_close(
        halved(x.bfloat16()),
        wide(x.bfloat16().double()),
        halved.base(x.bfloat16()) + halved[1](halved[0](x.bfloat16())),
    )


def test_factors_are_made_like_the_base() -> None:
    made = CorrectedLinear(nn.Linear(K, N, dtype=torch.bfloat16, device="meta"), R)
    assert made.down.dtype is made.up.dtype is torch.bfloat16 and made.down.is_meta
    assert CorrectedLinear(Foreign(bias=False), R).down.dtype is torch.float32
    assert CorrectedLinear(Foreign(), R, dtype=torch.float16).up.dtype is torch.float16


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: CorrectedLinear(nn.Linear(K, N), 0), ValueError, "at least 1, got 0"),
        (lambda: CorrectedLinear(nn.Conv1d(K, N, 1), 2), TypeError, "a Conv1d has no in_features and out_features"),
    ],
)
def test_what_cannot_be_corrected(make, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_weights_cannot_be_given_or_scaled_but_biases_can() -> None:
    layer, x = corrected(nn.Linear(K, N)), draw(3, K)
    with pytest.raises(ValueError, match="cannot be assigned"):
        layer.weight = nn.Parameter(draw(N, K))
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        layer.weight.mul_(2)
    before = layer(x)
    layer.bias = nn.Parameter(layer.bias.detach() + 1)
    assert_close(layer(x), before + 1)


@each_base
def test_training_reaches_the_factors(build) -> None:
    layer, x = corrected(build()), draw(3, K).requires_grad_()
    layer(x).sum().backward()
    assert layer.down.grad.any() and layer.up.grad.any()
    weight = layer.dense_weight().detach()
    assert_close(x.grad, torch.ones(3, N) @ weight)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("change", SAME | CHANGED)
def test_who_computes(change: str, native: bool, monkeypatch) -> None:
    pretend_native(monkeypatch)
    layer, x = corrected(nn.Linear(K, N)), draw(3, K)
    expected = layer(x).detach()
    layer = (SAME | CHANGED)[change](layer)
    results = []
    with torch.no_grad(), shrank.backend("native" if native else "torch"):
        ran = ops_of(lambda: results.append(layer(x)))
    assert ran == ["low_rank_linear"] * (native and change in SAME)
    assert_close(results[0], expected)


@needs_host_kernels
def test_a_few_rows_take_the_kernel_for_a_cpu(monkeypatch) -> None:
    layer, x, asked = CorrectedLinear(nn.Linear(512, 512), 128), draw(1, 512), []
    layer.set_factors(draw(128, 512), draw(512, 128), None)
    expected = layer(x).detach()
    rows = host.rows
    monkeypatch.setattr(host, "rows", lambda *given: asked.append(given[4]) or rows(*given))
    with torch.no_grad():
        assert_close(layer(x), expected)
        assert_close(asked[0], layer.base(x))


def test_what_the_base_computes_in_another_dtype_is_added_by_pytorch(monkeypatch) -> None:
    pretend_native(monkeypatch)
    layer, x = corrected(nn.Linear(K, N)), draw(3, K)
    layer.base.register_forward_hook(lambda _module, _args, y: y.double())
    with torch.no_grad(), shrank.backend("native"):
        assert ops_of(lambda: layer(x)) == []
        assert layer(x).dtype is torch.float64


@each_base
def test_what_follows_comes_after_the_sum(build) -> None:
    layer, x, residual = corrected(build()), draw(3, K), draw(3, N)
    assert_close(layer.finished(x, "gelu", residual), reference.finished(layer(x), "gelu", residual))
    assert layer.plain_factors() is None


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8)], ids=str)
def test_compiled_and_exported_on_a_grid(grid: Grid) -> None:
    base = nn.Linear(K, N)
    base.weight = quantized_weight(nearest(base.weight, grid))
    test_compiled_and_exported(lambda: base)


@each_base
def test_compiled_and_exported(build) -> None:
    torch._dynamo.reset()
    layer, x = corrected(build()), draw(3, K)
    with torch.no_grad():
        expected = layer(x)
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
        assert_close(exported.module()(draw(7, K)), layer(draw(7, K)))
