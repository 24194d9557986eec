"""What weights of 4 and 8 bits cost, alone and of factors, on all-MiniLM-L6-v2: results/few_bits_minilm.json.

python -m benchmarks.quality.few_bits
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

from torch import nn

import shrank
from benchmarks.provenance import provenance
from benchmarks.quality.tasks import MiniLM, Task

RESULT = Path(__file__).parents[1] / "results" / "few_bits_minilm.json"
KEEPS = (1.0, 0.9, 0.8)
GRIDS = ((8, None), (4, 32), (4, 64))
LINEARS = "encoder.*"


def models(task: Task, keep: float) -> nn.Module:
    """The model whose encoder keeps this share of its weights, in plain factors with ranks that all groups divide."""
    dense = task.model()
    if keep == 1:
        return dense
    data = shrank.Calibrate(task.batches(), inputs=True)
    return shrank.auto_fact(dense, keep, calibrate=data, include=LINEARS, pivot=False, round_to=64)


def row(task: Task, model: nn.Module, **how: object) -> dict[str, object]:
    plan = shrank.describe(model)
    small = sum(layer.bytes() for layer in plan)
    planned = {layer.fqn for layer in plan}
    others = [n for n in shrank.eligible(task.model(), include=LINEARS) if n not in planned]
    rest = sum(2 * model.get_submodule(name).weight.numel() for name in others)
    whole = sum(
        2 * task.model().get_submodule(n).weight.numel() for n in shrank.eligible(task.model(), include=LINEARS)
    )
    return {**how, **task.evaluate(model), "bytes, of bfloat16 dense": round((small + rest) / whole, 4)}


def main() -> None:
    task, rows = MiniLM(), []
    for keep in KEEPS:
        model = models(task, keep)
        rows.append(row(task, model, keep=keep, bits=None, group_size=None, rounding=""))
        print(rows[-1], flush=True)
        with tempfile.TemporaryDirectory() as cache:
            data = shrank.Calibrate(task.batches(), cache=cache)
            for bits, group_size in GRIDS:
                for rounding, seen in (("nearest", None), ("GPTQ", data)):
                    if bits == 8 and seen:
                        continue  # the nearest numbers lose 0.0005 at most
                    rounded = shrank.quantize_factors(
                        copy.deepcopy(model), bits, group_size, calibrate=seen, dense=True, include=LINEARS
                    )
                    rows.append(row(task, rounded, keep=keep, bits=bits, group_size=group_size, rounding=rounding))
                    print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({**provenance("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
