"""What twins do to the outputs of the layers they replace, on data that need not be the calibration's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.batches import as_batches, bound
from ..calibration.streams import Masking, MaskOfCall
from ..model.adapters import LOW_RANK, target
from ..model.hooks import hooked, in_eval_mode
from ..planning.plan import RankPlan
from ..util.names import checks_keywords
from ..util.progress import track


@checks_keywords
@torch.no_grad()
def measure_errors(plan: RankPlan, dense: nn.Module, small: nn.Module, data: Iterable[object]) -> RankPlan:
    """Measure the relative error of every low-rank layer's outputs, each alone at the dense layer's inputs.

    Args:
        plan: What was done, such as `small.shrank_plan`.
        dense: The model before.
        small: The model after.
        data: What `shrank.batches` made, or takes without further arguments; it need not be the calibration's.

    Returns:
        The plan with `measured` of every low-rank layer: the Frobenius norm of the error over that of the outputs,
        around their mean if the layer has a bias, where tokens count.

    Raises:
        ValueError: A layer of the plan is missing from either model.
    """
    twins, sums = {}, {}
    for layer in plan.low_rank:
        try:
            original, twin = dense.get_submodule(layer.fqn), small.get_submodule(layer.fqn)
        except AttributeError as error:
            raise ValueError(f"{layer.fqn!r} is not in both models: {error}") from error
        if target(original) is not None and isinstance(twin, LOW_RANK):
            twins[layer.fqn] = (original, twin)
            sums[layer.fqn] = _Sums(original.bias is not None)
    batches = bound(as_batches(data), dense)
    masking = Masking(dense, {fqn: original for fqn, (original, _) in twins.items()})
    hooks = [
        *masking.hooks(),
        *(
            (original, partial(_compare, twin, sums[fqn], partial(masking.call, fqn)))
            for fqn, (original, twin) in twins.items()
        ),
    ]
    masking.prepare(batches)
    with in_eval_mode(dense, small), hooked(hooks):
        for batch in track(batches, "measuring"):
            masking.begin(batch)
            batch.call(dense)
    seen = {fqn: found.relative for fqn, found in sums.items() if found.tokens}
    return replace(plan, layers=tuple(replace(x, measured=seen.get(x.fqn)) for x in plan))


class _Sums:
    """Energies of a layer's error and of its output: around the mean where a bias would give it, as in calibration."""

    def __init__(self, centred: bool) -> None:
        self.centred, self.tokens, self.error, self.energy, self.total = centred, 0, 0.0, 0.0, 0.0

    @property
    def relative(self) -> float:
        spread = self.energy - (self.total.square().sum().item() / self.tokens if self.centred else 0.0)
        return (self.error / spread) ** 0.5 if spread > 0 else 0.0


def _compare(
    twin: nn.Module,
    sums: _Sums,
    next_mask: Callable[[], MaskOfCall],
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    output: Tensor,
) -> None:
    y, answer = (target(module).tokens(t).float() for t in (output, twin(*args, **kwargs)))
    counts = next_mask()(tuple(y.shape[:-1]))
    y, answer = (t.flatten(0, -2) if counts is None else t.flatten(0, -2)[counts.to(t.device)] for t in (y, answer))
    sums.tokens += len(y)
    sums.error += (answer - y).square().sum().item()
    sums.energy += y.square().sum().item()
    sums.total = sums.total + y.double().sum(0)
