"""Times every layer of a model, dense and low-rank, at the inputs it gets: what a budget of time needs to know."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..linalg import Factors, PivotedFactors, Shape
from ..model.adapters import Target, with_groups
from ..model.survey import Site, Survey
from ..planning.latency import LatencyTable
from ..util.progress import track
from .timing import time_in_turns

_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the largest rank, at which a layer is timed


@torch.inference_mode()
def measure_layers(model: nn.Module, call: Callable[[], object], rounds: int = 7) -> LatencyTable:
    """Seconds of every layer that could be replaced, for the input it gets in `call()`, which runs the model once.

    Dense and low-rank versions run in turns; layers that are alike are timed once. Raises ValueError if no layer runs.
    """
    sites = {site.fqn: site for site in Survey(model).sites() if not site.why_not()}
    inputs = _inputs(sites, call)
    if not inputs:
        raise ValueError("the call reaches no layer that could be replaced")
    known: dict[tuple, dict] = {}
    layers = {}
    for fqn, x in track(inputs.items(), "timing layers", total=len(inputs)):
        site, module = sites[fqn], sites[fqn].module
        key = (repr(module), tuple(x.shape), x.stride(), x.dtype, str(x.device))
        if key not in known:
            known[key] = _times(site.adapter, x, rounds)
        layers[fqn] = known[key]
    device = next(iter(inputs.values())).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return LatencyTable(
        layers,
        {
            "device": name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
        },
    )


def _inputs(sites: dict[str, Site], call: Callable[[], object]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(fqn: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.setdefault(fqn, args[0] if args else kwargs["input"])

    handles = [
        site.module.register_forward_pre_hook(partial(note, fqn), with_kwargs=True) for fqn, site in sites.items()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _times(found: Target, x: Tensor, rounds: int) -> dict:
    shape = found.shape()
    multiple = 8 * shape.groups if shape.max_rank >= 128 * shape.groups else shape.groups
    ranks = sorted({max(int(share * shape.max_rank) // multiple, 1) * multiple for share in _SHARES})
    twins: dict[str, nn.Module] = {"dense": found.module}
    for rank in ranks:
        plain = with_groups(shape, rank, groups_out=False)
        pivoted = replace(plain, pivoted=True)
        twins[f"plain {rank}"] = _twin(found, rank, plain)
        if plain.down_groups == plain.up_groups and rank < shape.out_features:
            twins[f"pivoted {rank}"] = _twin(found, rank, pivoted)
    timings = time_in_turns({name: [partial(twin, x)] for name, twin in twins.items()}, x.device.type, rounds)
    entry: dict = {"dense": timings["dense"].seconds, "plain": {}, "pivoted": {}}
    for name, timing in timings.items():
        kind, _, rank = name.partition(" ")
        if rank:
            entry[kind][rank] = timing.seconds
    return entry


def _twin(found: Target, rank: int, shape: Shape) -> nn.Module:
    """A twin with random factors."""
    weight, G = found.module.weight, shape.down_groups
    draw = partial(torch.randn, dtype=weight.dtype, device=weight.device)
    down = draw(G, rank // G, shape.in_features // G)
    rows = shape.out_features // shape.up_blocks
    factors = Factors(down, draw(G, rows, rank // G), 0.0, 1.0)
    if shape.pivoted:
        order = torch.arange(shape.out_features, dtype=torch.int32, device=weight.device)
        factors = PivotedFactors(down, draw(G, (shape.out_features - rank) // G, rank // G), order, 1.0)
    twin = found.twin(rank, shape)
    twin.take(factors, found.module.bias)
    return twin.eval()
