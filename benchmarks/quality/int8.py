"""What int8 weights cost beside low rank, on all-MiniLM-L6-v2: benchmarks/results/int8_minilm.json.

python -m benchmarks.quality.int8
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import shrank
from benchmarks.provenance import provenance
from benchmarks.quality.tasks import MiniLM

RESULT = Path(__file__).parents[1] / "results" / "int8_minilm.json"
KEEPS = (0.9, 0.8, 0.6)
BYTES_OF = {"bfloat16": 2, "int8": 1}


def in_int8(model: nn.Module) -> nn.Module:
    """A copy whose encoder has int8 weights, one scale for each row."""
    model = copy.deepcopy(model)
    quantize_(model.encoder, Int8WeightOnlyConfig())
    return model


@torch.no_grad()
def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy whose encoder has weights rounded to bfloat16; it computes in float32, as that with int8 does."""
    model = copy.deepcopy(model)
    for parameter in model.encoder.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


FORMS = {"bfloat16": in_bfloat16, "int8": in_int8}


def main() -> None:
    task = MiniLM()
    dense = task.model()
    found = shrank.calibrate(dense, task.batches())
    rows = []

    def measure(model: nn.Module, keep: float, storage: str) -> None:
        for dtype, of_model in FORMS.items():
            rows.append(
                {
                    "keep": keep,
                    "storage": storage,
                    "dtype": dtype,
                    **task.evaluate(of_model(model)),
                    "bytes, of bfloat16 dense": keep * BYTES_OF[dtype] / 2,
                }
            )
            print(rows[-1])

    measure(dense, 1.0, "dense")
    for keep in KEEPS:
        for storage, pivot in (("pivoted", "auto"), ("plain", False)):
            small = shrank.auto_fact(dense, keep, calibrate=found, exclude="pooler*", pivot=pivot, deepcopy=True)
            measure(small, keep, storage)
    RESULT.write_text(json.dumps({**provenance("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
