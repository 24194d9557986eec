"""Passes over the data: what layers are called with, and their moments, in files that are made once."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..model.hooks import hooked, in_eval_mode
from ..model.survey import Site
from ..util.files import write_text
from ..util.processes import current
from ..util.progress import track
from .activation_files import saved_on_disk
from .batches import Batch
from .losses import Sensitivity
from .moment_files import write_moments
from .observer import Accumulator
from .request import Calibrate
from .sharing import LayerCalls, Sides, observe_calls, plan_passes
from .streams import Masking, warn_of_masks_that_fit_nothing

LEAST_MEMORY = 64 << 20  # bytes for moments that are always held at a time


def moment_files(
    folder: Path,
    sites: list[Site],
    calls: LayerCalls,
    batches: list[Batch],
    masking: Masking,
    loss: Sensitivity | None,
    request: Calibrate,
    sides: Sides,
) -> list[Path]:
    """The files with the moments of these layers, one for every pass over the data; those that are there already are
    not made again."""
    max_memory = request.max_memory
    if max_memory is None:
        max_memory = max(2 * sum(p.numel() for p in masking.model.parameters()), LEAST_MEMORY)
    passes = plan_passes(sites, calls, loss is not None, max_memory, sides)
    side = ["inputs"] if sides.inputs is True else sorted(sides.inputs or ())
    side += ["told apart", *sorted(sides.told_apart)] if sides.told_apart else []
    side += ["channels", *sorted(sides.channels)] if sides.channels else []
    files = [
        folder / f"{_digest([*side, *([site.fqn for site in group.sites] for group in groups)])}.safetensors"
        for groups in passes
    ]
    for number, (file, groups) in enumerate(zip(files, passes, strict=True), 1):
        if not all(current().exchange(file.exists())):
            masking.prepare(current().share(batches))
            accumulator = Accumulator(groups, loss is not None, masking)
            run_pass(accumulator, batches, loss, request, f"calibrating, pass {number} of {len(passes)}")
            accumulator.add_up()
            write_moments(file, accumulator)
    return files


def layer_calls(
    folder: Path, model: nn.Module, sites: list[Site], batches: list[Batch], masking: Masking, others: list[Site]
) -> LayerCalls:
    """What the layers are called with, from the folder if it is there."""
    file = folder / f"{_digest([site.fqn for site in sites])}.json"
    if all(current().exchange(file.exists())):
        return LayerCalls(**json.loads(file.read_text()))
    seen = observe_calls(model, sites, batches, masking, others)
    warn_of_masks_that_fit_nothing(batches)
    write_text(file, json.dumps(asdict(seen)))
    return seen


def run_pass(
    accumulator: Accumulator,
    batches: list[Batch],
    loss: Sensitivity | None,
    request: Calibrate,
    progress: str,
) -> None:
    """One pass over the data, through the model of the accumulator's masks."""
    model = accumulator.masking.model
    with in_eval_mode(model), hooked(accumulator.hooks()):
        for number, batch in track(current().share(enumerate(batches)), progress):
            accumulator.masking.begin(batch)
            with saved_on_disk(model) if request.spill and loss else nullcontext():
                output = batch.call(model)
                if loss:
                    generator = torch.Generator().manual_seed(request.seed * 1_000_003 + number)
                    accumulator.samples += loss.backward(output, batch, generator)
            del output  # the next forward pass needs the room
            accumulator.check(number)


def _digest(names: list) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
