"""What a run will write, and whether the disk has room for it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..calibration.batches import Batch
from ..model.survey import Site
from ..util import nested
from .cut import Cut


def require_room(folder: Path, needs: Mapping[str, int], there: int = 0) -> None:
    """OSError if the disk that a folder is on, or will be, has no room for so many bytes of each of these.

    there: bytes of them that were written before.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(place).free, sum(needs.values()) - there
    if free < wanted:
        parts = ", ".join(f"{_gigabytes(size)} for {what}" for what, size in needs.items() if size)
        before = f", of which {_gigabytes(there)} are there" if there else ""
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs about {_gigabytes(wanted)} more, its disk has {_gigabytes(free)} free ({parts}{before})",
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def expected(
    cut: Cut, batches: list[Batch], sites: Iterable[Site], kept: int, gradients: bool, inputs: bool
) -> dict[str, int]:
    """About how many bytes the sweeps write at most: of what `kept` blocks return, by what the first makes of the first
    batch, and of the moments of layers."""
    output = cut.through(batches[0], cut.next(batches[0]))
    returned = sum(tensor.nbytes for tensor in nested.tensors(output)) * sum(map(_size, batches)) // _size(batches[0])
    return {
        "what blocks return": kept * returned,
        "gradients": 2 * returned if gradients else 0,
        "moments": moments_of(sites, inputs),
    }


def moments_of(sites: Iterable[Site], inputs: bool) -> int:
    """About the bytes of the moments of layers, of data, by the inputs if these are asked for, and of gradients."""
    sides = [(s.shape.in_features, min(s.shape.in_features, s.shape.out_features), s.shape.groups) for s in sites]
    return sum(4 * ((most if inputs else least) ** 2 + least**2) // groups for most, least, groups in sides)


def _size(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in nested.tensors((batch.args, dict(batch.kwargs))))
