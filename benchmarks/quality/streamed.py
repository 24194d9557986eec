"""SmolLM2-135M compressed from its files, beside what it becomes in memory.

python -m benchmarks.quality.streamed OUT [LAYERS]

OUT: a JSON file. LAYERS: a pattern of the layers that may change, all by default. 8 windows of 64 tokens; keep 0.8 by
the sensitivity of the outputs; layers fitted alone, and anchored. On one thread: on several, sums are not always
taken in one order.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import shrank
from benchmarks.data.models import smollm2
from benchmarks.data.texts import articles
from benchmarks.provenance import provenance
from benchmarks.quality.tasks import SmolLM2
from shrank.saving.transformers_folder import load_model

_WINDOWS, _TOKENS, _TEXTS = 8, 64, 4


def compared(source: Path, target: Path, layers: str, how: shrank.Calibrate, anchored: float) -> dict[str, object]:
    """What the two have in common, and the seconds that each took."""
    options = {"calibrate": how, "anchored": anchored, "include": layers}
    started = time.monotonic()
    there = shrank.auto_fact(load_model(str(source)), 0.8, **options)
    between = time.monotonic()
    plan = shrank.auto_fact(shrank.Checkpoint(source), 0.8, stream=target, **options).shrank_plan
    seconds = between - started, time.monotonic() - between
    here, expected = load_model(str(target)).state_dict(), there.state_dict()
    distances = {name: _distance(here[name], value) for name, value in expected.items()}
    with torch.inference_mode():
        logits = [model(**how.data[0]).logits for model in (there, load_model(str(target)))]
    return {
        "anchored": anchored,
        "same ranks": plan.diff(there.shrank_plan) == {},
        "tensors": len(expected),
        "same bits": sum(distance == 0 for distance in distances.values()),
        "largest relative distance": max(distances.values()),
        "relative distance of logits": _distance(logits[1], logits[0]),
        "seconds in memory": seconds[0],
        "seconds streamed": seconds[1],
    }


def _distance(here: torch.Tensor, there: torch.Tensor) -> float:
    return ((here.double() - there.double()).norm() / there.double().norm().clamp_min(1e-30)).item()


def main() -> None:
    torch.set_num_threads(1)
    layers = sys.argv[2] if len(sys.argv) > 2 else "*"
    ids = SmolLM2().tokenizer("\n\n".join(articles("calibration")[:40]), return_tensors="pt").input_ids[0]
    windows = ids[: _WINDOWS * _TOKENS].view(-1, _TEXTS, _TOKENS)
    how = shrank.Calibrate([{"input_ids": batch} for batch in windows])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dense")
        smollm2().save_pretrained(source)
        rows = [compared(source, Path(folder, f"small-{share}"), layers, how, share) for share in (0.0, 0.25)]
    found = {"about": provenance("cpu"), "layers": layers, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
