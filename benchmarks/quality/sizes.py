"""Quality at a size in bytes: budgets of shrank beside what is published, benchmarks/results/sizes_TASK.json, drawn in
docs/assets/sizes_TASK.png.

Bytes are those of the compressed layers' weights on disk, relative to these in 16 bits. Speeds are of one forward pass
on this machine's threads, of the same model in float32 and in int8 (served.py), beside the dense one in turns.

python -m benchmarks.quality.sizes [TASK ...] [--budgets 0.35 0.28] [--methods "shrank" "GPTQ*"] [--draw-only]
python -m benchmarks.quality.sizes [...] --speed  # adds speeds to rows that were measured, and measures nothing else
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import nn

import shrank
from benchmarks.provenance import RESULTS, provenance
from benchmarks.quality import baselines
from benchmarks.quality.rounded import METHODS, Rounded, gptq, rtn
from benchmarks.quality.served import Served, in_floats
from benchmarks.quality.tasks import Crepe, MiniLM, Reader, SmolLM2, Task, Whisper
from benchmarks.speed.turns import THREADS
from shrank import Budget, Grid, RankPlan, Storage
from shrank.linalg import Shape

TASKS = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "whisper": Whisper,
    "crepe-full": partial(Crepe, "full"),
    "reader": Reader,
}
PICTURES = Path(__file__).parents[2] / "docs" / "assets"
BUDGETS = (0.35, 0.28, 0.25, 0.22, 0.17)
OURS = "shrank"
# Ways to spend a share of the bytes that the layers have in 16 bits: all forms, fewer units besides, dense ones alone,
# low rank alone. Low rank is counted in 16 bits whatever the model has.
OWN = {
    OURS: (lambda keep, share: Budget(keep_bytes=keep * share), {}),
    f"{OURS}, with widths": (lambda keep, share: Budget(keep_bytes=keep * share), {"narrow": True}),
    f"{OURS}, bits alone": (
        lambda keep, share: Budget(keep_bytes=keep * share, correction_ranks=()),
        {"max_rank": 1},
    ),
    f"{OURS}, low rank alone": (lambda keep, share: Budget(keep_params=keep), {}),
}
BITS_AND_GROUPS = ((8, 32), (4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (3, 128))
CORRECTED = ((4, 32, 16), (4, 128, 16), (4, 128, 32))  # bits, group, rank of factors in int8
SVD_LLM = {"SVD-LLM": None, "SVD-LLM + int8": Grid(8), "SVD-LLM + int4": Grid(4, 32)}
RANKS = (0.9, 0.8, 0.6, 0.5, 0.4)  # shares of the weights that SVD-LLM keeps, alone and in few bits
QUALITY = {  # larger is better
    "cosine": True,
    "word error rate": False,
    "perplexity": False,
    "mean cents": False,
    "character error rate": False,
}


@dataclass(frozen=True)
class Bench:
    """A task, its dense model, and its layers with what they are as matrices."""

    task: Task
    dense: nn.Module
    shapes: dict[str, Shape]
    served: Served | None = None  # to measure speeds with, in the place of quality

    def takes(self, group: int) -> bool:
        """Whether groups of so many inputs divide the rows of every layer."""
        return all(shape.in_features % group == 0 for shape in self.shapes.values())

    def row(self, method: str, model: nn.Module, size: float, weights: float, flops: float, **more: object) -> dict:
        """One model, measured; sizes are relative to the dense layers."""
        sizes = {"bytes": size, "weights": weights, "FLOPs": flops}
        if self.served:
            figures = self.served.figures(None if model is self.dense else model)
        else:
            figures = self.task.evaluate(model)
        return {"method": method, **{k: round(v, 4) for k, v in sizes.items()}, **figures, **more}

    def uniform(self, method: str, model: nn.Module, storage: Storage, keep: float | None = None) -> dict:
        """A model whose layers all have one storage, at the rank that keeps a share of the weights, or corrected."""
        ranks = {name: _rank(shape, keep) for name, shape in self.shapes.items()}
        if self.served and keep is not None:
            # What is approximated in place is timed as the factors that it stands for.
            model = shrank.auto_fact(model, dict(ranks), pivot=False, allow_slower=True)
        return self.row(method, model, *self._shares((n, s, ranks[n], storage) for n, s in self.shapes.items()))

    def corrected(self, method: str, model: nn.Module, storage: Storage, rank: int) -> dict:
        if self.served:
            for name in self.shapes:
                model.set_submodule(name, shrank.CorrectedLinear(model.get_submodule(name), rank))
        return self.row(method, model, *self._shares((n, shape, rank, storage) for n, shape in self.shapes.items()))

    def planned(self, method: str, plan: RankPlan, model: nn.Module, **more: object) -> dict:
        """A model that shrank made by a plan."""
        layers = [layer for layer in plan if layer.fqn in self.shapes]
        counted = Counter(_form(layer) for layer in layers)
        shares = self._shares((layer.fqn, layer.shape, layer.rank, layer.storage) for layer in layers)
        return self.row(method, model, *shares, forms=dict(counted.most_common()), **more)

    def _shares(self, forms) -> tuple[float, float, float]:
        """Bytes, weights and operations for a token, relative to dense layers in 16 bits."""
        totals = torch.zeros(2, 3, dtype=torch.float64)
        for name, shape, rank, storage in forms:
            dense = self.shapes[name]  # which has all of its units
            operations = shape.flops(rank) + (shape.flops(None) if storage.corrected else 0)
            totals[0] += torch.tensor([shape.bytes(rank, storage), shape.stored_params(rank, storage), operations])
            totals[1] += torch.tensor([dense.bytes(None), dense.dense_params, dense.flops(None)])
        return tuple((totals[0] / totals[1]).tolist())


def rows(name: str, budgets: tuple[float, ...], methods: list[str], speed: bool = False) -> Iterator[dict]:
    """Of the methods that match one of these patterns, quality or speed; the dense model comes first."""
    task = TASKS[name]()
    dense = task.model()
    # What is published is for linear layers: Whisper's two convolutions stay as they are.
    found = {
        n: m for n, m in baselines.layers(dense, task.exclude).items() if isinstance(m, nn.Linear) or not task.kfac
    }
    plan = shrank.make_plan(dense, {"*": None}, errors=False)
    served = Served(dense, task.work()) if speed else None
    bench = Bench(task, dense, {fqn: plan[fqn].shape for fqn in found}, served)
    yield bench.row("dense, 16 bits", dense, 1.0, 1.0, 1.0)
    if own := {method: how for method, how in OWN.items() if _matches(method, methods)}:
        yield from _own(bench, own, budgets, list(found))
    if task.kfac:
        yield from _published(bench, methods)


def _own(bench: Bench, methods: dict[str, tuple], budgets: tuple[float, ...], layers: list[str]) -> Iterator[dict]:
    """The budgets of shrank, of one calibration."""
    task, dense = bench.task, bench.dense
    started = time.perf_counter()
    narrow = any(options.get("narrow", False) for _, options in methods.values())
    how = {"loss": task.own_loss, "layers": layers, "inputs": True, "narrow": narrow}
    calibration = shrank.calibrate(dense, task.batches(), **how)
    seconds = round(time.perf_counter() - started)
    convolutions = any(not isinstance(dense.get_submodule(name), nn.Linear) for name in layers)
    # A model in float32 has twice the bytes, of which half the share is kept. Convolutions have no fewer bits than the
    # model has: theirs are 16.
    share = 1.0 if convolutions else 0.5
    for method, (budget, options) in methods.items():
        # Bits alone have to be few enough for the size, and convolutions have none.
        for keep in budgets if not (convolutions and options) else ():
            started = time.perf_counter()
            try:
                small = shrank.auto_fact(
                    _halved(dense, layers) if convolutions else copy.deepcopy(dense),
                    budget(keep, share),
                    calibrate=calibration,
                    include=layers,
                    **options,
                )
            except shrank.linalg.BudgetTooSmall:
                continue
            taken = round(time.perf_counter() - started)
            plan, small = small.shrank_plan, in_floats(small) if convolutions else small
            more = {"calibrated in s": seconds, "compressed in s": taken}
            yield bench.planned(method, plan, small, budget=keep, **more)


def _halved(dense: nn.Module, layers: list[str]) -> nn.Module:
    """A copy whose layers of these names are in float16."""
    model = copy.deepcopy(dense)
    for name in layers:
        model.get_submodule(name).half()
    return model


def _matches(method: str, methods: list[str]) -> bool:
    return any(fnmatchcase(method, pattern) for pattern in methods)


def _published(bench: Bench, methods: list[str]) -> Iterator[dict]:
    """Every layer alike."""
    task, dense, names = bench.task, bench.dense, list(bench.shapes)
    seen = baselines.statistics(task.model(), shrank.batches(task.batches()), None, task.exclude)
    for bits, group in BITS_AND_GROUPS:
        if not bench.takes(group):
            continue
        for method in ("RTN",) if bits == 8 else ("RTN", "AWQ", "GPTQ"):
            if _matches(name := f"{method} int{bits} g{group}", methods):
                model = Rounded(dense, METHODS[method], seen, names, group, bits).at(0, False)
                yield bench.uniform(name, model, Storage(Grid(bits, group)))
    for bits, group, rank in CORRECTED:
        if not bench.takes(group):
            continue
        for method in ("RTN + QERA / EoRA", "GPTQ + EoRA"):
            if _matches(name := f"{method}, int{bits} g{group} + rank {rank}", methods):
                model = Rounded(dense, METHODS[method], seen, names, group, bits).at(rank, True)
                yield bench.corrected(name, model, Storage(Grid(bits, group), True, Grid(8)), rank)
    of_svd_llm = {name: form for name, form in SVD_LLM.items() if _matches(name, methods)}
    svd_llm = baselines.approximations(dense, "SVD-LLM", seen, task.exclude) if of_svd_llm else {}
    for keep in RANKS:
        for name, grid in of_svd_llm.items():
            yield bench.uniform(name, _svd_llm_on(bench, svd_llm, seen, keep, grid), Storage(grid), keep)


@torch.no_grad()
def _svd_llm_on(bench: Bench, found: dict, seen: dict, keep: float, grid: Grid | None) -> nn.Module:
    """SVD-LLM's factors as they are, or rounded one after the other: to the nearest in 8 bits, by GPTQ in fewer."""
    model = copy.deepcopy(bench.dense)
    for name, shape in bench.shapes.items():
        rank, weight = _rank(shape, keep), model.get_submodule(name).weight
        if grid is None:
            weight.copy_(found[name](rank).view(weight.shape))
            continue
        (up, down), bits, group = baselines.split(found[name](rank), rank), grid.bits, grid.group_size
        own, moment = seen[name], seen[name].inputs.double() / seen[name].tokens
        down = rtn(down, own, group or down.shape[1], bits) if bits == 8 else gptq(down, own, group, bits)
        between = baselines.Statistics(1, down @ moment @ down.T)
        up = rtn(up, own, group or rank, bits) if bits == 8 else gptq(up, between, group, bits)
        weight.copy_((up @ down).view(weight.shape))
    return model


