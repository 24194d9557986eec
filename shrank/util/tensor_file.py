"""Tensors with metadata in one safetensors file, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing


def write(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors that own their memory, and strings, to one file, atomically; OSError if that
    fails, as on a full disk."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_table(path: str | os.PathLike) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the metadata, of any safetensors file; ValueError if it is damaged or is none."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
            return shapes, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({_looks_like(path)}{error})") from error


def not_of_bytes(path: str | os.PathLike, names: Iterable[str]) -> list[str]:
    """Those of these tensors, of any safetensors file, that are not whole numbers of 8 bits."""
    with safe_open(path, framework="pt") as file:
        return [name for name in names if file.get_slice(name).get_dtype() not in ("I8", "U8")]


def has_metadata(path: str | os.PathLike, key: str) -> bool:
    """Whether this is a safetensors file that says something under this key."""
    try:
        with safe_open(path, framework="pt") as file:
            return key in (file.metadata() or {})
    except SafetensorError:
        return False


def read(path: str | os.PathLike, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _looks_like(path: str | os.PathLike) -> str:
    with Path(path).open("rb") as file:
        start = file.read(2)
    return "it looks like a pickle, which shrank never reads: " if start in (b"PK", b"\x80\x02", b"\x80\x04") else ""
