"""The published methods, as simply as they can be written: uniform ranks, plain storage, weights replaced in place.

A layer of N outputs and K inputs gets rank keep N K / (N + K), so that its two factors hold `keep` of its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from shrank import Batch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DAMPING = 1e-6  # of the largest diagonal entry, where a moment must be inverted
_COLUMN_SHRINKAGE, _ROW_SHRINKAGE = 0.1, 0.3  # of K-FAC's moments, as LEMS has them


@dataclass
class Statistics:
    """Sums over the calibration tokens of one layer: x x^T, |x|, y y^T of outputs without bias, d d^T of gradients."""

    tokens: int = 0
    inputs: Tensor | float = 0.0
    magnitude: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    gradients: Tensor | float = 0.0


def layers(model: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, *CONVOLUTIONS) and not any(fnmatchcase(name, p) for p in exclude)
    }


def matrix(module: nn.Module) -> Tensor:
    """The weight as (N, K), float64; convolutions without groups only."""
    return module.weight.detach().double().flatten(1)


def statistics(
    model: nn.Module, batches: list[Batch], loss: Callable[[object, Batch], Tensor] | None, exclude: Iterable[str]
) -> dict[str, Statistics]:
    """Moments of inputs (linear layers), outputs (convolutions) and, with a loss, of gradients at the outputs."""
    found = {name: Statistics() for name in layers(model, exclude)}
    current: list[Batch] = []

    def rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
        tensor = tensor.detach().flatten(0, -2)
        return tensor if mask is None or len(mask) != len(tensor) else tensor[mask]

    def forward(name: str, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        entry = found[name]
        if type(module) in CONVOLUTIONS:
            seen = rows(y.movedim(1, -1), None) - (0.0 if module.bias is None else module.bias.detach())
            entry.outputs = entry.outputs + seen.T @ seen
            entry.tokens += len(seen)
            return None
        mask = current[0].mask_for(tuple(y.shape[:-1]))
        x = rows(args[0], mask)
        entry.inputs, entry.magnitude = entry.inputs + x.T @ x, entry.magnitude + x.abs().sum(0)
        entry.tokens += len(x)
        if loss is None:
            return None
        if not y.requires_grad:
            y.requires_grad_()

        def backward(gradient: Tensor) -> None:
            gradient = rows(gradient, mask)
            entry.gradients = entry.gradients + gradient.T @ gradient

        y.register_hook(backward)
        return None

    handles = [module.register_forward_hook(partial(forward, name)) for name, module in layers(model, exclude).items()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for batch in batches:
        current[:] = [batch]
        with torch.set_grad_enabled(loss is not None):
            output = batch.call(model)
            if loss is not None:
                loss(output, batch).backward()
    for handle in handles:
        handle.remove()
    return found


def plain(W: Tensor, _: Statistics) -> Callable[[int], Tensor]:
    """Truncated SVD, as Greenformer and ShRank have it."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return lambda rank: (U[:, :rank] * S[:rank]) @ V[:rank]


def asvd(W: Tensor, seen: Statistics) -> Callable[[int], Tensor]:
    """Columns scaled by the square root of their inputs' mean magnitude (Yuan et al., 2023)."""
    if isinstance(seen.outputs, Tensor):
        return whitened(W, seen)  # published for linear layers only; the best that a convolution can have
    scale = (seen.magnitude.double() / seen.tokens).sqrt() + 1e-6
    scaled = plain(W * scale, seen)
    return lambda rank: scaled(rank) / scale


def whitened(W: Tensor, seen: Statistics) -> Callable[[int], Tensor]:
    """The least error of the outputs on the calibration data (SVD-LLM, Wang et al., 2024)."""
    if isinstance(seen.outputs, Tensor):
        U = _leading(seen.outputs.double())
        return lambda rank: U[:, :rank] @ (U[:, :rank].T @ W)
    root, inverse = _roots(seen.inputs.double() / seen.tokens)
    scaled = plain(W @ root, seen)
    return lambda rank: scaled(rank) @ inverse


def kfac(W: Tensor, seen: Statistics) -> Callable[[int], Tensor]:
    """The least change of the loss, inputs and gradients taken as independent (K-FAC SVD, as in LEMS, 2026)."""
    if isinstance(seen.outputs, Tensor):
        return whitened(W, seen)
    right, right_inverse = _roots(_shrunk(seen.inputs.double() / seen.tokens, _COLUMN_SHRINKAGE))
    left, left_inverse = _roots(_shrunk(seen.gradients.double() / seen.tokens, _ROW_SHRINKAGE))
    scaled = plain(left @ W @ right, seen)
    return lambda rank: left_inverse @ scaled(rank) @ right_inverse


@torch.no_grad()
def split(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up (N, R) with orthonormal columns and down (R, K), whose product is a matrix of this rank."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank, None] * V[:rank]


METHODS = {"plain SVD": plain, "ASVD": asvd, "SVD-LLM": whitened, "K-FAC": kfac}


@torch.no_grad()
def approximations(
    model: nn.Module, method: str, seen: dict[str, Statistics], exclude: Iterable[str]
) -> dict[str, Callable[[int], Tensor]]:
    """Per layer, from a rank to the weight of that rank."""
    return {name: METHODS[method](matrix(module), seen[name]) for name, module in layers(model, exclude).items()}


@torch.no_grad()
def compressed(model: nn.Module, found: dict[str, Callable[[int], Tensor]], keep: float) -> nn.Module:
    """A copy with approximated weights, still dense modules: what they compute is what the factors would."""
    model = copy.deepcopy(model)
    for name, approximate in found.items():
        weight = model.get_submodule(name).weight
        N, K = weight.flatten(1).shape
        rank = max(1, int(keep * N * K / (N + K)))
        weight.copy_(approximate(rank).view(weight.shape))
    return model


def _leading(moment: Tensor) -> Tensor:
    """Eigenvectors, those of the largest eigenvalues first."""
    return torch.linalg.eigh(moment)[1].flip(1)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = (values + _DAMPING * moment.diagonal().max()).clamp_min(1e-30).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _shrunk(moment: Tensor, share: float) -> Tensor:
    return torch.lerp(moment, torch.eye(len(moment)).double() * moment.trace() / len(moment), share)
