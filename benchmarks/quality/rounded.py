"""The published methods of rounding weights to a few bits and of correcting what that loses, as simply as they can be
written: every layer alike, numbers that stand for those of a grid put into dense layers.

A weight (N, K) has one scale for every `group` of a row, of which the largest weight is the end of the grid: half a
step beyond the largest number, as GPTQ has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quality.baselines import Statistics, _roots, layers, matrix

_DAMPING = 0.01  # of the mean diagonal entry, as in GPTQ
_EXPONENTS = 20  # tried by AWQ, from 0 to 1
Round = Callable[[Tensor, Statistics, int, int], Tensor]
Correct = Callable[[Tensor, Statistics, int], tuple[Tensor, Tensor]]


def rtn(W: Tensor, _: Statistics, group: int, bits: int = 4) -> Tensor:
    """Every weight to the nearest number of its group's grid."""
    groups = W.unflatten(1, (-1, group))
    return _nearest(groups, _scale(groups, bits), bits).flatten(1)


def gptq(W: Tensor, seen: Statistics, group: int, bits: int = 4) -> Tensor:
    """Column by column in their order, the later ones making up for the earlier (Frantar et al., 2023)."""
    H = seen.inputs.double() / seen.tokens
    H = H + _DAMPING * H.diagonal().mean() * torch.eye(len(H)).double()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, rounded = W.clone(), torch.empty_like(W)
    for column in range(W.shape[1]):
        if column % group == 0:
            scale = _scale(W[:, column : column + group], bits)
        w = W[:, column : column + 1]
        rounded[:, column : column + 1] = q = _nearest(w, scale, bits)
        W[:, column:] -= ((w - q) / inverse[column, column]) @ inverse[column : column + 1, column:]
    return rounded


def awq(W: Tensor, seen: Statistics, group: int, bits: int = 4) -> Tensor:
    """Columns scaled up by a power of their inputs' mean magnitude before they are rounded: the power that loses least
    of the outputs (Lin et al., 2024; its clipping left out)."""
    magnitude, moment = (seen.magnitude.double() / seen.tokens).clamp_min(1e-8), seen.inputs.double()
    best, found = torch.inf, W
    for step in range(_EXPONENTS):
        scale = magnitude ** (step / _EXPONENTS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = rtn(W * scale, seen, group, bits) / scale
        lost = ((W - rounded) @ moment * (W - rounded)).sum().item()
        if lost < best:
            best, found = lost, rounded
    return found


def plain(E: Tensor, _: Statistics, rank: int) -> tuple[Tensor, Tensor]:
    """The SVD of what was lost (ZeroQuant-V2, Yao et al., 2023)."""
    U, S, V = torch.linalg.svd(E, full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


def scaled(E: Tensor, seen: Statistics, rank: int) -> tuple[Tensor, Tensor]:
    """With columns scaled by their inputs' mean magnitude (LQER, Zhang et al., 2024)."""
    magnitude = (seen.magnitude.double() / seen.tokens).clamp_min(1e-8)
    scale = magnitude / (magnitude.max() * magnitude.min()).sqrt()
    up, down = plain(E * scale, seen, rank)
    return up, down / scale


def whitened(E: Tensor, seen: Statistics, rank: int) -> tuple[Tensor, Tensor]:
    """The least error of the outputs (QERA, Zhang et al., 2025; EoRA, Liu et al., 2024)."""
    root, inverse = _roots(seen.inputs.double() / seen.tokens)
    up, down = plain(E @ root, seen, rank)
    return up, down @ inverse


@dataclass(frozen=True)
class Method:
    """How weights are rounded, and how what that loses is given back; None: not at all."""

    round: Round
    correct: Correct | None = None


METHODS = {
    "RTN": Method(rtn),
    "AWQ": Method(awq),
    "GPTQ": Method(gptq),
    "RTN + ZeroQuant-V2": Method(rtn, plain),
    "RTN + LQER": Method(rtn, scaled),
    "RTN + QERA / EoRA": Method(rtn, whitened),
    "GPTQ + EoRA": Method(gptq, whitened),
}


class Rounded:
    """A model's layers rounded by one method, once, and corrected at any rank."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        method: Method,
        seen: dict[str, Statistics],
        names: list[str],
        group: int,
        bits: int = 4,
    ) -> None:
        self.model, self.correct, self.seen = model, method.correct, seen
        weights = {name: matrix(module) for name, module in layers(model, ()).items() if name in names}
        self.rounded = {name: method.round(W, seen[name], group, bits) for name, W in weights.items()}
        self.lost = {name: W - self.rounded[name] for name, W in weights.items()}
        most = 0 if method.correct is None else max(map(min, (W.shape for W in weights.values())))
        self.factors = {name: method.correct(E, seen[name], most) for name, E in self.lost.items()} if most else {}

    @torch.no_grad()
    def at(self, rank: int, in_int8: bool) -> nn.Module:
        """A copy with these weights, corrected at a rank by factors in 8 bits or as they are."""
        model = copy.deepcopy(self.model)
        for name, rounded in self.rounded.items():
            weight = model.get_submodule(name).weight
            weight.copy_(rounded)
            if rank and self.factors:
                up, down = self.factors[name]
                up, down = up[:, :rank], down[:rank]
                weight.add_(_rows_in_int8(up) @ _rows_in_int8(down) if in_int8 else up @ down)
        return model


def _rows_in_int8(factor: Tensor) -> Tensor:
    scale = factor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (factor / scale).round() * scale


def _scale(groups: Tensor, bits: int) -> Tensor:
    return (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)).clamp_min(1e-12)


def _nearest(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (weights / scale).round().clamp(-half, half - 1) * scale
