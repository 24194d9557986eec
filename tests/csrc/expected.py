"""What every instruction of the conformance program must answer, computed without the emulator: the input's words to
the answer's, after csrc/conformance/*.cuh and the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Words = np.ndarray  # of uint32
WARP = 32
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def floats(words: Words) -> np.ndarray:
    return words.view(np.float32)


def halves(words: Words, dtype: str) -> torch.Tensor:
    """The numbers of a half type, two to a word, as float32."""
    return torch.from_numpy(words.view(np.int16).copy()).view(TYPES[dtype]).float()


def words_of(numbers: torch.Tensor) -> Words:
    return numbers.contiguous().numpy().reshape(-1).view(np.uint32)


def widened(words: Words, dtype: str) -> Words:
    return words_of(halves(words, dtype))


def rounded(words: Words, dtype: str) -> Words:
    """To nearest even; a NaN becomes 0x7fff (PTX ISA, "cvt")."""
    numbers = torch.from_numpy(floats(words).copy())
    bits = numbers.to(TYPES[dtype]).view(torch.int16).numpy().view(np.uint16).copy()
    bits[np.isnan(numbers.numpy())] = 0x7FFF
    return bits.view(np.uint32)


def in_double(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Words], Words]:
    def answer(words: Words) -> Words:
        with np.errstate(all="ignore"):
            return function(floats(words).astype(np.float64)).astype(np.float32).view(np.uint32)

    return answer


def mirrored(words: Words) -> Words:
    """Each thread of a warp has the place of its opposite."""
    return words.reshape(WARP, -1)[::-1].reshape(-1)


def every_other_chunk(words: Words) -> Words:
    chunks = words.reshape(2, WARP, 4).copy()
    chunks[:, 1::2] = 0
    return chunks.reshape(-1)


def counted_from_opposite(words: Words) -> Words:
    return (words[::-1, None] + np.arange(4, dtype=np.uint32)).reshape(-1)


def positions(_: Words) -> Words:
    rows = [
        [bx * 64 + t, by, 128, 3, t, t % WARP, t // WARP, bx, by, 3]
        for by in range(3)
        for bx in range(2)
        for t in range(64)
    ]
    return np.array(rows, dtype=np.uint32).reshape(-1)


def matrices(words: Words, transposed: bool) -> Words:
    """Lane l: of each 8x8 matrix row l / 4, columns 2 (l % 4) and the next (PTX ISA, "ldmatrix")."""
    eights = words.view(np.uint16).reshape(4, 8, 8)
    if transposed:
        eights = eights.transpose(0, 2, 1)
    return np.ascontiguousarray(eights.reshape(4, WARP, 2).transpose(1, 0, 2)).reshape(-1).view(np.uint32)


def operands(words: Words, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The a (16, 16), b (16, 8) and sum (16, 8) that the lanes hold (PTX ISA, "mma.m16n8k16"), in float64."""
    held = halves(words, dtype).double().numpy().reshape(8, 4, 8, 2)  # lane / 4, lane % 4, register, which half
    a = np.zeros((2, 8, 2, 4, 2))  # which 8 rows, row, which 8 columns, pair, which of the pair
    for register in range(4):
        a[register % 2, :, register // 2] = held[:, :, register]
    b = np.stack([held[:, :, 4], held[:, :, 5]], axis=1)  # column, which 8 rows, pair, which of the pair
    total = np.stack([held[:, :, 6], held[:, :, 7]])  # which 8 rows, row, pair of columns, which
    return a.reshape(16, 16), b.reshape(8, 16).T, total.reshape(16, 8)


def dealt(sums: np.ndarray) -> np.ndarray:
    """A (16, 8) matrix as the lanes hold it: four numbers each."""
    return sums.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(-1)


def multiplied(words: Words, dtype: str) -> Words:
    a, b, total = operands(words, dtype)
    return dealt(a @ b + total).astype(np.float32).view(np.uint32)


def magnitude(words: Words, dtype: str) -> np.ndarray:
    """What an error of a sum is measured by: the sum of the sizes of its terms."""
    a, b, total = (np.abs(part) for part in operands(words, dtype))
    return dealt(a @ b + total)


def products(words: Words) -> Words:
    pairs = words.view(np.int32).astype(np.int64).reshape(-1, 2)
    return pairs.prod(axis=1).view(np.uint32)


def products_and_firsts(words: Words) -> Words:
    firsts = words.reshape(-1, 2)[:, 0].astype(np.int64)
    return (products(words).view(np.int64) + firsts).view(np.uint32)


def larger(words: Words) -> Words:
    """Of two neighbours, in both orders: NaN if either is; +0 is above -0 (PTX ISA, "max")."""
    numbers = floats(words)
    other = numbers.reshape(-1, 2)[:, ::-1].reshape(-1)
    with np.errstate(invalid="ignore"):
        return np.where(
            numbers == other, np.where(np.signbit(numbers), other, numbers), np.maximum(numbers, other)
        ).view(np.uint32)


def even_words(words: Words, together: int = 1) -> Words:
    """Of runs of so many words every other one, zeros in place of the others."""
    kept = words.reshape(-1, together).copy()
    kept[1::2] = 0
    return kept.reshape(-1)


ANSWERS: dict[str, Callable[[Words], Words]] = {
    "exp2_approximate": in_double(np.exp2),
    "reciprocal_approximate": in_double(np.reciprocal),
    "max_or_nan": larger,
    "multiply_wide": products,
    "multiply_add_wide": products_and_firsts,
    "load_word_if": even_words,
    "load_words_if": lambda words: even_words(words, 4),
    "load_once_if": lambda words: even_words(words, 4),
    **{f"exchange<{lanes}>": lambda words, lanes=lanes: words[np.arange(WARP) ^ lanes] for lanes in (4, 8, 16)},
    "load_store<uint32_t, 4>": mirrored,
    "load_store<bfloat16, 8>": mirrored,
    "load_store<float, 2>": mirrored,
    "load_shared_words": mirrored,
    "load_shared_floats": mirrored,
    "store_shared_words": mirrored,
    "store_shared_floats": mirrored,
    "load_shared_pair": mirrored,
    "copy_async": every_other_chunk,
    "copy_async_reused": every_other_chunk,
    "copy_async_if": every_other_chunk,
    "copy_async_reused_if": every_other_chunk,
    "sync_threads": counted_from_opposite,
    "grid_dependency": lambda words: words,
    "position": positions,
    "load_matrices": lambda words: matrices(words, False),
    "load_matrices_transposed": lambda words: matrices(words, True),
}
for _dtype in TYPES:
    ANSWERS |= {
        f"{name}<{_dtype}>": lambda words, answer=answer, dtype=_dtype: answer(words, dtype)
        for name, answer in {
            "widen": widened,
            "round_to": rounded,
            "round_to_pair": rounded,
            "widen_pair": widened,
            "multiply_add": multiplied,
        }.items()
    }

# Where an instruction approximates: how far from the answer, and measured by what. PTX ISA: ex2 and rcp.approx err by
# at most 2^-22 and 2^-23 of the result; a tensor core's order and rounding are not told.
SIZE_OF_ANSWER = lambda words, answer: np.abs(floats(answer)).astype(np.float64)  # noqa: E731
BOUNDS = {
    "exp2_approximate": (2**-21, SIZE_OF_ANSWER),
    "reciprocal_approximate": (2**-21, SIZE_OF_ANSWER),
    **{f"multiply_add<{dtype}>": (2**-20, lambda words, _, dtype=dtype: magnitude(words, dtype)) for dtype in TYPES},
}


def disagreements(name: str, given: Words, got: Words, answer: Words) -> np.ndarray:
    """The places where a machine's words are not the answer. A float32 NaN is one NaN, whichever its bits."""
    if got.shape != answer.shape:
        return np.arange(max(got.size, answer.size))
    differ = got != answer
    if name in BOUNDS or name.startswith(("widen", "max")):
        differ &= ~(np.isnan(floats(got)) & np.isnan(floats(answer)))
    if name in BOUNDS:
        bound, size = BOUNDS[name]
        with np.errstate(invalid="ignore"):
            differ &= ~(np.abs(floats(got).astype(np.float64) - floats(answer)) <= bound * size(given, answer))
    return np.flatnonzero(differ)
