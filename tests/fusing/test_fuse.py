"""Blocks that run with fewer calls: the same numbers, the same modules, and their own forward wherever it differs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import shrank
from shrank.fusing.blocks import FusedForward
from shrank.ops import cpu, dispatch, host, onednn, pivoted_reference, reference
from tests.common.corrected import corrected
from tests.common.models import hf_model, hf_outputs
from tests.common.ops import ops_of, pretend_native
from tests.common.tolerances import assert_close


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = shrank.LED(8, 16, rank=4)
        self.act = nn.GELU()
        self.down = shrank.LED(16, 8, rank=4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.act(self.up(x))))


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.mlp = MLP(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


X = torch.linspace(-2, 2, 48).reshape(2, 3, 8)


class Given(TorchDispatchMode):
    """What the ops that run are given: activation, and whether there is a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "shrank":
            given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
            self.ends.append((given.get("activation", "none"), given.get("residual") is not None))
        return func(*args, **kwargs or {})


def fused_model(dropout: float = 0.0, training: bool = False) -> Model:
    model = Model(dropout).train(training)
    assert shrank.fuse(model) == shrank.Fused({"mlp": ["up", "down"]})
    return model


@pytest.mark.parametrize("training", [False, True])
def test_a_block_computes_the_same_with_the_same_gradients(training: bool) -> None:
    plain, model = Model().train(training), fused_model(training=training)
    assert_close(model(X), plain(X))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        ours, theirs = (
            torch.autograd.grad(each(X).square().sum(), of)[0] for each, of in ((model, one), (plain, other))
        )
        assert_close(ours, theirs)


def test_what_follows_a_correction_stays_where_it_is() -> None:
    model = corrected(hf_model("bert"))
    before = hf_outputs(model)
    assert not shrank.fuse(model).blocks
    assert torch.equal(hf_outputs(model), before)


def test_the_ops_get_the_activation_and_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    model = fused_model()
    with shrank.backend("native"), torch.no_grad(), Given() as given:
        model(X)
    assert given.ends == [("gelu", False), ("none", True)]


def test_modules_parameters_and_files_stay_what_they_are() -> None:
    plain, model = Model(), fused_model()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())


def test_unfuse_gives_back_the_own_forward() -> None:
    model = fused_model()
    shrank.unfuse(model)
    assert "forward" not in vars(model.mlp)
    assert torch.equal(model(X), Model().eval()(X))


def test_fuse_twice_is_fuse_once() -> None:
    model = fused_model()
    first = model.mlp.forward
    assert shrank.fuse(model) == shrank.Fused({"mlp": ["up", "down"]})
    assert model.mlp.forward is first


def test_a_copy_runs_its_own_modules() -> None:
    model = fused_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.mlp.up.led_unit[0].weight.zero_()
        plain = copy.deepcopy(other)
        shrank.unfuse(plain)
        assert_close(other(X), plain(X))
        assert not torch.equal(other(X), model(X))


def test_a_pickled_model_is_fused_again() -> None:
    model, file = fused_model(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded.mlp.forward, FusedForward)
    assert_close(loaded(X), model(X))


def test_dropout_drops_in_training() -> None:
    model, plain = fused_model(0.5, training=True), Model(0.5)
    torch.manual_seed(1)
    found = model(X)
    torch.manual_seed(1)
    assert torch.equal(found, plain(X))
    model.eval(), plain.eval()
    assert_close(model(X), plain(X))


def test_hooks_on_every_module_still_see_what_they_saw() -> None:
    seen: dict[str, list[Tensor]] = {}
    for which, model in (("fused", fused_model()), ("plain", Model().eval())):
        for module in (model.mlp.up, model.mlp.act, model.mlp.dropout, model.mlp.down.led_unit[0]):
            module.register_forward_hook(lambda *given, which=which: seen.setdefault(which, []).append(given[2]))
        model(X)
    assert len(seen["fused"]) == len(seen["plain"]) == 4
    for ours, theirs in zip(seen["fused"], seen["plain"], strict=True):
        assert_close(ours, theirs)


def test_a_merged_model_runs_its_dense_layers() -> None:
    model, plain = fused_model(), Model().eval()
    shrank.merge(model)
    assert type(model.mlp.up) is nn.Linear
    assert_close(model(X), plain(X))


