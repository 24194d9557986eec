"""How plain and pivoted layers of as many weights train, and pivoted ones as the plain factors of their matrices:
benchmarks/results/trained_minilm.json.

python -m benchmarks.quality.trained [--keep 0.6] [--steps 48]

all-MiniLM-L6-v2, compressed by a budget, learns the dense model's outputs on calibration texts, 16 of at most 32 tokens
a step; what it is worth on the test's, null where it diverges. Every optimizer at rates up to where both break down.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import shrank
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import baselines
from benchmarks.quality.tasks import MiniLM
from benchmarks.speed.turns import THREADS
from shrank import Budget

RATES = {
    "SGD": (torch.optim.SGD, (1e-4, 3e-4, 1e-3, 3e-3)),
    "SGD, momentum": (partial(torch.optim.SGD, momentum=0.9), (1e-5, 3e-5, 1e-4, 3e-4)),
    "AdamW": (torch.optim.AdamW, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
}
TOKENS = 32


def rows(keep: float, steps: int) -> Iterator[dict]:
    """Of both forms before training, and of every optimizer and rate."""
    task = MiniLM()
    dense, names = task.model(), list(baselines.layers(task.model(), task.exclude))
    found = shrank.calibrate(dense, task.batches(), layers=names)
    lessons = [{name: x[:, :TOKENS] for name, x in batch.items()} for batch in task.healing_batches()]
    with torch.no_grad():
        goals = [dense(**lesson).last_hidden_state for lesson in lessons]
    plain, pivoted = (
        shrank.auto_fact(copy.deepcopy(dense), Budget(keep_params=keep), calibrate=found, include=names, pivot=pivot)
        for pivot in (False, True)
    )
    unpivoted = shrank.unpivot(copy.deepcopy(pivoted))
    for form, small in {"plain": plain, "pivoted": pivoted, "pivoted, as plain factors": unpivoted}.items():
        yield {"form": form, "optimizer": None, "rate": 0.0, **task.evaluate(small)}
        for optimizer, (make, rates) in RATES.items():
            for rate in rates:
                student = copy.deepcopy(small)
                trained = _trained(student, partial(make, lr=rate), lessons, goals, steps)
                cosine = task.evaluate(student)["cosine"] if trained else None
                yield {"form": form, "optimizer": optimizer, "rate": rate, "cosine": cosine}


def _trained(
    model: nn.Module, optimizer: Callable, lessons: list[dict[str, Tensor]], goals: list[Tensor], steps: int
) -> bool:
    """Train a model; whether its loss stays finite."""
    stepper = optimizer(model.parameters())
    for step in range(steps):
        lesson, goal = lessons[step % len(lessons)], goals[step % len(goals)]
        mask = lesson["attention_mask"][..., None]
        loss = ((model(**lesson).last_hidden_state - goal).square() * mask).sum() / mask.sum()
        if not math.isfinite(loss):
            return False
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = {**provenance("cpu"), "keep": arguments.keep, "steps": arguments.steps, "rows": []}
    for row in rows(arguments.keep, arguments.steps):
        results["rows"].append(row)
        print(json.dumps(row), flush=True)
    (RESULTS / "trained_minilm.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
