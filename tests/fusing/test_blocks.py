"""Convolutions take over the batch norm of evaluation; blocks, what is done to the results of the blocks in them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import shrank
from shrank.fusing.blocks import FusedForward
from tests.common.models import seeded, with_statistics
from tests.common.ops import ops_of, pretend_native
from tests.common.tolerances import assert_close

from .test_fuse import Given

X = torch.linspace(-3, 3, 2 * 8 * 6 * 5).sin().reshape(2, 8, 6, 5)


def settled(build: Callable[[], nn.Module]) -> nn.Module:
    """With batch norms that have seen something, in evaluation."""
    return with_statistics(seeded(build))


class ConvBlock(nn.Module):
    """As YOLO's Conv, with its fuse()."""

    def __init__(self, inputs: int = 8, outputs: int = 8, bias: bool = False, act: nn.Module | None = None, **more):
        super().__init__()
        self.conv = shrank.CED(inputs, outputs, 4, (3, 3), padding=1, bias=bias, **more)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def fused_conv(**settings: object) -> tuple[ConvBlock, ConvBlock]:
    """A plain block, and the same fused."""
    plain, block = settled(lambda: ConvBlock(**settings)), settled(lambda: ConvBlock(**settings))
    assert shrank.fuse(block) == shrank.Fused({"": ["conv"]})
    return plain, block


