"""Small models with feed-forward blocks, and data to calibrate them on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.common.models import draw, seeded

WIDTH, UNITS = 24, 40


class Block(nn.Module):
    """A gated block, or one without a gate, with a residual."""

    def __init__(self, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, UNITS, bias) if gated else None
        self.up = nn.Linear(WIDTH, UNITS, bias)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(UNITS, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return x + self.down(self.drop(h))


class Stacked(nn.Module):
    """A gate and what it multiplies in one layer, one after the other or in turns."""

    def __init__(self, in_turns: bool = False) -> None:
        super().__init__()
        self.both, self.down, self.in_turns = nn.Linear(WIDTH, 2 * UNITS), nn.Linear(UNITS, WIDTH), in_turns

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        gate, value = (y[..., ::2], y[..., 1::2]) if self.in_turns else y.chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Between(Block):
    """A block with something between that meets all units, or knows how many they are."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)))


class Leaking(Block):
    """A block whose hidden units go elsewhere as well."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return x + self.down(h) + h.mean(-1, keepdim=True)


def stack(*blocks: Callable[[], nn.Module]) -> nn.Sequential:
    """The blocks, between an embedding of 8 numbers, with a norm, and a head."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH), *(make() for make in blocks), nn.Linear(WIDTH, 5)
        )
    )


def data(count: int = 4) -> list[Tensor]:
    """Batches of 60 tokens."""
    return list(draw(count, 60, 8))
