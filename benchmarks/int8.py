"""What int8 weights cost beside low rank, on all-MiniLM-L6-v2: benchmarks/results/int8_minilm.json.

    python -m benchmarks.int8
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import shrank
from benchmarks.provenance import provenance
from benchmarks.tasks import MiniLM

RESULT = Path(__file__).parent / "results" / "int8_minilm.json"
KEEPS = (0.9, 0.8, 0.6)
BYTES_OF = {"bfloat16": 2, "int8": 1}


def quantized(model: nn.Module) -> nn.Module:
    """A copy whose encoder has int8 weights, one scale for each row."""
    model = copy.deepcopy(model)
    quantize_(model.encoder, Int8WeightOnlyConfig())
    return model


def main() -> None:
    task = MiniLM()
    dense = task.model()
    found = shrank.calibrate(dense, task.batches())
    rows = [{"model": "dense", "keep": 1.0, "pivoted": False, "int8": True, **task.evaluate(quantized(dense))}]
    for keep in KEEPS:
        for pivot in ("auto", False):
            small = shrank.auto_fact(dense, keep, calibrate=found, exclude="pooler*", pivot=pivot, deepcopy=True)
            row = {"model": "shrank", "keep": keep, "pivoted": pivot == "auto"}
            rows.append({**row, "int8": False, **task.evaluate(small)})
            rows.append({**row, "int8": True, **task.evaluate(quantized(small))})
            print(*rows[-2:], sep="\n")
    for row in rows:
        row["bytes, of bfloat16 dense"] = row["keep"] * BYTES_OF["int8" if row["int8"] else "bfloat16"] / 2
    RESULT.write_text(json.dumps({**provenance("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
