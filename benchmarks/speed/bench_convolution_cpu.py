"""CPU inference of torchcrepe, convolutions of 512 and 64 taps: dense against keep 0.5, whole and by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shrank
from benchmarks.data.crepe import load_crepe, make_tones
from benchmarks.speed.turns import in_turns

BATCH, KEEP, ROUNDS = 16, 0.5, 7
BAR = ">= 1.3, or dense with a reason"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def inputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What the named layers of the model see when it runs on x."""
    seen, modules = {}, {name: model.get_submodule(name) for name in names}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        for name, m in modules.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["full", "tiny"])
def bench_torchcrepe(size: str, layout: str, benchmark, report) -> None:
    """Windows/s of 1024 samples at batch 16, and times faster, of the model and of each convolution."""
    dense = load_crepe(size)
    small = shrank.auto_fact(dense, KEEP, deepcopy=True, include=lambda m, fqn: isinstance(m, nn.Conv2d))
    dense.to(memory_format=LAYOUTS[layout])
    small.to(memory_format=LAYOUTS[layout])
    x, _ = make_tones(BATCH)
    with torch.inference_mode():
        seconds = in_turns({"dense": lambda: dense(x), "CED": lambda: small(x)}, ROUNDS)
        for name, second in seconds.items():
            report(f"windows/s, {name}", BATCH / second, "-")
        report("times faster", seconds["dense"] / seconds["CED"], BAR)
        _report_layers(dense, small, x, report)
        benchmark.pedantic(lambda: small(x), rounds=3)


def _report_layers(dense: nn.Module, small: nn.Module, x: Tensor, report) -> None:
    """Times faster of each replaced convolution on its own input; of the others, why they stayed dense."""
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    for name, seen in inputs_of(dense, names, x).items():
        layer, twin = dense.get_submodule(name), small.get_submodule(name)
        if not isinstance(twin, shrank.CED):
            report(f"{name} dense: {small.shrank_plan[name].reason}", 1.0, "-")
            continue
        seconds = in_turns({"dense": lambda a=seen, m=layer: m(a), "CED": lambda a=seen, m=twin: m(a)}, ROUNDS)
        report(f"{name} rank {twin.rank}, times faster", seconds["dense"] / seconds["CED"], BAR)
