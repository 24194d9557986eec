"""The weights of a dense model by the names of its layers: of a model, of a state dict, or of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..model.adapters import Target, target
from ..util import tensor_file

Dense = nn.Module | Mapping[str, Tensor] | str | os.PathLike


@dataclass(frozen=True)
class DenseWeight:
    """The weight of a linear layer: its shape (N, K), and what reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class DenseWeights:
    """Where the weights of layers are, read one at a time.

    prefix: that names of layers may have more or less here, as the name of a base model in one with a head.

    Raises:
        TypeError: It is nothing that has weights.
        ValueError: It is a folder without safetensors, or a damaged file.
    """

    def __init__(self, source: Dense, prefix: str = "") -> None:
        self._prefix = f"{prefix}." if prefix else ""
        if isinstance(source, nn.Module):
            self._held = dict(_of_model(source))
        elif isinstance(source, Mapping):
            self._held = _by_layers({k: DenseWeight(tuple(v.shape), v.detach) for k, v in source.items()})
        elif isinstance(source, str | os.PathLike):
            self._held = _by_layers({name: one for file in _files(Path(source)) for name, one in _of_file(file)})
        else:
            raise TypeError(f"dense weights are a model, a state dict or a safetensors folder, got {source!r:.80}")

    def of(self, fqn: str) -> DenseWeight | None:
        """The weight of this layer; None if there is none of its name."""
        names = (fqn, self._prefix + fqn, fqn.removeprefix(self._prefix))
        return next((self._held[name] for name in names if name in self._held), None)


def _of_model(model: nn.Module) -> Iterator[tuple[str, DenseWeight]]:
    for name, module in model.named_modules():
        adapter = target(module, vouched=True)
        if adapter is not None and adapter.takes_vectors:
            shape = adapter.shape()
            yield name, DenseWeight((shape.out_features, shape.in_features), partial(_matrix, adapter))


def _matrix(adapter: Target) -> Tensor:
    return adapter.matrices(adapter.shape())[0]


def _by_layers(weights: dict[str, DenseWeight]) -> dict[str, DenseWeight]:
    return {name.rpartition(".")[0]: one for name, one in weights.items() if name.rpartition(".")[2] == "weight"}


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ValueError(f"{path}: no safetensors here")
    return found


def _of_file(file: Path) -> Iterator[tuple[str, DenseWeight]]:
    for name, shape in tensor_file.read_table(file)[0].items():
        yield name, DenseWeight(shape, partial(_read, file, name))


def _read(file: Path, name: str) -> Tensor:
    return tensor_file.read(file, [name])[name]
