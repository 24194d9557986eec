"""oneDNN's products on a CPU: that they compute what PyTorch's calls do, where they run, and that nobody who looks on
loses sight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import shrank
from shrank import LED
from shrank.ops import onednn, reference
from tests.common import gated_cases, linear_cases
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

# Of C++ programs, whose library may be what is tested, the ops on a CPU are not these.
OP_IS_PYTHON = not torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_linear", "CPU")
LARGE = LinearCase((7,), 384, 500, 160, True, "gelu", True)  # as many weights as make it worth while for any rows
LARGE_GATE = GatedCase((7,), 384, 500, 180, 160)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of oneDNN's products in this test."""
    seen, product = [], onednn.product

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return product(x, *rest)

    monkeypatch.setattr(onednn, "_IS_HERE", True)  # whatever the processor
    monkeypatch.setattr(onednn, "product", counted)
    return seen


def doubled(arguments: tuple) -> list:
    return [each.double() if isinstance(each, Tensor) else each for each in arguments]


def is_not_empty(case: LinearCase | GatedCase) -> bool:
    return 0 not in (*case.batch, case.K, case.N, case.R, getattr(case, "S", 1))


@pytest.mark.parametrize(
    "case",
    list(filter(is_not_empty, [LARGE, *linear_cases.ENDS, *linear_cases.SHAPES, *linear_cases.MATRICES])),
    ids=str,
)
def test_a_linear_layer_is_as_good_as_pytorchs(case: LinearCase) -> None:
    arguments = case.tensors(torch.float32, "cpu")
    found = onednn.low_rank_linear(*arguments)
    assert_close(found, reference.low_rank_linear(*doubled(arguments)), reference.low_rank_linear(*arguments))


@pytest.mark.parametrize(
    "case", list(filter(is_not_empty, [LARGE_GATE, *gated_cases.ENDS, *gated_cases.SHAPES])), ids=str
)
def test_a_gated_layer_is_as_good_as_pytorchs(case: GatedCase) -> None:
    arguments = case.tensors(torch.float32, "cpu")
    found = onednn.low_rank_gated(*arguments)
    assert_close(found, reference.low_rank_gated(*doubled(arguments)), reference.low_rank_gated(*arguments))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda each: each.mT.contiguous().mT,
    "every-other": lambda each: each.repeat_interleave(2, -1)[..., ::2],
    "rows-apart": lambda each: each.repeat_interleave(2, 0)[::2],
    "offset": lambda each: torch.cat((each.new_zeros(1), each.flatten()))[1:].view(each.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [0, 1, 2, 5], ids=["x", "down", "up", "residual"])
def test_any_layout_is_read(layout: str, number: int, products: list[Tensor]) -> None:
    arguments = list(LARGE.tensors(torch.float32, "cpu"))
    wanted = reference.low_rank_linear(*arguments)
    arguments[number] = LAYOUTS[layout](arguments[number])
    with torch.no_grad():
        assert_close(shrank.low_rank_linear(*arguments), wanted)
    assert len(products) == 2


def test_inputs_are_left_as_they_are() -> None:
    """Sums and products are made in place, of the results."""
    for case, op in ((LARGE, onednn.low_rank_linear), (LARGE_GATE, onednn.low_rank_gated)):
        arguments = case.tensors(torch.float32, "cpu")
        before = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        op(*arguments)
        assert all(
            torch.equal(one, other) for one, other in zip(arguments, before, strict=True) if isinstance(one, Tensor)
        )


def layer_and_input(**options: object) -> tuple[LED, Tensor]:
    return seeded(lambda: LED(384, 500, 200, **options)), draw(2, 3, 384)


CALLS: dict[str, Callable[[], object]] = {
    "linear": lambda: shrank.low_rank_linear(*LARGE.tensors(torch.float32, "cpu")),
    "gated": lambda: shrank.low_rank_gated(*LARGE_GATE.tensors(torch.float32, "cpu")),
    "multi": lambda: shrank.low_rank_linear_multi(*several()),
    "layer": lambda: run(*layer_and_input()),
    "pivoted-layer": lambda: run(*layer_and_input(pivot=True)),
    "layer-and-what-follows": lambda: finished(*layer_and_input()),
}
PRODUCTS = {"gated": 4, "multi": 6}  # of the others 2


def run(layer: LED, x: Tensor) -> Tensor:
    return layer(x)


def finished(layer: LED, x: Tensor) -> Tensor:
    return layer.finished(x, "relu", x.new_ones(*x.shape[:-1], layer.out_features))


def several() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, down, up, *_ = LARGE.tensors(torch.float32, "cpu")
    return x, [down, down + 1, down - 1], [up] * 3


@pytest.mark.parametrize("name", CALLS)
def test_large_layers_take_them_by_default(name: str, products: list[Tensor]) -> None:
    with torch.no_grad():
        found = CALLS[name]()
        assert len(products) == PRODUCTS.get(name, 2)
        with shrank.backend("torch"):
            wanted = CALLS[name]()
    assert len(products) == PRODUCTS.get(name, 2), "the backend of PyTorch takes its plain calls"
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@contextmanager
def mkldnn_off() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def elsewhere() -> Iterator[None]:
    before, onednn._IS_HERE = onednn._IS_HERE, False
    try:
        yield
    finally:
        onednn._IS_HERE = before


WATCHED = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "flop-counter": lambda: FlopCounterMode(display=False),
    "forward-mode": forward_ad.dual_level,
    "mkldnn-off": mkldnn_off,
    "elsewhere": elsewhere,
}


