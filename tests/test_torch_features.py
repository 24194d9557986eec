"""A compressed model under compile, export, ONNX, autocast, checkpointing, pickling, vmap, double precision, FX."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shrank
from tests.common.tolerances import assert_close


class Net(nn.Module):
    """Convolution and linear layers, one of which is asked for its weight's dtype, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((-1, -2)).to(self.fc1.weight.dtype)
        return self.fc2(self.fc1(x).relu())


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = shrank.auto_fact(Net().eval(), 8, allow_slower=True)
    assert len(model.shrank_plan.low_rank) == 3
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_compile_as_one_graph_with_dynamic_batch(small: nn.Module, x: Tensor) -> None:
    compiled = torch.compile(small, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (4, 3, 1):
            assert_close(compiled(x[:batch]), small(x[:batch]))


def test_compiled_training_step(small: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(small).train()
    torch.compile(other, fullgraph=True)(x).square().sum().backward()
    small.train()(x).square().sum().backward()
    for (name, p), q in zip(small.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        assert_close(q.grad, p.grad)


def test_reading_metadata_costs_nothing_in_a_compiled_graph(small: nn.Module, x: Tensor) -> None:
    """The product behind `.weight` must not survive in the graph when only its dtype was read."""
    graphs = []

    def capture(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graph.graph.eliminate_dead_code()
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(small, backend=capture, fullgraph=True)(x)
    targets = [str(n.target) for n in graphs[0].graph.nodes]
    assert not any("matmul" in t or "mm" in t for t in targets), targets


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(small: nn.Module, x: Tensor, strict: bool) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_close(torch.export.load(buffer).module()(x[:2]), small(x[:2]))


def test_onnx_export_holds_the_factors(small: nn.Module, x: Tensor) -> None:
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(small, (x,), dynamo=True, verbose=False)
    proto = program.model_proto
    stored = sum(torch.Size(t.dims).numel() for t in proto.graph.initializer)
    assert stored < sum(p.numel() for p in Net().parameters())
    (actual,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    assert_close(torch.from_numpy(actual), small(x))


def test_trace_and_fx(small: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert_close(torch.jit.trace(small, x, check_trace=False)(x), small(x))
    assert_close(
        torch.fx.symbolic_trace(nn.Sequential(small.fc1, small.fc2))(x[:, 0, :4].flatten(1)),
        small.fc2(small.fc1(x[:, 0, :4].flatten(1))),
    )


def test_autocast_runs_the_stages_in_the_lower_precision(small: nn.Module, x: Tensor) -> None:
    dense = shrank.merge(copy.deepcopy(small))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, baseline = small(x), dense(x)
    assert actual.dtype == baseline.dtype == torch.bfloat16
    assert_close(actual, dense(x), baseline)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions(small: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    expected = small(x)
    baseline = shrank.merge(copy.deepcopy(small)).to(dtype)(x.to(dtype))
    actual = small.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_close(actual.to(torch.float32) if dtype == torch.float64 else actual, expected, baseline)


def test_copies_and_pickles(small: nn.Module, x: Tensor) -> None:
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x)) and other.shrank_plan == small.shrank_plan
        other.fc1.down.data.zero_()
        assert small.fc1.down.any()


def test_state_dict_round_trip(small: nn.Module, x: Tensor) -> None:
    torch.manual_seed(5)
    other = shrank.auto_fact(Net().eval(), 8, allow_slower=True)
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


def test_gradient_checkpointing(small: nn.Module, x: Tensor) -> None:
    small.train()(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    checkpoint(small, x, use_reentrant=False).sum().backward()
    for name, p in small.named_parameters():
        assert_close(p.grad, expected[name])


def test_per_sample_gradients(small: nn.Module, x: Tensor) -> None:
    parameters = dict(small.named_parameters())

    def loss(parameters: dict, sample: Tensor) -> Tensor:
        return torch.func.functional_call(small, parameters, sample[None]).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    small(x).sum().backward()
    assert_close(per_sample["fc1.led_unit.0.weight"].sum(0), small.fc1.down.grad)


def test_inference_mode_and_no_grad_agree(small: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        inference = small(x)
    assert torch.equal(inference, small(x))
