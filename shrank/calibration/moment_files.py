"""The files that moments are kept in: one for every pass over the data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from ..linalg import Moments
from ..util import tensor_file
from ..util.processes import current
from .observer import Accumulator

FORMAT = 3


def write_moments(file: Path, accumulator: Accumulator) -> None:
    """Of processes on one disk the first writes, and the others link: their files live on when its are gone."""
    here = current()
    if here.is_first:
        _write(file, accumulator)
    written = here.exchange(file)[0]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(written, file)
        except OSError:  # on another machine, or another disk
            _write(file, accumulator)


def _write(file: Path, accumulator: Accumulator) -> None:
    """What was added up in one pass."""
    write_results(file, accumulator.results(), accumulator.reached)


def write_results(file: Path, results: Iterable[tuple[str, Moments, str]], reached: bool) -> None:
    """Write (name, moments, name of the layer whose data they are) of layers, and whether gradients came to any."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict] = {}
    for fqn, moments, inputs_of in results:
        names = {}
        for field in fields(Moments):
            if isinstance(value := getattr(moments, field.name), Tensor):
                # Layers with the same inputs share their tensors.
                names[field.name] = f"{fqn if field.name == 'gradient' else inputs_of}:{field.name}"
                tensors[names[field.name]] = value.float().cpu().contiguous()
        layers[fqn] = {
            "tokens": moments.tokens,
            "of_inputs": moments.of_inputs,
            "tensors": names,
            "gradient_samples": moments.gradient_samples,
        }
    header = {"format": FORMAT, "layers": layers, "reached": reached}
    tensor_file.write(file, tensors, {"moments": json.dumps(header)})
