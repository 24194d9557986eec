"""Layers of one input in a block that cannot be traced: one op, as long as they really have one input."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import shrank
from shrank.fusing.sharing import SharedForward, SharingForward
from tests.common.ops import ops_of, pretend_native
from tests.common.tolerances import assert_close

ALONE, TOGETHER = "low_rank_linear", "low_rank_linear_multi"
X, OTHER = (torch.linspace(-1, 1, 48).mul(scale).sin().reshape(2, 3, 8) for scale in (5, 7))


class Attention(nn.Module):
    """As transformers write it: optional arguments, and a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (shrank.LED(8, n, rank=r) for n, r in ((8, 3), (4, 2), (4, 4)))
        self.o_proj = shrank.LED(4, 8, rank=2, bias=False)

    def forward(self, hidden: Tensor, states: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        query, states = self.q_proj(hidden), hidden if states is None else states
        scores = (query @ torch.cat([self.k_proj(states)] * 2, -1).mT * scale).softmax(-1)
        return self.o_proj(scores @ self.v_proj(states)), scores


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretend_native(monkeypatch)
    with shrank.backend("native"), torch.no_grad():
        yield


def fused(block: nn.Module | None = None) -> nn.Module:
    block = block or Attention()
    assert shrank.fuse(block) == shrank.Fused({"": ["q_proj", "k_proj", "v_proj"]})
    return block


def assert_same(block: nn.Module, *given: object, plain: nn.Module | None = None, **more: object) -> list[str]:
    """The outputs are those of another block; the ops that ran."""
    outputs: list[Tensor] = []
    ops = ops_of(lambda: outputs.extend(block(*given, **more)))
    for one, other in zip(outputs, (plain or Attention())(*given, **more), strict=True):
        assert_close(one, other)
    return ops


def test_layers_of_one_input_are_one_op_from_the_first_call_on() -> None:
    block = fused()
    assert assert_same(block, X) == assert_same(block, X, scale=2.0) == [TOGETHER, ALONE]


def test_a_block_that_attends_to_something_else_is_seen_after_one_call() -> None:
    block = fused()
    assert assert_same(block, X, OTHER) == [TOGETHER, TOGETHER, ALONE]  # the first of them for the query alone
    assert assert_same(block, X, OTHER) == [ALONE, TOGETHER, ALONE]  # key and value
    assert assert_same(block, X) == [ALONE, TOGETHER, ALONE]
    assert assert_same(block, X) == [TOGETHER, ALONE]


def test_gradients_are_those_of_the_blocks_own_forward() -> None:
    block, plain, x = fused(), Attention(), X.clone().requires_grad_()
    for training in (True, False):
        with torch.enable_grad():
            assert TOGETHER not in assert_same(block.train(training), x)
            ours, theirs = (
                torch.autograd.grad(each(x)[0].square().sum(), (x, *each.parameters())) for each in (block, plain)
            )
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


class Changes(Attention):
    """Its input, between two layers of it."""

    def forward(self, hidden: Tensor, change: bool = True) -> tuple[Tensor, Tensor]:
        query = self.q_proj(hidden)
        if change:
            hidden.mul_(2)
        return query, self.k_proj(hidden) + self.v_proj(hidden)


def test_an_input_that_is_changed_between_is_another() -> None:
    plain, block = Changes(), Changes()
    block.forward = SharingForward(block, [], [(block.q_proj, block.k_proj, block.v_proj)])
    for each in (block.q_proj, block.k_proj, block.v_proj):
        each.forward = SharedForward(each)
    for change in (True, False):
        wanted = plain(X.clone(), change)
        for one, other in zip(block(X.clone(), change), wanted, strict=True):
            assert_close(one, other)


def test_layers_of_an_input_that_was_changed_between_are_not_seen_as_siblings() -> None:
    assert shrank.fuse(Changes()).blocks == {"": ["k_proj", "v_proj"]}


class Mixed(Attention):
    """Other numbers for one layer of the same input: of autocast, and of gradients."""

    def forward(self, hidden: Tensor, mode: torch.autocast | torch.enable_grad | None = None) -> tuple[Tensor, ...]:
        query = self.q_proj(hidden)
        with mode or torch.no_grad():
            key = self.k_proj(hidden)
        return query, key, self.v_proj(hidden)


@pytest.mark.parametrize("mode", [torch.autocast("cpu"), torch.enable_grad()], ids=["autocast", "gradients"])
def test_a_layer_in_another_mode_computes_its_own(mode: torch.autocast | torch.enable_grad) -> None:
    plain, block = Mixed(), fused(Mixed())
    for _ in range(2):
        for one, other in zip(block(X, mode), plain(X, mode), strict=True):
            assert torch.equal(one, other) and one.requires_grad == other.requires_grad


def test_inference_mode_runs_each_alone() -> None:
    """A tensor of it does not know whether it was changed."""
    block = fused()
    with torch.inference_mode():
        assert TOGETHER not in assert_same(block, X.clone())
    block(X)
    assert assert_same(block, X) == [TOGETHER, ALONE]


def test_a_layer_called_from_outside_computes_itself_alone() -> None:
    block = fused()
    assert ops_of(lambda: block.k_proj(X)) == [ALONE]
    assert torch.equal(block.k_proj(X), Attention().k_proj(X))


def test_hooks_see_what_they_saw() -> None:
    block, plain, seen = fused(), Attention(), {}
    for which, each in (("fused", block), ("plain", plain)):
        for name in ("k_proj", "v_proj"):
            getattr(each, name).register_forward_hook(
                lambda _, given, y, key=(which, name): seen.update({key: (given[0], y)})
            )
    assert assert_same(block, X, plain=plain) == [TOGETHER, ALONE]
    for name in ("k_proj", "v_proj"):
        assert seen["fused", name][0] is seen["plain", name][0] is X
        assert_close(seen["fused", name][1], seen["plain", name][1])


def test_a_hook_that_changes_an_input_or_an_output_is_heard() -> None:
    def doubled(block: nn.Module) -> nn.Module:
        block.k_proj.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
        block.v_proj.register_forward_hook(lambda *given: given[2] * 3)
        block.q_proj.led_unit[0].register_forward_hook(lambda *given: given[2] * 5)
        return block

    block, plain = doubled(fused()), doubled(Attention())
    for _ in range(2):
        assert_same(block, X, plain=plain)


def test_a_layer_that_a_hook_makes_ready_is_not_computed_before_it() -> None:
    def add_one(layer: nn.Module, _: tuple) -> None:
        layer.led_unit[1].bias.add_(1)

    def hooked(block: nn.Module) -> nn.Module:
        block.v_proj.register_forward_pre_hook(add_one)
        return block

    block, plain = hooked(fused()), hooked(Attention())
    for _ in range(3):
        assert_same(block, X, plain=plain)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_layer_that_another_tool_patched_is_not_computed_before_it(name: str) -> None:
    """As accelerate does, to bring weights that are elsewhere."""

    def patched(block: nn.Module) -> nn.Module:
        layer = getattr(block, name)
        own = layer.forward
        layer.forward = lambda x: own(x) * layer.led_unit[1].bias.sum()
        return block

    block, plain = patched(fused()), patched(Attention())
    for _ in range(2):
        assert_same(block, X, plain=plain)
        ops = ops_of(lambda: block(X))
        assert ops.count(TOGETHER) == 1 and ops.count(ALONE) == 2 - (name == "q_proj")


def test_a_layer_that_was_patched_before_keeps_its_patch() -> None:
    def patched(block: nn.Module) -> nn.Module:
        block.k_proj.forward = lambda x, own=block.k_proj.forward: own(x) * 2
        return block

    block, plain = patched(Attention()), patched(Attention())
    patch = block.k_proj.forward
    assert shrank.fuse(block).blocks == {"": ["q_proj", "v_proj"]}
    assert block.k_proj.forward is patch
    assert assert_same(block, X, plain=plain) == [TOGETHER, ALONE, ALONE]


def test_a_merged_layer_is_dense_and_the_others_share() -> None:
    block = fused()
    shrank.merge(block)
    assert type(block.q_proj) is nn.Linear
    assert ops_of(lambda: assert_same(block, X)) == [ALONE] * 4  # of the block that it is compared with

    block = fused()
    dense = nn.Linear(8, 8)
    dense.weight, dense.bias = nn.Parameter(block.q_proj.dense_weight()), block.q_proj.bias
    block.q_proj = dense
    for _ in range(2):
        assert assert_same(block, X) == [TOGETHER, ALONE]
    assert block.forward.groups == [(block.k_proj, block.v_proj)]


def test_layers_with_adapters_compute_what_they_did() -> None:
    settings = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    outputs = []
    for block in (Attention(), fused()):
        torch.manual_seed(0)
        adapted = get_peft_model(block, settings)
        outputs += [[adapted(X) for _ in range(2)]]
    for ours, wanted in zip(*outputs, strict=True):
        for one, other in zip(ours, wanted, strict=True):
            assert_close(one, other)
    assert ops_of(lambda: block(X)).count(TOGETHER) == 1


def test_copies_and_pickled_blocks_share_among_their_own_layers() -> None:
    block, file = fused(), io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        other.k_proj.led_unit[1].weight.mul_(2)
        plain = Attention()
        plain.load_state_dict(other.state_dict())
        assert_same(other, X, plain=plain)  # in which it is seen what is shared
        assert assert_same(other, X, plain=plain) == [TOGETHER, ALONE]
        assert shrank.fuse(other).blocks == {"": ["q_proj", "k_proj", "v_proj"]}
    assert_same(block, X)


def test_unfuse_takes_all_of_it_away() -> None:
    block = fused()
    shrank.unfuse(block)
    assert not any("forward" in vars(each) for each in block.modules())
    assert assert_same(block, X) == [ALONE] * 4


def test_without_its_block_a_layer_that_was_unfused_alone_is_not_shared() -> None:
    block = fused()
    shrank.unfuse(block.k_proj)
    assert assert_same(block, X) == [TOGETHER, ALONE, ALONE]


def test_fuse_twice_is_fuse_once() -> None:
    block = fused()
    first = block.forward
    assert fused(block).forward is first


def test_a_fused_block_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    block, plain = fused(), Attention()
    for one, other in zip(torch.compile(block, fullgraph=True, backend="eager")(X), plain(X), strict=True):
        assert_close(one, other)


def test_a_layer_that_is_compiled_alone_computes_itself_alone() -> None:
    torch._dynamo.reset()
    block = fused()
    block.k_proj.compile(backend="eager", fullgraph=True)
    for given in ((X,), (X,), (OTHER, X), (OTHER, X), (X,), (X,)):
        for one, other in zip(block(*given), Attention()(*given), strict=True):
            assert_close(one, other)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    block = fused()
    with pytest.raises(TypeError):
        block(X, scale=None)  # before the value is called
    assert ops_of(lambda: block.v_proj(X)) == [ALONE]
    block(X)
    assert assert_same(block, X) == [TOGETHER, ALONE]


def test_threads_do_not_see_each_others_calls() -> None:
    meet, found = threading.Barrier(2), {}

    class Waits(Attention):
        """For another thread, between two layers."""

        def forward(self, hidden: Tensor, wait: bool = False) -> tuple[Tensor, Tensor]:
            query = self.q_proj(hidden)
            if wait:
                meet.wait(30)
            return query, self.k_proj(hidden) + self.v_proj(hidden)

    plain, block = Waits(), fused(Waits())

    def run(x: Tensor) -> None:
        with torch.no_grad():
            outputs: list[Tensor] = []
            ops = ops_of(lambda: outputs.extend(block(x, True)))
            found[x] = ops, all(map(torch.equal, outputs, plain(x)))

    threads = [threading.Thread(target=run, args=(x,)) for x in (X, OTHER)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert list(found.values()) == [([TOGETHER], True)] * 2


def test_on_pytorchs_own_calls_nothing_is_shared() -> None:
    block = fused()
    with shrank.backend("torch"):
        for one, other in zip(block(X), Attention()(X), strict=True):
            assert torch.equal(one, other)


class OfTwoInputs(Attention):
    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        return tuple(layer(hidden + i) for i, layer in enumerate((self.q_proj, self.k_proj, self.v_proj)))


class Early(Attention):
    """Fails before it has called two layers."""

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        query = self.q_proj(hidden).reshape(7, 8)
        return query, self.k_proj(hidden), self.v_proj(hidden)


class InsideAttention(Attention):
    """Calls two layers of two inputs, and a block that shares its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        y = self.inner(hidden)[0]
        return self.q_proj(y), self.k_proj(y + 1)


def test_layers_of_a_block_inside_are_not_those_of_the_block() -> None:
    model = InsideAttention()
    assert shrank.fuse(model).blocks == {"inner": ["q_proj", "k_proj", "v_proj"]}
    for _ in range(2):
        assert assert_same(model, X, plain=InsideAttention()) == [TOGETHER, ALONE, ALONE, ALONE]


def test_a_block_that_needs_two_inputs_may_be_given_one_for_both() -> None:
    class Needs(Attention):
        def forward(self, hidden: Tensor, states: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
            return super().forward(hidden, states, scale)

    block = fused(Needs())
    assert assert_same(block, X, X) == [TOGETHER, ALONE]


def test_a_patched_block_and_one_without_numbers_are_left() -> None:
    patched = Attention()
    patched.forward = lambda *given: given
    assert shrank.fuse(nn.ModuleList([patched])).left == {"0": "its forward was patched on the instance"}
    assert patched.forward(1) == (1,)
    assert shrank.fuse(Attention().to("meta")).left == {"": "its forward has optional arguments"}


class OfTwoWidths(Attention):
    """Whose trial ends with an input that does not fit the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = shrank.LED(4, 4, rank=2)

    def forward(self, hidden: Tensor, states: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        return self.q_proj(hidden), self.k_proj(states), self.v_proj(states)


@pytest.mark.parametrize("kind", [OfTwoInputs, Early, OfTwoWidths])
def test_a_block_whose_layers_were_not_seen_to_have_one_input_is_left(kind: type[Attention]) -> None:
    block = kind()
    assert shrank.fuse(block) == shrank.Fused({}, {"": "its forward has optional arguments"})
    assert not any("forward" in vars(each) for each in block.modules())


def test_a_layer_that_the_op_does_not_compute_is_no_sibling() -> None:
    class Doubled(shrank.LED):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    block = Attention()
    block.k_proj = Doubled(8, 4, rank=2)
    found = shrank.fuse(block).blocks
    assert "k_proj" not in found.get("", [])
    plain = copy.deepcopy(block)
    shrank.unfuse(plain)
    assert_same(block, X, plain=plain)


@pytest.mark.parametrize("pivoted", [["k_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_siblings_may_be_pivoted(pivoted: list[str]) -> None:
    block = Attention()
    for name in pivoted:
        outputs, rank = getattr(block, name).out_features, getattr(block, name).rank
        setattr(block, name, shrank.LED(8, outputs, rank=min(rank, outputs - 1), pivot=True))
        pivots = getattr(block, name).led_unit[2]
        pivots.order = pivots.order.roll(rank)
        pivots.settle()
    plain = copy.deepcopy(block)
    assert assert_same(fused(block), X, plain=plain) == [TOGETHER, ALONE]
    block.k_proj = nn.Linear(8, 4)
    plain.k_proj = block.k_proj
    shrank.unfuse(block)
    assert shrank.fuse(block).blocks == {"": ["q_proj", "v_proj"]}
    assert assert_same(block, X, plain=plain) == [TOGETHER, ALONE]


class Counting(Attention):
    """Has a batch norm that learns, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, hidden: Tensor, states: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(hidden) + torch.rand(1), states, scale)


def test_looking_at_a_block_changes_nothing_of_it_nor_of_random_numbers() -> None:
    block = Counting().train()
    before, state = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    fused(block)
    assert all(torch.equal(one, before[name]) for name, one in block.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