@pytest.mark.parametrize("watch", WATCHED)
@pytest.mark.parametrize("name", CALLS)
def test_not_where_somebody_looks_on(name: str, watch: str, products: list[Tensor]) -> None:
    with torch.no_grad(), WATCHED[watch]():
        CALLS[name]()
    assert not products


def test_not_in_transforms_and_traces(products: list[Tensor]) -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        wanted = layer(x)
        products.clear()
        assert_close(torch.vmap(layer)(x), wanted)
        assert_close(torch.jit.trace(layer, x)(x), wanted)
        assert_close(torch.export.export(layer, (x,)).module()(x), wanted)
        assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
        assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), wanted)
    assert all(type(each) is Tensor for each in products), "of the traced module, which calls the layer"


def test_flops_are_counted_as_without() -> None:
    layer, x = layer_and_input()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 6 * 200 * (384 + 500)


OTHERS: dict[str, Callable[[Tensor, LED], tuple[Tensor, LED]]] = {
    "small": lambda x, layer: (draw(3, 24), seeded(lambda: LED(24, 20, 7))),
    "double": lambda x, layer: (x.double(), layer.double()),
    "bfloat16": lambda x, layer: (x.bfloat16(), layer.bfloat16()),
    "empty": lambda x, layer: (x[:0], layer),
    "no-outputs": lambda x, layer: (draw(3, 1024), LED(1024, 0, 160, bias=False)),
    "subclass": lambda x, layer: (x.as_subclass(type("Watched", (Tensor,), {})), layer),
    "sparse-weight": lambda x, layer: (x, with_sparse(layer)),
}


def with_sparse(layer: LED) -> LED:
    layer.led_unit[0].weight = nn.Parameter(layer.down.detach().to_sparse_csr())
    return layer


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("other", OTHERS)
def test_not_of_other_tensors(other: str, products: list[Tensor]) -> None:
    layer, x = layer_and_input()
    x, layer = OTHERS[other](x, layer)
    with torch.no_grad():
        layer(x)
    assert not products


def test_small_layers_take_them_where_the_rows_are_many(products: list[Tensor]) -> None:
    layer = seeded(lambda: LED(128, 128, 32))
    rows = onednn.FEWEST_PRODUCTS // (32 * 256)
    with torch.no_grad():
        layer(draw(rows - 1, 128))
        assert not products
        layer(draw(rows, 128))
        assert len(products) == 2


@pytest.mark.parametrize("shape", [(3, 383), (385,), ()])
def test_inputs_that_do_not_fit_get_the_error_of_pytorch(shape: tuple[int, ...]) -> None:
    layer, _ = layer_and_input()
    errors = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as error:
            layer(torch.zeros(shape))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_the_ops_law_holds_for_them_as_well() -> None:
    x, down, up, bias, *_ = LARGE.tensors(torch.float32, "cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="bias"):
        shrank.low_rank_linear(x, down, up, bias[:-1])


@pytest.mark.parametrize("block", ["mlp", "gated"])
def test_fused_blocks_take_them(block: str, products: list[Tensor]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = LED(384, 500, 160), LED(384, 500, 170), LED(500, 384, 150)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.silu(self.gate(x))
            return self.out(h * self.value(x) if block == "gated" else h) + x

    model, x = seeded(Block), draw(2, 3, 384)
    with shrank.backend("torch"), torch.no_grad():
        wanted = model(x)
    done = shrank.fuse(model)
    assert done.blocks, done.left
    products.clear()
    with torch.no_grad():
        assert_close(model(x), wanted)
    assert len(products) == (6 if block == "gated" else 4)


def graph_of(layer: LED, x: Tensor, grad: bool = False) -> torch.fx.Graph:
    """What Dynamo records of a layer."""
    graphs = []

    def record(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        wanted = layer(x)
        assert_close(torch.compile(layer, backend=record, fullgraph=True)(x), wanted)
    return graphs[0]


@pytest.mark.parametrize(
    ("rows", "grad", "dtype", "has_op"),
    [
        (300, False, torch.float32, True),
        (3, False, torch.float32, False),  # as few are faster by a product of Inductor's than by a call in Python
        (300, True, torch.float32, False),
        (300, False, torch.float64, False),
    ],
)
def test_a_compiled_graph_has_the_op_where_it_is_faster(
    rows: int, grad: bool, dtype: torch.dtype, has_op: bool, products: list[Tensor]
) -> None:
    layer, _ = layer_and_input()
    graph = graph_of(layer.to(dtype), draw(rows, 384, dtype=dtype), grad)
    op = torch.ops.shrank.low_rank_linear.default
    assert (op in {node.target for node in graph.nodes}) is has_op
    if OP_IS_PYTHON:
        assert len(products) == (4 if has_op else 2 * (not grad and dtype is torch.float32)), (
            "twice, eager and compiled"
        )


def test_the_whole_compiler_runs_blocks_by_them(products: list[Tensor]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = LED(384, 500, 160), LED(384, 500, 170), LED(500, 384, 150)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(nn.functional.silu(self.gate(x)) * self.value(x))

    torch._dynamo.reset()
    model, x = seeded(Block), draw(300, 384)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, fullgraph=True)
        assert_close(compiled(x), wanted)
        products.clear()
        assert_close(compiled(x), wanted)
    assert len(products) == 6 * OP_IS_PYTHON


def test_two_halves_of_one_layer_share_h(products: list[Tensor]) -> None:
    x, down, up, *_ = LARGE.tensors(torch.float32, "cpu")
    halves = up.chunk(2)
    found = onednn.low_rank_gated(x, down, halves[0], None, down, halves[1], None)
    assert len(products) == 3
    assert_close(found, reference.low_rank_gated(x, down, halves[0], None, down, halves[1], None))
