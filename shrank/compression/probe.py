"""What compressing one layer alone really does to a model's outputs, beside what gradients say.

Gradients know of small errors. Each layer's error is scaled so that it is right at one rank (LEMS, 2026, scales curves
by measured divergences too).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, as_batches, bound
from ..calibration.calibration import Calibration
from ..calibration.losses import as_logits, divergences, main_output
from ..calibration.request import Calibrate
from ..model.hooks import hooked, in_eval_mode
from ..model.survey import Survey
from ..planning.losses import worth
from ..planning.make_plan import plan_of
from ..planning.options import PlanOptions
from ..planning.rank import Fraction
from ..planning.spectra import Spectra
from ..util.processes import current
from ..util.progress import track
from .resolve import resolve
from .twins import twins

# all-MiniLM-L6-v2, probed with 2 of 8 batches: a cosine of 0.984 and 0.932 at keep 0.8 and 0.6, against 0.983 and 0.926
# without.
_KEEP, _BATCHES = 0.6, 2


def require_probe(how: Calibrate) -> None:
    """ValueError where there is nothing that a probe could measure."""
    if how.loss not in _DISTANCES:
        raise ValueError(f"probe: measures what {', '.join(map(repr, _DISTANCES))} are about, and loss={how.loss!r}")


@torch.inference_mode(False)
@torch.no_grad()
def probed(survey: Survey, calibration: Calibration, how: Calibrate) -> dict[str, float]:
    """What the error of each layer is worth over what gradients say, by name, of all layers together 1."""
    model, distance = survey.model, _DISTANCES[how.loss]
    data = bound(as_batches(how.data), model)
    data = current().share(data[:: -(-len(data) // _BATCHES)])
    options = PlanOptions(errors=False, pivot=False, include=lambda module, fqn: fqn in calibration, allow_slower=True)
    jobs = resolve(survey, plan_of(survey, Fraction(_KEEP), Spectra(None), options))
    ratios: dict[str, float] = {}
    with in_eval_mode(model):
        wanted = [main_output(batch.call(model)) for batch in data]
        for site, layer, twin in track(twins(jobs, calibration), "probing", total=len(jobs)):
            if twin is None:
                continue
            squares = Spectra(calibration).of(site, layer.shape).square()
            expected = squares[:, layer.rank // layer.shape.down_groups :].sum().item()
            with hooked([(site.module, _instead(twin.eval()))]):
                found = [distance(main_output(b.call(model)), y, b) for b, y in zip(data, wanted, strict=True)]
            measured = sum(current().exchange(sum(found)))
            if expected > 0 and 0 < measured < math.inf:
                ratios[site.fqn] = measured / (expected * worth(calibration.tokens(site.fqn)))
    mean = math.exp(sum(map(math.log, ratios.values())) / max(len(ratios), 1))
    return {name: ratio / mean for name, ratio in ratios.items()}


def _instead(twin: nn.Module) -> Callable[..., object]:
    return lambda module, args, kwargs, output: twin(*args, **kwargs)


def _rows(y: Tensor, batch: Batch) -> Tensor:
    counts, rows = batch.mask_for(tuple(y.shape[:-1])), y.float().reshape(-1, y.shape[-1])
    return rows if counts is None else rows[counts.to(rows.device)]


def _squares(y: Tensor, wanted: Tensor, batch: Batch) -> float:
    return (_rows(y, batch) - _rows(wanted, batch)).square().sum().item()


def _divergence(y: Tensor, wanted: Tensor, batch: Batch) -> float:
    return divergences(as_logits(_rows(y, batch)), as_logits(_rows(wanted, batch))).sum().item()


_DISTANCES = {"output": _squares, "kl": _divergence, "lm": _divergence}
