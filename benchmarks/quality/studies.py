"""What compressed models are worth at every size, against the published methods: benchmarks/results/quality_*.json.

python -m benchmarks.quality [minilm smollm2 whisper crepe-full crepe-tiny reader]
python -m benchmarks.quality [...] --keep 0.6    # that column alone, printed and not stored
These rows are added to what was measured, with --keep of that size alone:
python -m benchmarks.quality [...] --heal 300    # as many steps of healing
python -m benchmarks.quality [...] --refine 100  # layers probed, then each anchored block trained
python -m benchmarks.quality [...] --narrow      # feed-forward blocks narrowed, alone and beside ranks; or "*then*"
python -m benchmarks.quality [...] --own "probe steps=100" "batches=64"  # options of auto_fact: chosen.py
python -m benchmarks.quality [...] --cost     # of calibrate, plan and apply: seconds and memory, on a quiet machine
python -m benchmarks.quality [...] --table    # of what was measured
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import shrank
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import baselines
from benchmarks.quality.chosen import DEFAULT, OURS, Chosen, chosen_rows, refinements, weights
from benchmarks.quality.tasks import Crepe, MiniLM, Reader, SmolLM2, Task, Whisper
from benchmarks.speed.turns import THREADS
from shrank import Batch, Budget, Calibration, LayerStatistics, Metric


@dataclass(frozen=True)
class Study:
    """A task, the keeps to measure, those at which each step is measured on its own, to anchor, heal, narrow and refine
    at."""

    task: Callable[[], Task]
    keeps: tuple[float, ...]
    steps_at: tuple[float, ...]
    anchored_at: tuple[float, ...]
    heal_at: tuple[float, ...] = ()
    narrow_at: tuple[float, ...] = ()
    refine_at: tuple[float, ...] = ()


STUDIES = {
    "minilm": Study(
        MiniLM,
        (0.9, 0.8, 0.7, 0.6, 0.5),
        (0.9, 0.8, 0.7, 0.6, 0.5),
        (0.9, 0.8, 0.7, 0.6, 0.5),
        narrow_at=(0.9, 0.8, 0.7, 0.6, 0.5),
        refine_at=(0.6,),
    ),
    "smollm2": Study(SmolLM2, (0.9, 0.8, 0.7, 0.6), (0.6,), (), (0.8,), (0.8, 0.6), (0.8,)),
    "whisper": Study(Whisper, (0.9, 0.7, 0.5), (0.7,), (0.7, 0.5), (0.5,), refine_at=(0.5,)),
    "crepe-full": Study(partial(Crepe, "full"), (0.7, 0.5), (0.5,), (0.5,)),
    "crepe-tiny": Study(partial(Crepe, "tiny"), (0.7, 0.5), (0.5,), (0.5,)),
    "reader": Study(Reader, (0.8, 0.6, 0.5), (0.6,), (0.6, 0.5)),
}


class View(LayerStatistics):
    """What a calibration found, without the means that biases could make up for."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._calibration

    @property
    def has_gradients(self) -> bool:
        return self._calibration.has_gradients

    def tokens(self, fqn: str) -> int:
        return self._calibration.tokens(fqn)

    def metric(self, fqn: str, matrices: Tensor, centred: bool) -> Metric | None:
        return self._calibration.metric(fqn, matrices, centred=False)


class WithoutBias(View):
    """Two-sided errors, without bias correction."""


class OneSided(View):
    """Errors of the outputs, of which gradients only say what each layer's are worth: its mean gradient energy."""

    def metric(self, fqn: str, matrices: Tensor, centred: bool) -> Metric | None:
        full = super().metric(fqn, matrices, centred)
        if full is None or full.gradient is None:
            return full
        W = matrices.double()
        neutral = W.mT @ W if full.on_inputs else torch.eye(W.shape[1]).double()
        energy = full.gradient[0].trace() / neutral.diagonal(dim1=-2, dim2=-1).sum()
        return Metric(full.data, (energy * neutral).expand_as(full.gradient), full.on_inputs, None)


