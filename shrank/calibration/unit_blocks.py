"""Which blocks of units a model has: found in what autograd notes of a run, and tried before they are believed.

A block's layers are those that autograd finds behind the input of a layer, and nothing else that learns except modules
that treat every unit by itself. Where it does not follow from their sizes which columns belong to a unit, as with
heads, the model is run with other values of the first unit, and of the last. Whether the units meet one by one, and go
nowhere else, is seen by running the model: other values of half of the units must change nothing where the consumer
does not look at them, and a model without these units must do what the one with them does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..model.carriers import is_shared, units_carried
from ..model.hooks import all_trainable, in_eval_mode, without_caches
from ..model.refusals import why_not_shape
from ..model.survey import Site, Survey
from ..model.unit_blocks import UnitBlock
from ..util.files import write_text
from ..util.processes import current
from .batches import Batch
from .unit_candidates import behind_inputs, candidates
from .unit_trial import Trial


def blocks_in(folder: Path, survey: Survey, batches: list[Batch]) -> list[UnitBlock]:
    """As `unit_blocks_in` of the first batch, from the folder if they are there."""
    file, here = folder / "blocks.json", current()
    if not all(here.exchange(file.exists())):
        blocks = unit_blocks_in(survey, batches[0]) if batches else []
        here.agree("a model with the same blocks", blocks)
        write_text(file, json.dumps([asdict(block) for block in blocks]))
    lists = ("producers", "rows", "carriers")
    found = json.loads(file.read_text())
    return [UnitBlock(**{**block, **{name: tuple(block[name]) for name in lists}}) for block in found]


def unit_blocks_in(survey: Survey, batch: Batch) -> list[UnitBlock]:
    """The blocks that a batch, bound to the model, runs through, in the order of execution; those that cannot be
    narrowed with the reason. Runs the model nine times, and more where something only looks like a block."""
    model, sites = survey.model, {site.fqn: site for site in survey.sites() if site.adapter}
    between = {
        fqn: module
        for fqn, module in model.named_modules()
        if (_may_carry(sites[fqn]) if fqn in sites else units_carried(module) is not None or is_shared(module))
    }
    layers = {fqn: site.module for fqn, site in sites.items() if fqn not in between}
    with in_eval_mode(model), without_caches(model):
        with torch.enable_grad(), all_trainable(model):
            behind = behind_inputs(model, layers | between, batch)
        with torch.no_grad():
            trial = Trial(model, layers, between, batch)
            return _believed(candidates(layers, between, behind, trial), trial)


def _may_carry(site: Site) -> bool:
    """Whether a layer is a depthwise convolution that nothing but its shape keeps from becoming low-rank."""
    return units_carried(site.module) is not None and site.why_not() == why_not_shape(site.shape)


def _believed(found: list[UnitBlock], trial: Trial) -> list[UnitBlock]:
    """What stands the trial, and what does not with the reason; every layer in one block, the one of most weights."""
    order = {block.consumer: number for number, block in enumerate(found)}
    left, good, bad = sorted(found, key=lambda block: -trial.weights(block)), [], []
    while left:
        tried = _without_common_layers(left)
        for block in _tried([block for block in tried if not block.reason], trial):
            (bad if block.reason else good).append(block)
        bad += [block for block in tried if block.reason]
        taken = {layer for block in good for layer in block.layers}
        left = [block for block in left if block not in tried and taken.isdisjoint(block.layers)]
    bad = [block for block in _without_common_layers(bad) if taken.isdisjoint(block.layers)] if found else []
    return sorted(good + bad, key=lambda block: order[block.consumer])


def _without_common_layers(blocks: Iterable[UnitBlock]) -> list[UnitBlock]:
    """Every layer in one block, the first."""
    kept, taken = [], set()
    for block in blocks:
        if taken.isdisjoint(block.layers):
            kept.append(block)
            taken.update(block.layers)
    return kept


def _tried(blocks: list[UnitBlock], trial: Trial) -> list[UnitBlock]:
    """The blocks, all at once if that goes well, else those with like names in like modules together; with the
    reason where not."""
    if not blocks or not trial.complaint(blocks):
        return blocks
    groups: dict[object, list[UnitBlock]] = {}
    for block in blocks:
        kind = type(trial.model.get_submodule(block.name))
        groups.setdefault((re.sub(r"\d+", "*", block.consumer), kind, block.units), []).append(block)
    reasons = {fqn: reason for group in groups.values() for fqn, reason in _reasons(group, trial).items()}
    return [replace(block, reason=reasons[block.consumer]) for block in blocks]


def _reasons(blocks: list[UnitBlock], trial: Trial) -> dict[str, str]:
    """What keeps each of these blocks, by its consumer, from being narrowed. They are alike, so that none is tried
    alone where the first and the last cannot be narrowed either."""
    reason = trial.complaint(blocks)
    if not reason or len(blocks) == 1 or all(trial.complaint([block]) for block in (blocks[0], blocks[-1])):
        return {block.consumer: reason for block in blocks}
    half = len(blocks) // 2
    return _reasons(blocks[:half], trial) | _reasons(blocks[half:], trial)
