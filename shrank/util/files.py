"""Writing files and folders so that readers see the old one or the new one, never half of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there takes its place, or vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / path.name
        yield new
        _set_default_mode(new)
        if not path.is_dir():
            os.replace(new, path)
            return
        old = path.rename(Path(folder) / "old")
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _set_default_mode(path: Path) -> None:
    """Give written files the mode of any new file: safetensors creates its files readable to their owner alone."""
    probe = path.parent / "mode"
    probe.touch()
    mode = probe.stat().st_mode
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode)


def size_on_disk(path: str | os.PathLike) -> int:
    """Bytes in a file, or in all files of a folder."""
    path = Path(path)
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def is_empty_or_absent(path: str | os.PathLike) -> bool:
    path = Path(path)
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