def test_an_activation_that_is_replaced_is_used() -> None:
    model = fused_model()
    model.mlp.act = nn.ReLU()
    plain = Model().eval()
    plain.mlp.act = nn.ReLU()
    assert_close(model(X), plain(X))


def test_a_fused_model_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = fused_model()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))


def test_arguments_that_were_not_traced_go_to_the_own_forward() -> None:
    model = fused_model()
    assert_close(model.mlp(x=X), Model().eval().mlp(X))
    with pytest.raises(TypeError, match="positional"):
        model.mlp(X, X)


class Optional(MLP):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Branches(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Plain(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.softplus(self.up(x)))


class Tuple(MLP):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.up(x)), x


class Specialised(MLP):
    """Its trace has the answer of the first call for ever."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Half(MLP):
    """Its trace forgets where gradients are off; the outputs are the same."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.up(x).mean()
        return super().forward(x) * scale


class Frozen(MLP):
    """As `Half`; here parameters have no gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.act(self.up(x))
        return x + self.down(h)


class Asking(MLP):
    """Its trace has the answer that holds with gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.is_grad_enabled() else 2 * y


class Sized(MLP):
    """For inputs of one size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(7, 8)


class Constant(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(8)


class Outside(MLP):
    """Calls a module that is not its own."""

    others = (nn.Linear(8, 8),)

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](super().forward(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Sized, "it does not run on random inputs: RuntimeError"),
        (Outside, "its forward cannot be traced: NameError"),
        (Optional, "its forward has optional arguments"),
        (Constant, "its forward has tensors that are neither parameters nor buffers"),
        (Branches, "cannot be traced: TraceError"),
        (Plain, "nothing follows its low-rank layers that they could take over"),
        (Tuple, "it returns a tuple, not a tensor"),
        (Specialised, "it computes something else when traced"),
        (Half, "it computes something else when traced"),
        (Frozen, "its outputs are others when traced"),
        (Asking, "it computes something else when traced"),
    ],
)
def test_a_block_that_is_left_says_why(kind: type[MLP], reason: str) -> None:
    block = kind().eval()
    done = shrank.fuse(nn.Sequential(block))
    assert done.blocks == {} and reason in done.left["0"]
    assert "forward" not in vars(block)


class Caching(MLP):
    """Keeps what it computes, as LeViT its biases of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.up.led_unit[1].bias.sum()
        return super().forward(x) * self.cache["scale"]


def test_a_trace_leaves_nothing_in_a_block() -> None:
    block, wanted = Caching().eval(), Caching().eval()
    wanted.load_state_dict(block.state_dict())
    model = nn.Sequential(block, nn.Sequential(nn.Identity()))
    shrank.fuse(model)
    assert all(type(each) is Tensor for each in block.cache.values())
    shrank.unfuse(model)
    assert torch.equal(model(X), wanted(X))


def test_a_forward_that_another_tool_patched_is_left() -> None:
    block = MLP().eval()
    block.forward = lambda x: x
    assert shrank.fuse(nn.ModuleList([block])).left == {"0": "its forward was patched on the instance"}


