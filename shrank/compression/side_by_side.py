"""The blocks of the dense model beside those of the one that is compressed, each pair run on what it is called with."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..calibration.batches import Batch, bound
from ..calibration.streams import Masking
from ..model.blocks import blocks_of
from ..model.survey import Site, Survey
from .anchored_options import Anchored
from .refine import Example, Refined, example_of, refined
from .relay import CannotRunAlone, Links, Relay, first_reason


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
        return first_reason(lambda: self.links.require_alone(block, self._there))[0]

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
        numbers = self.links.numbers(block)
        self._masking.prepare(self.batches[number] for number in numbers)
        return refined(self._survey, block, sites, numbers, partial(self._example, block), how)

    @torch.no_grad()
    def _example(self, block: str, number: int) -> Example:
        arguments, output = self._here.arguments(block, number), self._there.run(block, number)
        self._masking.begin(self.batches[number])
        return example_of(arguments, output, self._masking.call(block))