def _rank(shape: Shape, keep: float | None) -> int | None:
    """The multiple of 32, which groups ask for, that keeps at most a share of the weights."""
    return None if keep is None else max(32, shape.rank_for(keep * shape.dense_params) // 32 * 32)


def _form(layer: shrank.LayerPlan) -> str:
    low_rank = layer.rank is not None and not layer.storage.corrected
    stored = str(layer.storage) or "16 bits"
    parts = ["narrowed"] * layer.narrowed + ["low rank"] * low_rank
    return ", ".join([*parts, stored])


def draw(name: str, found: list[dict], path: Path) -> None:
    """Quality over bytes, a line for each method that has a point among those of shrank."""
    figure_name = next(key for key in QUALITY if key in found[0])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    by_method: dict[str, list[dict]] = {}
    for row in found[1:]:
        by_method.setdefault(_series(row["method"]), []).append(row)
    _limit(axes, figure_name, found)
    for method, measured in by_method.items():
        points = sorted(measured, key=lambda row: row["bytes"])
        if not any(_is_seen(axes, row["bytes"], row[figure_name]) for row in points):
            continue
        ours = method.startswith(OURS)
        axes.plot(
            [row["bytes"] for row in points],
            [row[figure_name] for row in points],
            marker="o" if ours else "x",
            linewidth=2 if method == OURS else 1,
            linestyle="-" if ours else ":",
            label=method,
        )
    axes.set_xlabel("bytes of the layers' weights, relative to 16 bits")
    axes.set_ylabel(figure_name)
    axes.set_title(f"{TASKS[name]().name}: {figure_name} at a size")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _limit(axes: Axes, figure_name: str, found: list[dict]) -> None:
    """Show what is about as good as shrank at its sizes."""
    ours = [row for row in found if row["method"] == OURS]
    sizes = [row["bytes"] for row in ours]
    axes.set_xlim(min(sizes) - 0.05, max(0.6, max(sizes) + 0.05))
    good = [row[figure_name] for row in ours]
    if QUALITY[figure_name]:
        axes.set_ylim(min(good) - 0.05, 1.0)
    else:
        axes.set_ylim(0.9 * found[0][figure_name], 1.5 * max(good))
        axes.axhline(found[0][figure_name], color="grey", linewidth=0.5)


def _is_seen(axes: Axes, x: float, y: float) -> bool:
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    return left <= x <= right and low <= y <= high


def _series(method: str) -> str:
    """What methods of several bits or ranks have in common."""
    return method if method.startswith("SVD-LLM") else method.split(", int")[0].split(" int")[0]


def with_speed(rows: list[dict], row: dict) -> list[dict]:
    """The rows with the speeds of this one in that of the same method and size; ValueError if there is none."""

    def key(row: dict) -> tuple:
        return row["method"], row.get("budget", row["bytes"])

    if key(row) not in map(key, rows):
        raise ValueError(f"the quality of {key(row)} was not measured")
    speeds = {name: value for name, value in row.items() if _is_speed(name)}
    return [
        {**other, **speeds, "speed measured": provenance("cpu")} if key(other) == key(row) else other for other in rows
    ]


def _is_speed(figure: str) -> bool:
    return "/s, " in figure or figure.startswith("times dense")


def table(found: list[dict]) -> str:
    """The rows as a Markdown table, by size."""
    skipped = ("method", "forms", "budget", "calibrated in s", "compressed in s", "speed measured")
    figures = [key for key in found[0] if key not in skipped]
    lines = ["| method | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for row in sorted(found, key=lambda row: -row["bytes"]):
        cells = (f"{row[key]:.4g}" if key in row else "" for key in figures)
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--methods", nargs="*", default=["*"], help="patterns of the rows to measure; others are kept")
    parser.add_argument("--speed", action="store_true", help="measure speeds alone, of rows that were measured")
    parser.add_argument("--draw-only", action="store_true", help="draw and print what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.tasks:
        path = RESULTS / f"sizes_{name}.json"
        if not arguments.draw_only:
            _measure(name, path, arguments)
        found = json.loads(path.read_text())["rows"]
        draw(name, found, PICTURES / f"{path.stem}.png")
        print(name, table(found), sep="\n")


def _measure(name: str, path: Path, arguments: argparse.Namespace) -> None:
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    others = [row for row in results["rows"][1:] if not _matches(row["method"], arguments.methods)]
    if not arguments.speed:
        results = {**provenance("cpu"), "rows": []}
    for number, row in enumerate(rows(name, tuple(arguments.budgets), arguments.methods, arguments.speed)):
        if arguments.speed:
            results["rows"] = with_speed(results["rows"], row)
        else:
            results["rows"] += [row] if number else [row, *others]
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
