"""The one table of layer shapes, and the grid of cases over them, most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shrank.linalg import Shape

Ms = (1, 16, 64, 256, 512, 1024, 2048, 4096, 16384, 65536)
SHARES = (1 / 4, 1 / 2, 3 / 4, 1)  # of the break-even rank
HALF = 1 / 2
MULTIPLE = 8  # of ranks: 16 bytes of a half type
MOST_BYTES = 3e9  # of one tensor in a half type


@dataclass(frozen=True)
class Layer:
    """A linear layer with what follows it in its model: y = activation(x W^T + bias) + residual; W is (N, K).

    typical_M: tokens at once when the model answers one request, and in a batch or a prompt.
    """

    model: str
    name: str
    K: int
    N: int
    activation: str
    residual: bool
    bias: bool
    typical_M: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.model} {self.name}"

    @property
    def shape(self) -> Shape:
        return Shape(self.N, self.K)

    def rank(self, share: float) -> int:
        """This share of the break-even rank, rounded down to a multiple of 8, at least 8."""
        return max(MULTIPLE, int(share * self.shape.break_even_rank) // MULTIPLE * MULTIPLE)


def _encoder(model: str, hidden: int, typical_M: tuple[int, int]) -> list[Layer]:
    """The layers of a transformer block with biases and a GELU between two linears four times as wide."""
    return [
        Layer(model, "fc1", hidden, 4 * hidden, "gelu", False, True, typical_M),
        Layer(model, "fc2", 4 * hidden, hidden, "none", True, True, typical_M),
        Layer(model, "query", hidden, hidden, "none", False, True, typical_M),
        Layer(model, "out", hidden, hidden, "none", True, True, typical_M),
    ]


MINILM = _encoder("MiniLM", 384, (16, 32 * 128))  # a question; 32 passages of 128 tokens
BERT = _encoder("BERT-base", 768, (128, 32 * 128))
LLAMA = [
    Layer("Llama-3-8B", name, K, N, activation, residual, False, (1, 4096))
    for name, K, N, activation, residual in (
        ("gate", 4096, 14336, "silu", False),
        ("mlp out", 14336, 4096, "none", True),
        ("query", 4096, 4096, "none", False),
        ("out", 4096, 4096, "none", True),
        ("key", 4096, 1024, "none", False),
    )
]
VIT = _encoder("ViT-L/16", 1024, (197, 32 * 197))  # 196 patches and a class token
WHISPER = _encoder("Whisper-large", 1280, (5, 1500))  # decoding with 5 beams; 30 s of encoded speech
LAYERS = [*BERT, *LLAMA, *VIT, *MINILM, *WHISPER]
# An activation, a residual, both a small and a large layer without either: each another story of who limits what.
TELLING = [BERT[0], LLAMA[0], BERT[1], LLAMA[3], BERT[2], LLAMA[2]]
TELLING_Ms = (512, 16384, 16, 2048, 1, 256, 1024, 65536, 64, 4096)  # the ends and the middle early


@dataclass(frozen=True)
class Case:
    """One problem of the grid: x (M, K), down (R, K), up (N, R), y (M, N)."""

    layer: Layer
    M: int
    R: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.layer}, M {self.M}, R {self.R}, {self.dtype}"


def grid(dtype: str) -> list[Case]:
    """Every case once, most telling first, for when time is short:

    1. each layer of each model as its model runs it (typical M, half the break-even rank),
    2. TELLING layers over all M at that rank: where which bound and which kernel takes over,
    3. each layer as its model runs it, at the other ranks,
    4. everything else.
    """
    return list(
        dict.fromkeys(
            Case(layer, M, layer.rank(share), dtype)
            for layer, M, share in _in_order()
            if 2 * M * max(layer.K, layer.N) <= MOST_BYTES
        )
    )


def _in_order() -> Iterator[tuple[Layer, int, float]]:
    largest_first = [(layer, layer.typical_M[i]) for i in (1, 0) for layer in LAYERS]
    yield from ((layer, M, HALF) for layer, M in largest_first)
    yield from ((layer, M, HALF) for M in TELLING_Ms for layer in TELLING)
    yield from ((layer, M, share) for share in SHARES for layer, M in largest_first)
    yield from ((layer, M, share) for share in SHARES for M in Ms for layer in LAYERS)


def cpu_subset() -> list[Case]:
    """What a CPU does in a minute or two."""
    layers = (BERT[0], BERT[1], MINILM[2])
    return [Case(layer, M, layer.rank(HALF), "float32") for layer in layers for M in (1, 64, 512)]


def tiny() -> list[Case]:
    """Two cases that any machine does at once."""
    return [
        Case(Layer("tiny", "fc1", 48, 64, "gelu", False, True, (3, 16)), 3, 8, "float32"),
        Case(Layer("tiny", "fc2", 64, 48, "none", True, True, (3, 16)), 16, 16, "float32"),
    ]
