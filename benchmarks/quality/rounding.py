"""What rounding a budget's default result costs, pivoted and with plain factors: benchmarks/results/rounding_*.json.

python -m benchmarks.quality.rounding [minilm smollm2 crepe-full crepe-tiny] [--keep 0.8]

Both forms hold the same matrices. All rows compute in float32, with weights that were rounded.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import shrank
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import baselines
from benchmarks.quality.studies import STUDIES
from benchmarks.speed.turns import THREADS
from shrank import Budget

TASKS = ("minilm", "smollm2", "crepe-full", "crepe-tiny")
GROUP = 32  # inputs that share a scale in int4


def cast(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    return lambda model: model.to(dtype).float()


def on_stages(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """Both stages of every low-rank layer rounded, as matrices of a row for each output."""

    @torch.no_grad()
    def rounded(model: nn.Module) -> nn.Module:
        for layer in (m for m in model.modules() if isinstance(m, shrank.LED | shrank.CED)):
            for stage in (layer[0], layer[1]):
                stage.weight.copy_(rounding(stage.weight.flatten(1)).view_as(stage.weight))
        return model

    return rounded


def to_int8(W: Tensor) -> Tensor:
    """Symmetric, one scale for each row."""
    scale = W.abs().amax(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) / 127
    return (W / scale).round() * scale


def to_int4(W: Tensor) -> Tensor:
    """Symmetric, one scale for each group of inputs, or for a row that does not fall into such groups."""
    groups = W.unflatten(1, (-1, GROUP if W.shape[1] % GROUP == 0 else W.shape[1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


FORMS = {
    "float32": lambda model: model,
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "int8": on_stages(to_int8),
    "int4": on_stages(to_int4),
}


def rows(name: str, keep: float) -> Iterator[dict]:
    task = STUDIES[name].task()
    dense = task.model()
    found = shrank.calibrate(
        dense, task.batches(), loss=task.own_loss, layers=list(baselines.layers(dense, task.exclude))
    )
    pivoted = shrank.auto_fact(dense, Budget(keep_params=keep), calibrate=found)
    plain = shrank.unpivot(copy.deepcopy(pivoted))
    for dtype, rounded in FORMS.items():
        for storage, small in (("pivoted", pivoted), ("plain", plain)):
            yield {
                "keep": keep,
                "storage": storage,
                "dtype": dtype,
                **task.evaluate(rounded(copy.deepcopy(small))),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.tasks:
        results = {**provenance("cpu"), "rows": []}
        for row in rows(name, arguments.keep):
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
        (RESULTS / f"rounding_{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