def test_a_residual_that_is_broadcast_is_added_after(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = shrank.LED(8, 8, rank=2)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.layer(x) + residual

    pretend_native(monkeypatch)
    block = Broadcast().eval()
    assert shrank.fuse(block).blocks == {"": ["layer"]}
    with shrank.backend("native"):
        for residual in (X, X[:1], X.double()):
            assert_close(block(X, residual), Broadcast.forward(block, X, residual))


def test_convolutions_take_over_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    torch.manual_seed(0)
    block = nn.Sequential(shrank.CED(4, 6, 2, (3, 3), padding=1), nn.SiLU(), nn.BatchNorm2d(6)).eval()
    x = torch.randn(2, 4, 9, 9)
    wanted = block(x)
    assert shrank.fuse(block).blocks == {"": ["0"]}
    with shrank.backend("native"), torch.no_grad():
        assert ops_of(lambda: block(x)).count("low_rank_conv") == 1
        assert_close(block(x), wanted)


class GatedMLP(nn.Module):
    """As transformers' LlamaMLP."""

    def __init__(self, pivots: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = shrank.LED(8, 16, rank=3, bias=False, pivot=pivots[0])
        self.up_proj = shrank.LED(8, 16, rank=5, pivot=pivots[1])
        for layer, pivoted in zip((self.gate_proj, self.up_proj), pivots, strict=True):
            if pivoted:
                scattered(layer)
        self.down_proj = shrank.LED(16, 8, rank=4)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def scattered(layer: shrank.LED) -> None:
    """Pivots in many pieces; of another rank, in others."""
    generator = torch.Generator().manual_seed(layer.rank)
    layer.led_unit[2].order = torch.randperm(layer.out_features, generator=generator).int()
    layer.led_unit[2].settle()


PIVOTS = [(False, False), (True, False), (False, True), (True, True)]


def fused_gate(pivots: tuple[bool, bool] = (False, False)) -> GatedMLP:
    block = GatedMLP(pivots).eval()
    assert shrank.fuse(block).blocks == {"": ["gate_proj", "up_proj"]}
    return block


@pytest.mark.parametrize("pivots", PIVOTS)
def test_a_gate_and_its_value_are_one_op_with_the_same_gradients(
    pivots: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    plain, block = GatedMLP(pivots).eval(), fused_gate(pivots)
    assert_close(block(X), plain(X))
    with shrank.backend("native"):
        with torch.no_grad():
            assert ops_of(lambda: block(X)) == ["low_rank_gated", "low_rank_linear"]
        for one, other in zip(block.parameters(), plain.parameters(), strict=True):
            ours, theirs = (
                torch.autograd.grad(each(X).square().sum(), of)[0] for each, of in ((block, one), (plain, other))
            )
            assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_a_gated_block_whose_layer_has_become_another_still_computes_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    block, wanted, seen = fused_gate(), GatedMLP().eval()(X), []
    hook = getattr(block, name).register_forward_hook(lambda *given: seen.append(given))
    with shrank.backend("native"), torch.no_grad():
        assert_close(block(X), wanted)
        assert len(seen) == 1
        hook.remove()
        layer = getattr(block, name)
        dense = nn.Linear(8, 16, bias=layer.bias is not None)
        dense.load_state_dict({"weight": layer.dense_weight()} | ({} if layer.bias is None else {"bias": layer.bias}))
        setattr(block, name, dense)
        assert "low_rank_gated" not in ops_of(lambda: block(X))
        assert_close(block(X), wanted)


@pytest.mark.parametrize("pivots", PIVOTS[1:])
@pytest.mark.parametrize(("by", "calls"), [("host", 2), ("onednn", 0), (None, 0)])
def test_on_a_cpu_a_gate_with_pivots_makes_no_more_calls_than_its_layers(
    by: str | None, calls: int, pivots: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels for a few rows take any order; of many, the layer knows better where no gather is needed."""
    block, rows = fused_gate(pivots), []
    wanted = GatedMLP(pivots).eval()(X)
    modules = {"host": host, "onednn": onednn}
    monkeypatch.setattr(cpu, "fastest", lambda *_: modules.get(by))
    for module in modules.values():
        monkeypatch.setattr(module, "low_rank_gated", refused if by != "host" else module.low_rank_gated)
    monkeypatch.setattr(host, "rows", lambda *given: rows.append(given) or rows_in_pytorch(*given))
    with torch.no_grad():
        assert_close(block(X), wanted)
    assert len(rows) == calls  # the layer that follows is too small


def refused(*_: object) -> Tensor:
    raise AssertionError("the op")


def rows_in_pytorch(x: Tensor, down: Tensor, up: Tensor, bias=None, residual=None, order=None, pivot_bias=None):
    if order is None:
        return reference.low_rank_linear(x, down, up, bias, "none", residual)
    return pivoted_reference.low_rank_pivoted(x, down, up, bias, pivot_bias, order, "none", residual)


class HalvesMLP(nn.Module):
    """As transformers' ModernBertMLP; or as its Phi3MLP, whose product has the gate behind, or with the value first."""

    def __init__(self, outputs: int = 16, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = shrank.LED(8, outputs, rank=3, bias=bias)
        self.back = shrank.LED(8, 8, rank=2)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(x).chunk(2, dim=-1)
        return self.back(self.drop(self.act(gate)) * value)


class GateBehind(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.split(self.wide(x), 8, dim=-1)
        return self.back(value * self.act(gate))


class ValueFirst(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, -1)
        return self.back(self.act(gate) * value)


def fused_halves(kind: type[HalvesMLP] = HalvesMLP, bias: bool = True) -> HalvesMLP:
    block = kind(bias=bias).eval()
    assert shrank.fuse(block).blocks == {"": ["wide"]}
    return block


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", [HalvesMLP, GateBehind, ValueFirst])
def test_halves_are_one_op_with_the_same_gradients(
    kind: type[HalvesMLP], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    plain, block = kind(bias=bias).eval(), fused_halves(kind, bias)
    x = X.clone().requires_grad_()
    theirs = torch.autograd.grad(plain(x).square().sum(), (x, *plain.parameters()))
    with shrank.backend("native"):
        with torch.no_grad():
            assert ops_of(lambda: block(X)) == ["low_rank_gated", "low_rank_linear"]
            assert_close(block(X), plain(X))
        ours = torch.autograd.grad(block(x).square().sum(), (x, *block.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("kind", [HalvesMLP, ValueFirst])
def test_on_a_cpu_the_halves_are_those_of_one_product(
    kind: type[HalvesMLP], by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ops in (dispatch, onednn):
        monkeypatch.setattr(ops, "low_rank_gated", None)
    monkeypatch.setattr(onednn, "is_faster", lambda *_: by_onednn)
    block = fused_halves(kind)
    assert torch.equal(block(X), kind.forward(block, X))


@pytest.mark.parametrize("kind", [HalvesMLP, ValueFirst])
def test_halves_of_a_layer_that_has_become_another_are_still_the_same(
    kind: type[HalvesMLP], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    block, wanted, seen = fused_halves(kind), kind().eval()(X), []
    with shrank.backend("native"), torch.no_grad():
        for module in (block.wide, block.wide.led_unit[1]):
            hook = module.register_forward_hook(lambda *given: seen.append(given))
            assert "low_rank_gated" not in ops_of(lambda: block(X))
            assert_close(block(X), wanted)
            hook.remove()
        assert len(seen) == 4
        block.wide.register_forward_hook(lambda *given: given[2] * 2)
        plain = kind().eval()
        plain.wide.register_forward_hook(lambda *given: given[2] * 2)
        assert_close(block(X), plain(X))
        shrank.merge(block)
        assert type(block.wide) is nn.Linear
        assert "low_rank_gated" not in ops_of(lambda: block(X))
        assert_close(block(X), plain(X))


def test_halves_of_a_pivoted_layer_are_computed_one_by_one() -> None:
    block = HalvesMLP().eval()
    block.wide = shrank.LED(8, 16, rank=3, pivot=True)
    plain = copy.deepcopy(block)
    assert shrank.fuse(block).blocks == {"": ["wide"]}
    assert_close(block(X), plain(X))


def test_a_fused_block_of_halves_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    block = fused_halves()
    assert_close(torch.compile(block, fullgraph=True, backend="eager")(X), block(X))


class ThreeParts(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, value, _ = self.wide(x).chunk(3, dim=-1)
        return self.act(gate) * value


class Uneven(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(x).split([15, 1], dim=-1)
        return self.act(gate) * value


class AlongAKnownDimension(HalvesMLP):
    """Nothing says how many dimensions x has."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(x).chunk(2, 2)
        return self.act(gate) * value


class GateAgain(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(x).chunk(2, -1)
        return self.act(gate) * value + gate


class GateTakenAgain(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        halves = self.wide(x).chunk(2, -1)
        return self.act(halves[0]) * halves[1] + halves[0]


class BothActivated(HalvesMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wide(x).chunk(2, -1)
        return self.act(gate) * self.act(value)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OtherCalledBetween(HalvesMLP):
    """What a module that is not PyTorch's does to what it is given is not known."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        halves = self.wide(x).chunk(2, -1)
        y = self.scale(x)
        return self.act(halves[0]) * halves[1] + y.tanh()


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (ThreeParts, 18),
        (HalvesMLP, 3),
        (Uneven, 16),
        (AlongAKnownDimension, 16),
        (GateAgain, 16),
        (GateTakenAgain, 16),
        (BothActivated, 16),
        (OtherCalledBetween, 16),
    ],
)
def test_other_parts_of_a_layer_are_left(kind: type[HalvesMLP], outputs: int) -> None:
    done = shrank.fuse(nn.Sequential(kind(outputs).eval()))
    assert done.blocks == {}
    assert "nothing follows its low-rank layers" in done.left["0"]
