"""The blocks of the dense model beside those of the one that is compressed, each pair run on what it is called with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ..calibration.batches import Batch, bound
from ..calibration.streams import Masking
from ..model.adapters import target
from ..model.blocks import blocks_of
from ..model.survey import Site, Survey
from ..util.processes import current
from .anchored_options import Anchored
from .refine import Example, Refined, main_of, refine
from .relay import CannotRunAlone, Links, Relay
from .schedule import split

T = TypeVar("T")


class SideBySide:
    """The dense model and the one that is compressed, and the data on its way through both.

    Args:
        survey: Of the model that is compressed, which is dense yet.
        batches: The data.

    Attributes:
        dense: A copy of the dense model.
        batches: The data, bound to that.
        blocks: The block of every layer.
        links: To be `observed` while the dense model runs, before anything else.
    """

    def __init__(self, survey: Survey, batches: list[Batch]) -> None:
        self._survey, self.dense = survey, copy.deepcopy(survey.model)
        self.batches = [replace(batch, number=number) for number, batch in enumerate(bound(batches, self.dense))]
        self.blocks = blocks_of(survey.model)
        names = list(dict.fromkeys(self.blocks.values()))
        self.links = Links(self.dense, names)
        self._there = Relay(lambda: self.dense, self.links, self.batches)
        self._here = Relay(lambda: survey.model, self.links, self.batches)
        self._masking = Masking(self.dense, {name: self.dense.get_submodule(name) for name in names})

    def why_not_alone(self, block: str) -> str:
        """Why a block cannot be run by itself; "" if it can."""
        return _first_reason(lambda: self.links.require_alone(block, self._there))[0]

    def run(self, block: str, batch: Batch, model: nn.Module) -> object:
        """What the block returns in this batch, in either model; all of the model's run where that calls it no more as
        the dense one does."""
        try:
            return (self._there if model is self.dense else self._here).run(block, batch.number)
        except CannotRunAlone:
            return batch.call(model)

    def changed(self, block: str | None) -> None:
        """Forget what depends on this block, or on any, in the compressed model; and what nobody will ask for."""
        self._there.changed(block)
        self._here.changed(block)

    def refined(self, block: str, sites: list[Site], how: Anchored) -> Refined | str:
        """What training made of a block whose layers at these sites were replaced; or why it was not trained."""
        numbers = sorted(number for part in current().exchange(self.links.numbers(block)) for number in part)
        if len(numbers) < 2:
            return "fewer than two batches call it, and one is held out"
        reason, examples = _first_reason(lambda: self._examples(block))
        if reason:
            return reason
        train, held = ([examples[n] for n in part if n in examples] for part in split(numbers))
        return refine(self._survey, block, sites, train, held, how)

    @torch.no_grad()
    def _examples(self, block: str) -> dict[int, Example]:
        """Of the batches that this process runs, by number."""
        self._masking.prepare(self.batches[number] for number in self.links.numbers(block))
        adapter, found = target(self.dense.get_submodule(block)), {}
        for number in self.links.numbers(block):
            arguments, output = self._here.arguments(block, number), main_of(self._there.run(block, number))
            rows = output if adapter is None else adapter.tokens(output)
            self._masking.begin(self.batches[number])
            example = Example(arguments, adapter, self._masking.call(block)(tuple(rows.shape[:-1])), output)
            found[number] = replace(example, wanted=example.rows_of(output))
        return found


def _first_reason(attempt: Callable[[], T]) -> tuple[str, T | None]:
    """Why an attempt cannot succeed in one of the processes, "" if it does in all; and what came of it here."""
    reason, result = "", None
    try:
        result = attempt()
    except CannotRunAlone as error:
        reason = str(error)
    return next(filter(None, current().exchange(reason)), ""), result
