"""The files that moments are kept in: one for every pass over the data."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ..util import tensor_file
from .observer import Accumulator

FORMAT = 2


def write_moments(file: Path, accumulator: Accumulator) -> None:
    """What was added up in one pass."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict] = {}
    for fqn, moments, inputs_of in accumulator.results():
        fields = {
            "data": moments.data,
            "mean": moments.mean,
            "input_energy": moments.input_energy,
            "gradient": moments.gradient,
        }
        names = {}
        for field, value in fields.items():
            if value is not None:
                # Layers with the same inputs share their tensors.
                names[field] = f"{fqn if field == 'gradient' else inputs_of}:{field}"
                tensors[names[field]] = value.float().cpu().contiguous()
        layers[fqn] = {
            "tokens": moments.tokens,
            "of_inputs": moments.of_inputs,
            "tensors": names,
            "gradient_samples": moments.gradient_samples,
        }
    header = {"format": FORMAT, "layers": layers, "reached": accumulator.reached}
    tensor_file.write(file, tensors, {"moments": json.dumps(header)})
