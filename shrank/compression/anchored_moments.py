"""What layers see in a model that is compressed before them, beside what they see in the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..calibration.observer import Observed, add_up
from ..calibration.sharing import Group
from ..calibration.streams import Masking
from ..linalg import Columns, Kept, Metric, Moments
from ..model.hooks import hooked, in_eval_mode, input_of
from ..util.processes import current

Runner = Callable[[Batch, nn.Module], object]  # what runs a batch


class AnchoredMetrics(MetricSource):
    """A calibration, of whose layers those of one block see something else now."""

    def __init__(self, calibration: Calibration, moments: dict[str, Moments] | Calibration) -> None:
        self._calibration, self._moments = calibration, moments

    def metric(self, fqn: str, matrices: Tensor, centred: bool, kept: Kept | None = None) -> Metric | None:
        return self._calibration.metric(fqn, matrices, centred, self._seen(fqn), kept)

    def columns(self, fqn: str, matrices: Tensor, centred: bool) -> Columns | None:
        return self._calibration.columns(fqn, matrices, centred, self._seen(fqn))

    def _seen(self, fqn: str) -> Moments | None:
        seen_now = fqn in self._moments
        return self._moments[fqn] if seen_now else None


class _Pair:
    """Layers of one input in the model that is compressed so far, where they are still dense, beside what they see in
    the dense model."""

    def __init__(self, group: Group, share: float) -> None:
        self.here = Observed(group.sites[0], None, group, gradients=False)
        self.names, self.share = [site.fqn for site in group.sites], share
        self.expected: list[Tensor] = []  # what they see in the dense model, call by call of one batch
        self.alike, self.anchor, self.sum = True, self.here.moment(group.of_inputs), None

    def note(self, masking: Masking, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        mask = masking.call(self.here.site.fqn)
        self.expected.append(self.here.rows_of(input_of(args, kwargs), output, mask))

    def see(self, masking: Masking, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x, mask = input_of(args, kwargs), masking.call(self.here.site.fqn)
        rows = self.here.rows_of(x, output, mask)
        wanted = self.expected.pop(0) if self.expected else None
        if wanted is None or wanted.shape != rows.shape:
            self.alike = False  # as where a router sends it other tokens than in the dense model
            return
        if not rows.shape[1]:
            return
        wanted = torch.lerp(rows, wanted, self.share)
        self.here.observe(x, output, mask)
        self.anchor.add(rows, wanted)
        total = wanted.sum(1).double()
        self.sum = total if self.sum is None else self.sum + total

    def add_up(self) -> None:
        """As of its moments, which were added up already."""
        if self.anchor.rows:
            none = self.anchor.take_mean().sum(-1).double().zero_()
            self.sum = current().summed(none if self.sum is None else self.sum)

    def moments(self) -> Moments:
        return replace(
            self.here.moments(0), anchor=self.anchor.take_mean(), anchor_mean=(self.sum / self.anchor.rows).float()
        )


def _add_up(pairs: list[_Pair]) -> None:
    """Make what the `current` processes saw, each of a share of the data, one."""
    here = current()
    for pair, *alike in zip(pairs, *here.exchange([pair.alike for pair in pairs]), strict=True):
        pair.alike = all(alike)
    alike = [pair for pair in pairs if pair.alike]
    add_up((pair.here for pair in alike), (pair.anchor for pair in alike))
    for pair in alike if here.size > 1 else ():
        pair.add_up()


class _Enough(Exception):
    """Ends a run in which nothing is left to see."""


@torch.no_grad()
def observed(
    model: nn.Module,
    masking: Masking,
    groups: list[Group],
    batches: list[Batch],
    calls: dict[str, list[int]],
    share: float,
    runner: Runner = Batch.call,
) -> dict[str, Moments]:
    """The moments of the layers in these groups at what they see in a model that is compressed before them, by name;
    not of those whose calls in the two models do not correspond.

    masking: of the dense model. calls: of every layer, by batch.
    """
    pairs, here = [_Pair(group, share) for group in groups], current()
    # Where the data decides how often a layer runs, it may run more often behind compressed layers: look to the end.
    steady = len(batches) > 1 and all(len(set(calls[pair.here.site.fqn])) == 1 for pair in pairs)
    with in_eval_mode(model, masking.model):
        for number, batch in here.share(enumerate(batches)):
            if enough := sum(calls[pair.here.site.fqn][number] for pair in pairs):
                for where, look, end, call in (
                    (masking.model, _Pair.note, enough, runner),
                    (model, _Pair.see, enough if steady else None, runner if steady else Batch.call),
                ):
                    masking.begin(batch)
                    hooks = {p.here.site.fqn: partial(look, p, masking) for p in pairs}
                    _run(where, partial(call, batch), hooks, end)
                for pair in pairs:
                    pair.alike &= not pair.expected
                    pair.expected.clear()
    _add_up(pairs)
    if unlike := [name for pair in pairs for name in pair.names if not (pair.alike and pair.anchor.rows)]:
        warnings.warn(f"not anchored, as the dense model calls them otherwise: {', '.join(unlike)}", stacklevel=5)
    return {name: pair.moments() for pair in pairs for name in pair.names if name not in unlike}


def _run(model: nn.Module, call: Callable[[nn.Module], object], hooks: dict[str, Callable], enough: int | None) -> None:
    """Run a model until these hooks, by the names of layers, were called `enough` times, None: to its end."""
    calls = 0

    def counted(hook: Callable, *seen: object) -> None:
        nonlocal calls
        hook(*seen)
        calls += 1
        if calls == enough:
            raise _Enough

    with suppress(_Enough), hooked((model.get_submodule(fqn), partial(counted, h)) for fqn, h in hooks.items()):
        call(model)