def steps(calibration: Calibration, without: Calibration) -> dict[str, Callable[[nn.Module, float], nn.Module]]:
    """What each step adds, from the first to all of them: from a dense model and a keep to a compressed one."""

    def spent(seen: LayerStatistics, model: nn.Module, keep: float, **options: object) -> nn.Module:
        plan = shrank.make_plan(model, Budget(keep_params=keep), calibration=seen, **options)
        return shrank.apply(model, plan, seen)

    one_sided, without_bias = OneSided(calibration), WithoutBias(calibration)
    return {
        "whitening": lambda model, keep: shrank.auto_fact(model, shrank.Fraction(keep), calibrate=without),
        "+ ranks by gradient energy": partial(spent, one_sided, pivot=False, allow_dense=False),
        "+ dense option": partial(spent, one_sided, pivot=False),
        "+ two-sided": partial(spent, without_bias, pivot=False),
        "+ pivots": partial(spent, without_bias),
        DEFAULT: partial(spent, calibration),
    }


def column(study: Study, keep: float) -> Study:
    """The study at one keep; ValueError if it measures nothing there."""
    if keep not in study.keeps:
        raise ValueError(f"the study measures at keep {', '.join(map(str, study.keeps))}, not at {keep}")
    names = ("keeps", "steps_at", "anchored_at", "narrow_at")
    at = {name: tuple(x for x in getattr(study, name) if x == keep) for name in names}
    return replace(study, **at)


@dataclass(frozen=True)
class Subject:
    """A task with its dense model, the names of its layers, and the batches of its calibration."""

    task: Task
    dense: nn.Module
    names: list[str]
    batches: list[Batch]

    @classmethod
    def of(cls, task: Task) -> Subject:
        dense = task.model()
        return cls(task, dense, list(baselines.layers(dense, task.exclude)), shrank.batches(task.batches()))

    def calibrated(self, **options: object) -> Calibration:
        options = {"loss": self.task.own_loss, "layers": self.names, **options}
        return shrank.calibrate(self.dense, self.batches, **options)

    def row(self, name: str, step: Callable[[nn.Module, float], nn.Module], keep: float, **more: object) -> dict:
        started = time.perf_counter()
        small = step(copy.deepcopy(self.dense), keep)
        taken = round(time.perf_counter() - started)
        layers = [x for x in small.shrank_plan if x.fqn in set(self.names)]
        return {
            "method": name,
            "keep": keep,
            **self.task.evaluate(small),
            "kept": round(weights(small, self.names) / weights(self.dense, self.names), 4),
            "dense layers": sum(x.rank is None for x in layers),
            **more,
            "planned and applied in s": taken,
        }


def rows(study: Study) -> Iterator[dict]:
    subject = Subject.of(study.task())
    task = subject.task
    yield {"method": "dense", "keep": 1.0, **task.evaluate(subject.dense)}
    yield from _baselines(task, study.keeps)
    started = time.perf_counter()
    calibration = subject.calibrated()
    seconds = {"calibrated in s": round(time.perf_counter() - started)}
    for name, step in steps(calibration, subject.calibrated(loss="none")).items():
        for keep in study.keeps if OURS in name else study.steps_at:
            yield subject.row(name, step, keep, **seconds)
    yield from _halved(task, subject.dense, calibration)
    yield from _narrowed(subject, study.narrow_at)
    for keep in study.anchored_at:
        step = partial(_anchored, subject.batches, calibration)
        yield subject.row(f"{OURS}, anchored", step, keep, **seconds)


def narrowed_rows(study: Study, keeps: tuple[float, ...], methods: str, cache: str | None) -> Iterator[dict]:
    """Blocks narrowed, of methods that match a pattern, with the date and the commit of each row."""
    for row in _narrowed(Subject.of(study.task()), keeps or study.narrow_at, methods, cache):
        yield {**row, "measured": provenance("cpu")}


def _narrowed(
    subject: Subject, keeps: tuple[float, ...], methods: str = "*", cache: str | None = None
) -> Iterator[dict]:
    if not keeps:
        return
    started = time.perf_counter()
    calibration = subject.calibrated(narrow=True, cache=cache)
    seconds = round(time.perf_counter() - started)
    for name, step in _narrowings(subject, calibration).items():
        for keep in keeps if fnmatchcase(name, methods) else ():
            yield subject.row(name, step, keep, **{"calibrated in s": seconds})


