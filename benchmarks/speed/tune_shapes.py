"""Measures the fastest way for the layers of known models: the table that shrank ships for a card.

python -m benchmarks.speed.tune_shapes --device cuda:0 --out FILE [--budget SECONDS] [--tiny] [--library LIBRARY]

FILE goes to shrank/ops/tables/<name of the card, _ for spaces>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch


def one_call(candidates: dict, device: str, rounds: int, graphs: bool, held: int) -> dict:
    """A clock for rehearsals: each sequence's first call, once."""
    from shrank.measuring.timing import Timing

    found = {}
    for name, calls in candidates.items():
        started = time.perf_counter()
        calls[0]()
        found[name] = Timing(time.perf_counter() - started, 0.0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--budget", type=float, default=80, help="seconds; whole problems only")
    parser.add_argument("--tiny", action="store_true", help="problems in miniature, timed by one call")
    parser.add_argument("--library", type=Path, help="native code for the CPU, in the extension's place")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.library:
        torch.ops.load_library(str(given.library))
    from benchmarks.speed import low_rank_gated, low_rank_linear, shapes
    from shrank.measuring.timing import time_in_turns
    from shrank.measuring.tuning import tune
    from shrank.ops import machine
    from shrank.ops.gated import GATED
    from shrank.ops.linear import LINEAR

    def ask_linear(case: shapes.Case) -> None:
        inputs = low_rank_linear.draw(case, given.device)
        x, down, up = inputs.x, inputs.down, inputs.up
        LINEAR.overload(x, down, up, inputs.bias, case.layer.activation, inputs.residual)

    def ask_gated(case: shapes.Case) -> None:
        inputs = low_rank_gated.draw(case, given.device)
        GATED.overload(*low_rank_gated.factors(inputs), activation=case.layer.activation)

    def listed(module, tiny: list) -> list[shapes.Case]:
        if given.tiny:
            return [shapes.Case(case.layer, case.M, case.R, "bfloat16") for case in tiny]
        return module.grid("bfloat16")

    linear, gated = listed(shapes, shapes.tiny()), listed(low_rank_gated, low_rank_gated.tiny())
    # Gated layers after each model's own layers, and before all else.
    cases = [(ask_linear, case) for case in linear[: len(shapes.LAYERS)]] + [(ask_gated, case) for case in gated]
    cases += [(ask_linear, case) for case in linear[len(shapes.LAYERS) :]]
    started, done = time.monotonic(), []
    for ask, case in cases:
        if time.monotonic() - started > given.budget:
            break
        with tune(given.device, one_call if given.tiny else time_in_turns) as measured:
            ask(case)
        done += measured
        for each in measured:
            print(f"{each.key}: {each.kernel} {each.grid} {each.microseconds:.1f} us, PyTorch {each.library_us:.1f} us")
        given.out.write_text(
            json.dumps({"about": machine.facts(given.device), "measured": [asdict(each) for each in done]}, indent=1)
        )
    print(f"{len(done)} problems of {len(cases)} measured")
    return int(not done)


if __name__ == "__main__":
    raise SystemExit(main())
