"""What a trace of a block finds: modules that somebody watches, what may be passed by, how many calls are less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shrank
from tests.common.models import seeded, with_statistics
from tests.common.tolerances import assert_close

X = torch.linspace(-2, 2, 48).cos().reshape(2, 3, 8)
NOTHING = {"": "nothing follows its low-rank layers that they could take over"}


def led() -> shrank.LED:
    return shrank.LED(8, 8, rank=2)


class Beside(nn.Module):
    """The residual of a layer comes of another module, which is called after it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.led, self.other = led(), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.led(x)
        return y + self.other(x)


HOOKS = {
    "forward": "register_forward_hook",
    "forward-pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "backward-pre": "register_full_backward_pre_hook",
}
WATCHED: dict[str, Callable[[], tuple[nn.Module, str]]] = {  # a block, and the module in it that is watched
    "activation": lambda: (nn.Sequential(led(), nn.ReLU()), "1"),
    "norm": lambda: (nn.Sequential(shrank.CED(8, 8, 2, (1, 1)), nn.BatchNorm2d(8), nn.ReLU()), "1"),
    "between": lambda: (Beside(nn.LayerNorm(8)), "other"),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", WATCHED)
def test_what_somebody_watches_is_called_where_it_was(name: str, hook: str) -> None:
    block, watched = WATCHED[name]()
    getattr(block.eval().get_submodule(watched), HOOKS[hook])(lambda *_: None)
    assert shrank.fuse(block) == shrank.Fused(left=NOTHING)
    block, _ = WATCHED[name]()
    assert not shrank.fuse(block.eval()).left, "of others, it is taken over or passed by"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_does_not_pass_by_what_changes_its_input(inplace: bool) -> None:
    found = shrank.fuse(Beside(nn.Dropout(0.5, inplace=inplace)).eval())
    assert found == (shrank.Fused(left=NOTHING) if inplace else shrank.Fused({"": ["led"]}))


def test_a_layer_passes_by_no_module_that_nobody_knows() -> None:
    class Own(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(1))

    assert shrank.fuse(Beside(Own(8)).eval()) == shrank.Fused(left=NOTHING)


def test_a_block_whose_layers_share_their_input_is_part_of_no_other() -> None:
    class Shares(nn.Module):
        """Of one input, as calls show and a trace does not."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = led(), led()

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x.contiguous()) * self.k(x.contiguous())

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.out = nn.LayerNorm(8), Shares(), led()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.out(self.inner(self.norm(x))))

    model = seeded(Around)
    wanted = model(X)
    assert shrank.fuse(model).blocks == {"": ["out"], "inner": ["q", "k"]}
    assert_close(model(X), wanted)
    assert model.forward.traced.gain == 1


class Gated(nn.Module):
    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.gate, self.value, self.out = led(), led(), led()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(F.silu(self.gate(x)) * self.value(x))
        return x + y if self.residual else y


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = led(), led(), led()

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT) @ self.v(x)


def normed(*more: nn.Module) -> tuple[nn.Module, ...]:
    return shrank.CED(8, 8, 2, (1, 1)), nn.BatchNorm2d(8), *more


GAINS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "activation": (lambda: nn.Sequential(led(), nn.ReLU()), 1),
    "residual": (lambda: Residual(led()), 1),
    "activation and residual": (lambda: Residual(led(), nn.ReLU()), 2),
    "gate": (lambda: Gated(False), 2),
    "gate, and another's residual": (lambda: Gated(True), 3),
    "norm and activation": (lambda: nn.Sequential(*normed(nn.ReLU())), 2),
    "norm and residual": (lambda: Residual(*normed()), 2),
    "norm, activation and residual": (lambda: Residual(*normed(nn.ReLU())), 3),
    "three of one input": (Siblings, 2),
}


@pytest.mark.parametrize("name", GAINS)
def test_how_many_calls_there_are_less(name: str) -> None:
    build, gain = GAINS[name]
    block = with_statistics(seeded(build))
    shrank.fuse(block)
    assert block.forward.traced.gain == gain