def _narrowings(subject: Subject, calibration: Calibration) -> dict[str, Callable[[nn.Module, float], nn.Module]]:
    """Feed-forward blocks narrowed alone, where they shall keep so much; and all blocks with all else."""
    names = subject.names
    feed_forward = [block for block in calibration.unit_blocks if not (block.reason or block.rows)]  # no heads
    blocks = [fqn for block in feed_forward for fqn in block.layers if fqn in names]

    def at_once(model: nn.Module, keep: float, **options: object) -> nn.Module:
        plan = shrank.make_plan(model, Budget(keep_params=keep), calibration=calibration, **options)
        return shrank.apply(model, plan, calibration)

    return {
        f"{OURS}, feed-forward layers": partial(at_once, include=blocks),
        f"{OURS}, feed-forward layers, narrowed": partial(at_once, include=blocks, narrow=True),
        f"{OURS}, widths and ranks": partial(at_once, narrow=True),
        f"{OURS}, one width and ranks": partial(at_once, narrow="uniform"),
    }


def _anchored(batches: list[Batch], calibration: Calibration, model: nn.Module, keep: float) -> nn.Module:
    plan = shrank.make_plan(model, keep, calibration=calibration)
    return shrank.apply_anchored(model, plan, batches, calibration)


def _baselines(task: Task, keeps: tuple[float, ...]) -> Iterator[dict]:
    model = task.model()
    seen = baselines.statistics(model, shrank.batches(task.batches()), task.loss if task.kfac else None, task.exclude)
    for method in baselines.METHODS:
        if not task.kfac and method in ("ASVD", "K-FAC"):
            continue  # published for linear layers only
        found = baselines.approximations(model, method, seen, task.exclude)
        for keep in keeps:
            yield {"method": method, "keep": keep, **task.evaluate(baselines.compressed(model, found, keep))}


def healed_rows(study: Study, steps: int, keeps: tuple[float, ...]) -> Iterator[dict]:
    """What training makes of the default, with products in bfloat16: on CPUs that have them, half the time."""
    task = study.task()
    dense = task.model()
    calibration = shrank.calibrate(
        dense, task.batches(), loss=task.own_loss, layers=list(baselines.layers(dense, task.exclude))
    )
    for keep in keeps or study.heal_at:
        small = shrank.auto_fact(dense, Budget(keep_params=keep), calibrate=calibration, deepcopy=True)
        started = time.perf_counter()
        torch.set_float32_matmul_precision("medium")
        small = shrank.heal(small, dense, task.healing_batches(), steps=steps, loss=task.healing_loss)
        torch.set_float32_matmul_precision("highest")
        taken, done = round(time.perf_counter() - started), small.shrank_healing
        yield {
            "method": f"{OURS}, healed {steps} steps",
            "keep": keep,
            **task.evaluate(small),
            "healed in s": taken,
            "best step": done.best_step,
            "loss held out": [[step, round(x, 4)] for step, x in done.curve],
            "measured": provenance("cpu"),
        }


def _halved(task: Task, dense: nn.Module, calibration: Calibration, keep: float = 0.8) -> Iterator[dict]:
    """The model in bfloat16: plain factors with and without the fit of one to the other's rounding, and the default."""

    def compressed(model: nn.Module, pivot: bool | str) -> nn.Module:
        return shrank.auto_fact(model, Budget(keep_params=keep), calibrate=calibration, pivot=pivot)

    halved = copy.deepcopy(dense).bfloat16()
    rounded = compressed(copy.deepcopy(halved).float(), False).bfloat16()
    refitted = compressed(copy.deepcopy(halved), False)
    for method, small in (
        ("bf16, plain factors rounded", rounded),
        ("bf16, plain factors refitted", refitted),
        (f"bf16, refitted = {OURS}", compressed(halved, "auto")),
    ):
        yield {"method": method, "keep": keep, **task.evaluate(small.float())}


