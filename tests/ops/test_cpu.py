"""Who computes on a CPU: that our kernels for a few rows and oneDNN's products run where they are faster, and that
nobody who looks on loses sight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import shrank
from shrank import LED
from shrank.ops import host, onednn, reference
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.models import draw, seeded
from tests.common.ops import GATED_OP, needs_host_kernels
from tests.common.tolerances import assert_close

# Of C++ programs, whose library may be what is tested, the ops on a CPU are not these.
OP_IS_PYTHON = not torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_linear", "CPU")
BOTH = ["onednn", pytest.param("host", marks=needs_host_kernels)]
ROWS = {"onednn": 2 * host.MOST_ROWS[torch.float32], "host": 2}
# As many weights as make it worth while for any rows.
LARGE = LinearCase((7,), 384, 500, 160, True, "gelu", True)
LARGE_GATE = GatedCase((7,), 384, 500, 180, 160)


class Calls(list):
    """The inputs of the products of one of both in a test, and how many rows those have."""

    def __init__(self, by: str) -> None:
        self.by, self.rows = by, ROWS[by]
        self.a_layer = {"onednn": 2, "host": 1}[by]  # calls that it takes


@pytest.fixture(params=BOTH)
def calls(request, monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(onednn, "_IS_HERE", True)  # whatever the processor
    calls = Calls(request.param)
    module, name = {"onednn": (onednn, "product"), "host": (host, "rows")}[request.param]
    monkeypatch.setattr(module, name, counted(getattr(module, name), calls))
    return calls


def counted(compute: Callable, seen: list) -> Callable:
    def call(x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return compute(x, *rest)

    return call


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda each: each.mT.contiguous().mT,
    "every-other": lambda each: each.repeat_interleave(2, -1)[..., ::2],
    "rows-apart": lambda each: each.repeat_interleave(2, 0)[::2],
    "offset": lambda each: torch.cat((each.new_zeros(1), each.flatten()))[1:].view(each.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [0, 1, 2, 5], ids=["x", "down", "up", "residual"])
def test_any_layout_is_read(layout: str, number: int, calls: Calls) -> None:
    arguments = list(replace(LARGE, batch=(calls.rows,)).tensors(torch.float32, "cpu"))
    wanted = reference.low_rank_linear(*arguments)
    arguments[number] = LAYOUTS[layout](arguments[number])
    with torch.no_grad():
        assert_close(shrank.low_rank_linear(*arguments), wanted)
    # Weights that are not row-major are no kernel's of ours: a copy would take longer than the product.
    left = calls.by == "host" and number in (1, 2) and layout != "offset"
    assert len(calls) == (0 if left else calls.a_layer)


def layer_and_input(rows: int, **options: object) -> tuple[LED, Tensor]:
    return seeded(lambda: LED(384, 500, 200, **options)), draw(rows // 2, 2, 384)


def several(rows: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, down, up, *_ = replace(LARGE, batch=(rows,)).tensors(torch.float32, "cpu")
    return x, [down, down + 1, down - 1], [up] * 3


def run(layer: LED, x: Tensor) -> Tensor:
    return layer(x)


def finished(layer: LED, x: Tensor) -> Tensor:
    return layer.finished(x, "relu", x.new_ones(*x.shape[:-1], layer.out_features))


COMPUTED: dict[str, tuple[int, Callable[[int], object]]] = {  # how many layers, of so many rows
    "linear": (1, lambda rows: shrank.low_rank_linear(*replace(LARGE, batch=(rows,)).tensors(torch.float32, "cpu"))),
    "gated": (2, lambda rows: GATED_OP.function(*replace(LARGE_GATE, batch=(rows,)).tensors(torch.float32, "cpu"))),
    "multi": (3, lambda rows: shrank.low_rank_linear_multi(*several(rows))),
    "op": (1, lambda rows: op(*replace(LARGE, batch=(rows,)).tensors(torch.float32, "cpu"))),
    "layer": (1, lambda rows: run(*layer_and_input(rows))),
    "pivoted-layer": (1, lambda rows: run(*layer_and_input(rows, pivot=True))),
    "layer-and-what-follows": (1, lambda rows: finished(*layer_and_input(rows))),
}
if not OP_IS_PYTHON:
    del COMPUTED["op"]
op = torch.ops.shrank.low_rank_linear.default


@pytest.mark.parametrize("name", COMPUTED)
def test_large_layers_take_them_by_default(name: str, calls: Calls) -> None:
    layers, compute = COMPUTED[name]
    with torch.no_grad():
        found = compute(calls.rows)
        assert len(calls) == layers * calls.a_layer
        with shrank.backend("torch"):
            wanted = compute(calls.rows)
    assert len(calls) == layers * calls.a_layer * (1 + (name == "op")), "the backend of PyTorch takes its plain calls"
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@contextmanager
def mkldnn_off() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@contextmanager
def elsewhere() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_IS_HERE", False)
        patch.setattr(host, "IS_HERE", False)
        yield


WATCHED = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "flop-counter": lambda: FlopCounterMode(display=False),
    "forward-mode": forward_ad.dual_level,
    "mkldnn-off": mkldnn_off,
    "elsewhere": elsewhere,
}


@pytest.mark.parametrize("watch", WATCHED)
@pytest.mark.parametrize("name", sorted(COMPUTED.keys() - {"op"}))  # which a mode sees as one, and autocast casts for
def test_not_where_somebody_looks_on(name: str, watch: str, calls: Calls) -> None:
    with torch.no_grad(), WATCHED[watch]():
        COMPUTED[name][1](calls.rows)
    assert not calls or (watch, calls.by) == ("mkldnn-off", "host")


def test_not_in_transforms_and_traces(calls: Calls) -> None:
    layer, x = layer_and_input(calls.rows)
    with torch.no_grad():
        wanted = layer(x)
        calls.clear()
        assert_close(torch.vmap(layer)(x), wanted)
        assert_close(torch.jit.trace(layer, x)(x), wanted)
        assert_close(torch.export.export(layer, (x,)).module()(x), wanted)
        assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
        assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), wanted)
    assert all(type(each) is Tensor for each in calls), "of the traced module, which calls the layer"


def test_flops_are_counted_as_without(calls: Calls) -> None:
    layer, x = layer_and_input(calls.rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * calls.rows * 200 * (384 + 500)


OTHERS: dict[str, Callable[[Tensor, LED], tuple[Tensor, LED]]] = {
    "small": lambda x, layer: (draw(3, 24), seeded(lambda: LED(24, 20, 7))),
    "double": lambda x, layer: (x.double(), layer.double()),
    "half": lambda x, layer: (x.half(), layer.half()),
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
def test_not_of_other_tensors(other: str, calls: Calls) -> None:
    x, layer = OTHERS[other](*reversed(layer_and_input(calls.rows)))
    with torch.no_grad():
        layer(x)
    assert not calls


@needs_host_kernels
@pytest.mark.parametrize("dtype", host.MOST_ROWS)
def test_few_rows_are_so_many(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "rows", counted(host.rows, seen := []))
    layer = seeded(lambda: LED(384, 500, 200)).to(dtype)
    with torch.no_grad():
        for rows in range(1, 12):
            layer(draw(rows, 384, dtype=dtype))
    assert [len(x) for x in seen] == list(range(1, host.MOST_ROWS[dtype] + 1))


@needs_host_kernels
@pytest.mark.parametrize("dtype", host.FEWEST_WEIGHTS)
def test_layers_are_large_from_so_many_weights_on(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "rows", counted(host.rows, seen := []))
    rank, x = host.FEWEST_WEIGHTS[dtype] // 512, draw(1, 256, dtype=dtype)
    with torch.no_grad():
        LED(256, 256, rank - 1, dtype=dtype)(x)
        assert not seen
        LED(256, 256, rank, dtype=dtype)(x)
        assert seen


def test_small_layers_take_oneDNN_where_the_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_IS_HERE", True)
    monkeypatch.setattr(onednn, "product", counted(onednn.product, seen := []))
    layer = seeded(lambda: LED(128, 128, 32))
    rows = onednn.FEWEST_PRODUCTS // (32 * 256)
    with torch.no_grad():
        layer(draw(rows - 1, 128))
        assert not seen
        layer(draw(rows, 128))
        assert len(seen) == 2


@pytest.mark.parametrize("shape", [(3, 383), (385,), ()])
def test_inputs_that_do_not_fit_get_the_error_of_pytorch(shape: tuple[int, ...]) -> None:
    layer, _ = layer_and_input(2)
    errors = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as error:
            layer(torch.zeros(shape))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("rows", ROWS.values())
def test_the_ops_law_holds_for_them_as_well(rows: int) -> None:
    x, down, up, bias, *_ = replace(LARGE, batch=(rows,)).tensors(torch.float32, "cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="bias"):
        shrank.low_rank_linear(x, down, up, bias[:-1])


class Block(nn.Module):
    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        self.is_gated = gated
        self.gate, self.value, self.out = LED(384, 500, 160), LED(384, 500, 170), LED(500, 384, 150)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.gate(x))
        return x + self.out(h * self.value(x) if self.is_gated else h)


@pytest.mark.parametrize("gated", [False, True])
def test_fused_blocks_take_them(gated: bool, calls: Calls) -> None:
    model, x = seeded(lambda: Block(gated)), draw(calls.rows // 2, 2, 384)
    with shrank.backend("torch"), torch.no_grad():
        wanted = model(x)
    done = shrank.fuse(model)
    assert done.blocks, done.left
    calls.clear()
    with torch.no_grad():
        assert_close(model(x), wanted)
    assert len(calls) == (2 + gated) * calls.a_layer


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


IN_GRAPHS = {"onednn": 300, "host": 2}  # rows


@pytest.mark.parametrize(("grad", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.float64)])
def test_a_compiled_graph_has_the_op_where_it_is_faster(grad: bool, dtype: torch.dtype, calls: Calls) -> None:
    layer, _ = layer_and_input(2)
    graph = graph_of(layer.to(dtype), draw(IN_GRAPHS[calls.by], 384, dtype=dtype), grad)
    faster = dtype is torch.float32 and not grad
    assert (op in {node.target for node in graph.nodes}) is faster
    assert len(calls) == calls.a_layer * faster * (1 + OP_IS_PYTHON), "eager, and compiled"


def test_a_compiled_graph_has_inductors_products_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows too many for our kernels, and too few to make up for a call in Python."""
    monkeypatch.setattr(onednn, "_IS_HERE", True)
    graph = graph_of(layer_and_input(2)[0], draw(host.MOST_ROWS[torch.float32] + 1, 384))
    assert op not in {node.target for node in graph.nodes}


def test_the_whole_compiler_runs_blocks_by_them(calls: Calls) -> None:
    torch._dynamo.reset()
    model, x = seeded(Block), draw(IN_GRAPHS[calls.by], 384)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, fullgraph=True)
        assert_close(compiled(x), wanted)
        calls.clear()
        assert_close(compiled(x), wanted)
    assert len(calls) == 3 * calls.a_layer * OP_IS_PYTHON
