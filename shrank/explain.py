"""Which kernel the native extension takes for a layer on a GPU, why, and at what predicted cost.

Needs the extension, not the GPU.
"""

from __future__ import annotations

import json

import torch
from rich.table import Table

from . import _native


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """'16384,768,3072,96' -> M, K, N, R: tokens, in_features, out_features, rank."""
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--shape is {text!r}, wanted M,K,N,R: four whole numbers above 0, such as 16384,768,3072,96")
    M, K, N, R = map(int, sizes)
    return M, K, N, R


def explain(shape: tuple[int, int, int, int], dtype: str = "bf16", gpu: str | None = None, activation: str = "none",
            bias: bool = True, residual: bool = False, training: bool = False) -> dict:
    """The decision, the alternatives and the costs (csrc/select/explain.cpp lists the keys).

    Raises RuntimeError with the reasons if the extension is not loaded, ValueError without a GPU to explain for.
    """
    if problems := _native.problems():
        raise RuntimeError("explain needs the native extension: " + "; ".join(problems))
    if gpu is None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: name a GPU with --gpu, such as H200")
        gpu = f"cuda:{torch.cuda.current_device()}"
    return json.loads(torch.ops.shrank.explain(*shape, dtype, activation, bias, residual, training, gpu))


def table(facts: dict) -> Table:
    """The facts for people."""
    problem, decision, runner_up = facts["problem"], facts["decision"], facts["runner_up"]
    options = [problem["activation"], *(name for name in ("bias", "residual", "training") if problem[name])]
    predicted = decision["microseconds"]
    shown = Table(show_header=False)
    shown.add_row("layer", ", ".join(f"{name} {problem[name]}" for name in "MKNR"))
    shown.add_row("", ", ".join([problem["dtype"], *(option for option in options if option != "none")]))
    shown.add_row("gpu", facts["device"]["name"])
    shown.add_row("kernel", decision["kernel"])
    shown.add_row("because", decision["reason"])
    if grid := decision["grid"]:
        held = f"h of rank up to {grid['max_rank']} held" if grid["max_rank"] else "h streamed"
        shown.add_row("blocks", f"{grid['blocks_m']} x {grid['blocks_n']}, of {grid['block_m']} tokens, {held}")
    shown.add_row("predicted", _us(predicted))
    shown.add_row("floor", f"{_us(facts['floor_us'])}; predicted is {predicted / facts['floor_us']:.2f}x that")
    shown.add_row("runner-up", f"{runner_up['kernel']}, {_beside(runner_up['microseconds'], predicted)}" if runner_up
                  else "none")
    for candidate in facts["candidates"]:
        if not candidate["legal"]:
            shown.add_row("not possible", f"{candidate['kernel']}: {candidate['why_not']}")
    shown.add_row("dense layer", _beside(facts["dense_us"], predicted))
    shown.add_row("figures", facts["status"])
    shown.add_row("", f"{facts['device']['name']}: {facts['device']['source']}")
    return shown


def _us(microseconds: float) -> str:
    return f"{microseconds:.3g} us" if microseconds < 100 else f"{microseconds:,.0f} us"


def _beside(microseconds: float, predicted: float) -> str:
    return f"{_us(microseconds)}: {microseconds / predicted:.2f}x the predicted time"
