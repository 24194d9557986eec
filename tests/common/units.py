"""Small models whose convolutions have channels between them and whose attention has heads, and data for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.common.models import VOCAB, draw, seeded, tokens, with_statistics

FILTERS, CHANNELS, HEAD = 12, 20, 8


class Bottleneck(nn.Module):
    """Two convolutions with something between them, and a residual."""

    def __init__(self, *between: nn.Module, kernel: int = 3, bias: bool = True, taps: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(FILTERS, CHANNELS, kernel, padding=kernel // 2, bias=bias)
        self.between = nn.Sequential(*between)
        self.second = nn.Conv2d(CHANNELS, FILTERS, taps, padding=taps // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.between(self.first(x)))


class LeakingChannels(Bottleneck):
    """Whose channels go elsewhere as well."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return x + self.second(torch.relu(h)) + h.mean(1, keepdim=True)


class Gated(Bottleneck):
    """Twice as many channels, of which one half gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(FILTERS, 2 * CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.glu(self.first(x), 1))


def plain() -> Bottleneck:
    return Bottleneck(nn.ReLU())


def normed() -> Bottleneck:
    return Bottleneck(nn.BatchNorm2d(CHANNELS), nn.ReLU(), bias=False)


def inverted() -> Bottleneck:
    """As in MobileNets: 1x1, depthwise, 1x1, each with a norm."""
    depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
    norms = (nn.BatchNorm2d(CHANNELS, affine=affine) for affine in (True, False))
    return Bottleneck(next(norms), nn.ReLU6(), depthwise, next(norms), nn.PReLU(CHANNELS), kernel=1, taps=1)


def image_model(*blocks: Callable[[], nn.Module]) -> nn.Sequential:
    """The blocks, between a convolution of the image and a head, with statistics as after training."""
    return with_statistics(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, FILTERS, 3, padding=1),
                nn.GroupNorm(2, FILTERS),
                *(make() for make in blocks),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.LayerNorm(4 * FILTERS),
                nn.Linear(4 * FILTERS, 5),
            )
        )
    )


class ToLinear(nn.Module):
    """A convolution whose positions a linear layer sees, channel by channel or `by_position`."""

    def __init__(self, by_position: bool = False) -> None:
        super().__init__()
        self.by_position = by_position
        self.stem, self.norm = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(4 * CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        return self.head((x.movedim(1, -1) if self.by_position else x).flatten(1))


def to_linear(by_position: bool = False) -> nn.Module:
    return with_statistics(seeded(lambda: ToLinear(by_position)))


@torch.no_grad()
def copy_unit(modules: Iterable[nn.Module], units: int, source: int, destination: int, dead: bool = False) -> None:
    """Make one unit of these modules, of so many, as another one is, or `dead`: of all parameters and statistics that
    have rows for units, in one or more parts."""
    for module in modules:
        for value in [*module._parameters.values(), *module._buffers.values()]:
            if value is not None and value.dim() and len(value) % units == 0:
                for part in value.split(units):
                    part[destination] = 0 if dead else part[source]


def images(count: int = 4) -> list[Tensor]:
    """Batches of 6 images."""
    return list(draw(count, 6, 3, 8, 8))


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": VOCAB}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": HEAD}
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    # Queries in groups, of two heads for each of keys and values.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, **_SPECIAL, **_GROUPED)),
    # With a norm over every head of queries and keys.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, **_SPECIAL, **_GROUPED)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_SIZES, num_attention_heads=4)),
}


def attention_model(name: str) -> nn.Module:
    return seeded(ATTENTION[name])


def texts(count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of 4 sequences."""
    return [{"input_ids": ids} for ids in tokens(count, 4, 12)]