def assert_same_gradients(block: nn.Module, plain: nn.Module, x: Tensor = X) -> None:
    x = x.clone().requires_grad_()
    ours, theirs = (
        torch.autograd.grad(each(x).square().sum(), (x, *each.parameters()), allow_unused=True)
        for each in (block, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)


SETTINGS = {
    "no bias": {},
    "bias": {"bias": True},
    "stride and groups": {"stride": 2, "groups": 2, "groups_out": True},
    "reflected": {"padding_mode": "reflect"},
    "relu in place": {"act": nn.ReLU(inplace=True)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_norm_in_evaluation_is_folded_where_the_op_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    plain, block = fused_conv(**SETTINGS[name])
    assert torch.equal(block(X), plain(X)), "on a CPU nothing is folded"
    with shrank.backend("native"):
        with torch.no_grad():
            with Given() as given:
                found = block(X)
            assert_close(found, plain(X))
        assert given.ends == [("relu" if isinstance(block.act, nn.ReLU) else "silu", False)]
        assert_same_gradients(block, plain)


def test_statistics_that_change_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a fold is kept: `.data` changes a tensor behind every counter's back."""
    pretend_native(monkeypatch)
    plain, block = fused_conv()
    with shrank.backend("native"), torch.no_grad():
        for each in (plain, block):
            each(X)
            each.bn.running_var.data.mul_(3), each.bn.weight.data.neg_(), each.conv.up.data.mul_(2)
        assert_close(block(X), plain(X))


def test_a_batch_norm_without_weights_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    block = settled(lambda: nn.Sequential(shrank.CED(8, 8, 3, (1, 1)), nn.BatchNorm2d(8, affine=False), nn.ReLU()))
    wanted = block(X)
    assert shrank.fuse(block).blocks == {"": ["0"]}
    with shrank.backend("native"):
        assert_close(block(X), wanted)


def test_in_training_the_batch_norm_is_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    plain, block = fused_conv()
    with shrank.backend("native"):
        for each in (plain, block):
            each.train()
        assert_same_gradients(block, plain)
        for one, other in zip(block.buffers(), plain.buffers(), strict=True):
            assert torch.equal(one, other)
        assert int(block.bn.num_batches_tracked) == 1
        block.eval(), plain.eval()
        assert_close(block(X), plain(X))


def test_a_batch_norm_that_alone_is_in_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    plain, block = fused_conv()
    with shrank.backend("native"):
        for each in (plain, block):
            each.bn.train()
        assert_close(block(X), plain(X))
    assert torch.equal(block.bn.running_mean, plain.bn.running_mean)
    assert int(block.bn.num_batches_tracked) == 1


def test_to_fuse_in_training_changes_no_statistics_and_takes_no_norm() -> None:
    block = ConvBlock().train()
    before = copy.deepcopy(block.state_dict())
    assert shrank.fuse(block).left == {"": "nothing follows its low-rank layers that they could take over"}
    assert shrank.fuse(nn.Sequential(shrank.CED(8, 8, 3, (1, 1)), nn.ReLU(), nn.BatchNorm2d(8)).train()).blocks
    assert all(torch.equal(one, before[name]) for name, one in block.state_dict().items())

    block = nn.Sequential(shrank.CED(8, 8, 3, (1, 1)), nn.ReLU(), nn.BatchNorm2d(8)).train()
    shrank.fuse(block)
    assert int(block[2].num_batches_tracked) == 0 and not block[2].running_mean.any()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.GroupNorm(2, 8),
        nn.BatchNorm2d(8).train(),
    ],
    ids=["no statistics", "of an instance", "of groups", "in training"],
)
def test_other_norms_are_left(norm: nn.Module) -> None:
    training = norm.training and norm.track_running_stats if isinstance(norm, nn.BatchNorm2d) else False
    block = nn.Sequential(shrank.CED(8, 8, 3, (1, 1)), norm, nn.ReLU()).eval()
    norm.train(training)
    assert list(shrank.fuse(block).left) == [""]


def test_a_batch_norm_alone_is_left() -> None:
    """Its fold is two calls."""
    block = settled(lambda: ConvBlock(act=nn.Hardswish()))
    assert list(shrank.fuse(block).left) == [""]


def test_a_hook_on_the_norm_sees_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    plain, block = fused_conv()
    seen: list[Tensor] = []
    for each in (plain, block):
        each.bn.register_forward_hook(lambda _, given, y: seen.extend((given[0], y)))
    with shrank.backend("native"):
        assert_close(block(X), plain(X))
    for one, other in zip(seen[:2], seen[2:], strict=True):
        assert_close(one, other)


@pytest.mark.filterwarnings("ignore:the dense weight of")
@pytest.mark.parametrize("first", ["shrank.fuse", "theirs"])
@pytest.mark.parametrize("how", ["fuse_conv_bn_eval", "as YOLO does", "in place"])
def test_other_tools_fold_before_and_after(how: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    block = settled(ConvBlock)
    wanted = block(X)

    def theirs() -> None:
        norm = block.bn
        if how == "in place":
            given = block.conv.weight, block.conv.bias, norm.running_mean, norm.running_var, norm.eps
            block.conv.weight, block.conv.bias = fuse_conv_bn_weights(*given, norm.weight, norm.bias)
        else:
            block.conv = fuse_conv_bn_eval(block.conv, norm)
        if how == "as YOLO does":
            del block.bn
            block.forward = block.forward_fuse
        else:
            block.bn = nn.Identity()

    with shrank.backend("native"), torch.no_grad():
        if first == "shrank.fuse":
            shrank.fuse(block)
        theirs()
        assert isinstance(block.conv, shrank.CED)
        assert_close(block(X), wanted)
        found = shrank.fuse(block)
        assert found.left == ({"": "its forward was patched on the instance"} if how == "as YOLO does" else {})
        assert_close(block(X), wanted)


def test_a_merged_convolution_keeps_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    plain, block = fused_conv()
    shrank.merge(block)
    assert type(block.conv) is nn.Conv2d
    with shrank.backend("native"):
        assert_close(block(X), plain(X))


class Shortcut(nn.Module):
    """As the layers of a ResNet: blocks in a sequence, and a residual of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ConvBlock(act=nn.ReLU()), ConvBlock(act=nn.Identity(), bias=True))
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x)
        y += self.shortcut(x)
        return F.relu(y)


class Around(nn.Module):
    """A residual of one block with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBlock()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class PreNorm(nn.Module):
    """As the layers of a transformer: a residual of an MLP that is a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(shrank.LED(8, 12, rank=3), nn.GELU(), shrank.LED(12, 8, rank=2), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


TOKENS = torch.linspace(-2, 2, 48).cos().reshape(2, 3, 8)
WIDE = {
    "convolutions": (
        Shortcut,
        X,
        ["blocks.0.conv", "blocks.1.conv"],
        [("relu", False), ("none", True)],
    ),
    "one convolution": (Around, X, ["block.conv"], [("silu", True)]),
    "an MLP": (PreNorm, TOKENS, ["mlp.0", "mlp.2"], [("gelu", False), ("none", True)]),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_residual_outside_of_a_block_is_taken_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, x, layers, ends = WIDE[name]
    pretend_native(monkeypatch)
    plain, model = settled(kind), nn.Sequential(settled(kind))
    assert shrank.fuse(model) == shrank.Fused({"0": layers})
    assert_close(model(x), plain(x))
    with shrank.backend("native"):
        with torch.no_grad():
            with Given() as given:
                found = model(x)
            assert_close(found, plain(x))
        assert given.ends == ends
        assert_same_gradients(model, plain, x)


@pytest.mark.parametrize("name", WIDE)
def test_blocks_in_a_block_stay_what_they_are(name: str) -> None:
    kind, x, layers, _ = WIDE[name]
    plain, model, file = settled(kind), settled(kind), io.BytesIO()
    shrank.fuse(model)
    assert [key for key, each in model.named_modules() if "forward" in vars(each)] == [""]
    assert shrank.fuse(model) == shrank.Fused({"": layers})
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.forward.layers == layers
        assert_close(other(x), plain(x))
    seen: list[Tensor] = []
    for net in (model, plain):
        net.get_submodule(layers[0]).register_forward_hook(lambda *given: seen.append(given[2]))
        net.get_submodule(layers[0].rpartition(".")[0]).register_forward_hook(lambda *given: given[2] * 2)
    assert_close(model(x), plain(x))
    assert_close(*seen)
    shrank.unfuse(model)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_an_inner_block_alone_changes_where_its_outer_one_gains_nothing() -> None:
    model = nn.Sequential(nn.Sequential(shrank.LED(8, 8, rank=2), nn.ReLU()), nn.LayerNorm(8)).eval()
    assert shrank.fuse(model) == shrank.Fused({"0": ["0"]})


def test_an_inner_block_that_cannot_be_followed_is_called() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = shrank.LED(8, 8, rank=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if x.sum() > 0 else -x)

    class Outer(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.branches = Branches()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.branches(self.norm(x)))

    plain, model = Outer().eval(), Outer().eval()
    found = shrank.fuse(model)
    assert found.blocks == {"": ["mlp.0", "mlp.2"]} and list(found.left) == ["branches"]
    assert_close(model(TOKENS), plain(TOKENS))


class Sum(nn.Module):
    """A residual that is given from outside."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = shrank.CED(8, 8, 2, (3, 3), padding=1, stride=stride)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.layer(x)) + residual


RESIDUALS = {  # the stride, x, the residual, and whether the op adds it
    "of one shape": (1, X, X, True),
    "without a batch": (1, X[0], X[0], True),
    "of fewer pixels": (2, X, X[..., :3, :3], True),
    "of one image": (1, X, X[:1], False),
    "of one image, without its dimension": (1, X, X[0], False),
    "of another dtype": (1, X, X.double(), False),
    "of one channel": (1, X, X[:, :1], False),
    "of one pixel": (2, X, X[..., :1, :1], False),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual_that_a_convolution_cannot_add_is_added_after(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch)
    stride, x, residual, taken = RESIDUALS[name]
    plain, block = Sum(stride).eval(), Sum(stride).eval()
    assert shrank.fuse(block) == shrank.Fused({"": ["layer"]})
    with shrank.backend("native"), torch.no_grad():
        with Given() as given:
            found = block(x, residual)
        assert given.ends == [("relu", True) if taken else ("none", False)]
        assert_close(found, plain(x, residual))


class Attention(nn.Module):
    """As minGPT writes it."""

    def __init__(self, pivots: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        ranks = {"q": 2, "k": 3, "v": 4}
        for name, rank in ranks.items():
            setattr(self, name, shrank.LED(8, 8, rank=rank, pivot=name in pivots))
            if name in pivots:
                places = getattr(self, name).led_unit[2]
                places.order = torch.randperm(8, generator=torch.Generator().manual_seed(rank)).int()
                places.settle()
        self.out = shrank.LED(8, 8, rank=2)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (each(x).view(B, T, 2, C // 2).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


@pytest.mark.parametrize("pivots", ["", "q", "kv", "qkv"])
@pytest.mark.parametrize("training", [False, True])
def test_siblings_in_a_block_that_can_be_traced_are_one_call(
    training: bool, pivots: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_native(monkeypatch)
    plain, block = Attention(pivots).train(training), Attention(pivots).train(training)
    assert shrank.fuse(block) == shrank.Fused({"": ["q", "k", "v"]})
    assert isinstance(block.forward, FusedForward)
    assert_close(block(TOKENS), plain(TOKENS))
    with shrank.backend("native"):
        with torch.no_grad():
            assert ops_of(lambda: block(TOKENS)) == ["low_rank_linear_multi", "low_rank_linear"]
            assert_close(block(TOKENS), plain(TOKENS))
        assert "low_rank_linear_multi" not in ops_of(lambda: block(TOKENS))
        assert_same_gradients(block, plain, TOKENS)
        block.k.register_forward_hook(lambda *given: given[2] * 2)
        plain.k.register_forward_hook(lambda *given: given[2] * 2)
        with torch.no_grad():
            assert_close(block(TOKENS), plain(TOKENS))
        block.k = nn.Linear(8, 8)
        plain.k = block.k
        with torch.no_grad():
            assert_close(block(TOKENS), plain(TOKENS))


def test_a_layer_that_computes_something_else_is_no_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(shrank.LED):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    pretend_native(monkeypatch)
    block = Attention().eval()
    block.k = Doubled(8, 8, rank=3)
    with shrank.backend("native"):
        assert "it computes something else when traced" in shrank.fuse(block).left[""]


def test_random_numbers_are_the_same_for_both_forwards() -> None:
    class Noisy(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x) + torch.rand_like(x))

    assert shrank.fuse(Noisy().eval()).blocks == {"": ["mlp.0", "mlp.2"]}


def test_blocks_are_found_in_inference_mode_and_left_without_numbers() -> None:
    model = PreNorm().eval()
    with torch.inference_mode():
        assert shrank.fuse(model).blocks == {"": ["mlp.0", "mlp.2"]}
    model = PreNorm().eval().to("meta")
    assert shrank.fuse(model) == shrank.Fused({}, {"mlp": "its parameters have no values"})
