"""torch.compile fuses what follows low-rank layers: by the import of shrank, with a switch, and its cache knows."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shrank
from shrank.fusing import compile_pass, rewrite
from shrank.fusing.compile_pass import install
from tests.common.ops import pretend_native
from tests.common.tolerances import assert_close


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ops each run of the pass has given an end."""
    found: list[int] = []
    fuse = rewrite.fuse
    monkeypatch.setattr(rewrite, "fuse", lambda graph: found.append(fuse(graph)))
    torch._dynamo.reset()
    return found


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(shrank.LED(8, 16, rank=4), nn.GELU(), shrank.LED(16, 8, rank=4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_computes_what_it_computed_by_fewer_ops(
    counted: list[int], monkeypatch: pytest.MonkeyPatch, training: bool, dynamic: bool
) -> None:
    pretend_native(monkeypatch)
    model, x = block().train(training), torch.randn(3, 8)
    with shrank.backend("native"), torch.set_grad_enabled(training), config.patch(force_disable_caches=True):
        wanted, found = model(x), torch.compile(model, dynamic=dynamic, fullgraph=True)(x)
    assert counted == [1]
    assert_close(found, wanted)
    if training:
        weights = list(model.parameters())
        ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (found, wanted))
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)


def test_checkpointed_parts_are_fused_as_well(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor runs the pass on the graphs that a graph calls, too."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    pretend_native(monkeypatch)
    model, x = Checkpointed(), torch.randn(3, 8)
    with shrank.backend("native"), config.patch(force_disable_caches=True):
        wanted, found = model(x), torch.compile(model, fullgraph=True)(x)
        assert_close(found, wanted)
        weights = list(model.parameters())
        ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (found, wanted))
    assert sum(counted) == 1
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_layers_that_run_as_pytorch_are_left_to_inductor(counted: list[int]) -> None:
    model, x = block(), torch.randn(3, 8)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        assert_close(torch.compile(model)(x), model(x))
    assert counted == [0]


def test_the_switch_turns_it_off_and_the_cache_knows(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = config.pre_grad_custom_pass
    on = entered.uuid()
    assert on == entered.uuid()
    monkeypatch.setenv("SHRANK_FUSE", "0")
    assert entered.uuid() != on
    entered(torch.fx.Graph())
    assert counted == []


def test_a_pass_that_was_there_runs_before() -> None:
    ran: list[object] = []

    class Earlier:
        def __call__(self, graph: torch.fx.Graph) -> None:
            ran.append(graph)

        def uuid(self) -> str:
            return "earlier"

    one, other = (SimpleNamespace(pre_grad_custom_pass=each) for each in (Earlier(), ran.append))
    for each in (one, other):
        install(each)
        each.pre_grad_custom_pass(graph := torch.fx.Graph())
        assert ran.pop() is graph
    assert "earlier" in one.pre_grad_custom_pass.uuid()
    assert other.pre_grad_custom_pass.uuid() is None  # a function says nothing of what it does: nothing is cached


def test_shrank_does_not_import_the_compiler() -> None:
    """Dynamo and Inductor take a second: they are imported when somebody compiles, and know the pass then."""
    code = (
        "import shrank, sys; assert 'torch._inductor.config' not in sys.modules; import torch._inductor.config as c; "
        "print(type(c.pre_grad_custom_pass).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "FuseLowRank", ran.stderr


def test_the_pass_is_entered_whichever_is_imported_first() -> None:
    code = "import torch._inductor.config as c; import shrank; print(type(c.pre_grad_custom_pass).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "FuseLowRank", ran.stderr


def test_the_pass_is_part_of_the_configuration_that_is_saved() -> None:
    assert compile_pass.is_wanted()
    with config.patch(force_disable_caches=True):
        assert isinstance(config.save_config_portable(), dict)


class Attention(nn.Module):
    """Query, key and value of one input, a gated MLP, and one whose gate and value are the halves of a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (shrank.LED(8, n, rank=3) for n in (8, 4, 4))
        self.gate, self.up = (shrank.LED(8, 12, rank=2, bias=False) for _ in range(2))
        self.both = shrank.LED(12, 10, rank=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(x) @ torch.cat((self.key(x), self.value(x)), -1).mT
        gate, value = self.both(F.silu(self.gate(x)) * self.up(x)).chunk(2, -1)
        return scores, F.gelu(gate) * value


@pytest.mark.parametrize("training", [False, True])
def test_siblings_and_gates_go_through_the_whole_compiler(
    training: bool, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(3, 8)
    with shrank.backend("native"), config.patch(force_disable_caches=True), torch.set_grad_enabled(training):
        found, wanted = torch.compile(model, fullgraph=True)(x), model(x)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
        if training:
            weights = list(model.parameters())
            ours, theirs = (
                torch.autograd.grad(sum(each.square().sum() for each in both), weights) for both in (found, wanted)
            )
            for one, other in zip(ours, theirs, strict=True):
                assert_close(one, other)
    assert counted == [3]