def cost(name: str) -> dict[str, float]:
    """Seconds and peak memory of calibrate, plan and apply, in a process of its own, in which glibc gives large blocks
    back that are freed: by default it keeps those below 32 MiB."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cost, (name,))


def _cost(name: str) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    task = STUDIES[name].task()
    data, model = shrank.Calibrate(task.batches(), loss=task.own_loss, spill=True), task.model()
    # Thread pools and libraries are not the model's.
    shrank.auto_fact(nn.Linear(256, 256).eval(), Budget(keep_params=0.5), calibrate=[torch.randn(256, 256)])
    size = 4 * sum(p.numel() for p in model.parameters())
    before, started = _resident(), time.perf_counter()
    shrank.auto_fact(model, Budget(keep_params=0.8), calibrate=data, exclude=task.exclude)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": round(seconds, 1),
        "model in MiB": size >> 20,
        "peak above the loaded model in MiB": (peak - before) >> 20,
        "peak with the model, in models": round((peak - before + size) / size, 2),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def table(results: dict) -> str:
    """The rows as a Markdown table: a line per method and figure, a column per keep."""
    figures = [key for key in results["rows"][0] if key not in ("method", "keep")]
    keeps = sorted({row["keep"] for row in results["rows"][1:]}, reverse=True)
    lines = []
    for figure in figures:
        dense = results["rows"][0][figure]
        lines += [
            f"| {figure} (dense {dense:.4g}) | " + " | ".join(f"keep {k:g}" for k in keeps) + " |",
            "|---" * (len(keeps) + 1) + "|",
        ]
        for method in dict.fromkeys(row["method"] for row in results["rows"][1:]):
            found = {row["keep"]: row[figure] for row in results["rows"] if row["method"] == method}
            lines.append(f"| {method} | " + " | ".join(f"{found[k]:.4g}" if k in found else "" for k in keeps) + " |")
        lines.append("")
    return "\n".join(lines)


def replaced(rows: list[dict], row: dict) -> list[dict]:
    """The rows with this one in the place of the one of the same method and size, or at the end."""
    key = (row["method"], row["keep"])
    place = next((n for n, other in enumerate(rows) if (other["method"], other["keep"]) == key), len(rows))
    return [*rows[:place], row, *rows[place + 1 :]]


def _added(study: Study, arguments: argparse.Namespace) -> Iterator[dict] | None:
    """The rows that are measured alone; None where all of the study is wanted."""
    keeps, cache = tuple(arguments.keep), arguments.cache
    if arguments.heal:
        return healed_rows(study, arguments.heal, keeps)
    if arguments.refine:
        return chosen_rows(study.task(), refinements(arguments.refine), keeps or study.refine_at, cache)
    if arguments.narrow:
        return narrowed_rows(study, keeps, arguments.narrow, cache)
    if arguments.own:
        choices = {f"{OURS}, {chosen}" if str(chosen) else DEFAULT: chosen for chosen in map(Chosen.of, arguments.own)}
        return chosen_rows(study.task(), choices, keeps or study.keeps, cache)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(STUDIES), metavar="TASK")
    parser.add_argument("--heal", type=int, metavar="STEPS", help="measure healing alone")
    parser.add_argument("--refine", type=int, metavar="STEPS", help="measure the training of blocks alone")
    parser.add_argument(
        "--narrow", nargs="?", const="*", metavar="METHODS", help="measure narrowed blocks alone, of rows so named"
    )
    parser.add_argument("--own", nargs="+", metavar="OPTIONS", help="measure options of auto_fact alone")
    parser.add_argument("--keep", type=float, nargs="*", default=[], help="measure at these alone")
    parser.add_argument("--cache", help="a folder for calibrations, with --refine, --narrow and --own")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--cost", action="store_true", help="measure time and memory alone")
    parser.add_argument("--table", action="store_true", help="print the stored results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.tasks:
        path = RESULTS / f"quality_{name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if arguments.cost:
            results["cost"] = {**cost(name), "measured": provenance("cpu")}
            path.write_text(json.dumps(results, indent=1) + "\n")
        elif (found := _added(STUDIES[name], arguments)) is not None:
            for row in found:
                print(json.dumps(row), flush=True)
                results = json.loads(path.read_text())  # which others may write meanwhile
                results["rows"] = replaced(results["rows"], row)
                path.write_text(json.dumps(results, indent=1) + "\n")
        elif arguments.keep:
            for keep in arguments.keep:
                for row in rows(column(STUDIES[name], keep)):
                    print(json.dumps(row), flush=True)
            continue
        elif not arguments.table:
            added = [row for row in results.get("rows", []) if "measured" in row]
            results = {**provenance("cpu"), "cost": results.get("cost"), "rows": []}
            for number, row in enumerate(rows(STUDIES[name])):
                results["rows"] = replaced(results["rows"] if number else [row, *added], row)
                print(json.dumps(row), flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results["cost"], table(results), sep="\n")


if __name__ == "__main__":
    main()
