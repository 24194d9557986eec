"""Measured rows of benchmarks/speed/bench_low_rank_linear.py as a table and as a roofline picture.

python -m benchmarks.speed.results_plot RESULTS.json      the table, and RESULTS.png beside the file
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROVIDERS = {
    "dense": ("#8a8f98", "s"),
    "torch": ("#d98a29", "o"),
    "compiled": ("#2a9d8f", "^"),
    "native": ("#b5247a", "D"),
}
_NEEDED = {"model", "layer", "M", "R", "dtype", "provider", "flops", "bytes"}
_MEASURED = {"median_us", "floor_us", "over_floor", "bound"}
_FACETS, _COLUMNS = 12, 3
_INK, _FAINT = "#333333", "#bbbbbb"


@dataclass(frozen=True)
class Results:
    """`about` the machine, a `roof` per dtype, `choice_on` which GPU, one row per case and provider."""

    about: dict
    roofs: dict[str, dict[str, float]]
    choice_on: str
    rows: list[dict]

    @property
    def measured(self) -> list[dict]:
        return [row for row in self.rows if "error" not in row]


def load(path: Path) -> Results:
    """Results of the benchmark, or of benchmarks/run_gpu.sh, which holds them. Raises ValueError on anything else."""
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and "steps" in data:
        data = data["steps"].get("grid", {}).get("data") or {}
    keys = {"about", "roofs", "choice_on", "rows"}
    if not isinstance(data, dict) or not keys <= data.keys():
        raise ValueError(
            f"{path} holds no results of benchmarks/speed/bench_low_rank_linear.py, which have "
            f"{', '.join(sorted(keys))}"
        )
    for number, row in enumerate(data["rows"]):
        if missing := _NEEDED - row.keys() or (set() if "error" in row else _MEASURED - row.keys()):
            raise ValueError(f"{path}: row {number} lacks {', '.join(sorted(missing))}")
    results = Results(**{key: data[key] for key in keys})
    if not results.measured:
        raise ValueError(f"{path} holds no measured row")
    return results


def table(results: Results) -> Table:
    """One line per case: each provider's median time, and how far the best low-rank one is from the floor."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in results.rows:
        key = (f"{row['model']} {row['layer']}", row["M"], row["R"], row["dtype"])
        cases.setdefault(key, {})[row["provider"]] = row
    about = results.about
    shown = Table(title=f"{_where(about)}; microseconds, medians", title_justify="left")
    for column in ("layer", "M", "R", "dtype", *PROVIDERS, "floor", "bound", "over floor", "over dense"):
        shown.add_column(column, justify="left" if column in ("layer", "dtype", "bound") else "right")
    shown.add_column(f"choice on {results.choice_on}")
    for (layer, M, R, dtype), found in cases.items():
        times = {name: row["median_us"] for name, row in found.items() if "error" not in row}
        low_rank = [row for name, row in found.items() if name in times and name != "dense"]
        best = min(low_rank, key=lambda row: row["median_us"], default=None)
        against = (f"{best['floor_us']:.3g}", best["bound"], f"{best['over_floor']:.2f}") if best else ("", "", "")
        shown.add_row(
            layer,
            f"{M}",
            f"{R}",
            dtype,
            *(_cell(found.get(name)) for name in PROVIDERS),
            *against,
            f"{times['dense'] / best['median_us']:.2f}x" if best and "dense" in times else "",
            str(next(iter(found.values())).get("choice") or "unknown"),
        )
    return shown


def draw(results: Results, path: Path) -> None:
    """Write the picture: achieved FLOP/s under the roof, and time over floor against M, for the layers with most M.

    Raises ImportError where there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'shrank[plot]'") from error
    layers: dict[tuple, list[dict]] = {}
    for row in results.measured:
        layers.setdefault((row["model"], row["layer"], row["dtype"]), []).append(row)
    shown = sorted(layers.values(), key=lambda rows: -len({row["M"] for row in rows}))[:_FACETS]
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(15, max(5.8, 1.4 + 2.0 * lines)), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    under_the_roof = left.subplots()
    _draw_roofline(under_the_roof, results)
    grid = right.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis, rows in zip(grid.flat, shown, strict=False):
        _draw_over_floor(axis, rows, len(results.roofs) > 1)
    for axis in grid.flat[len(shown) :]:
        axis.set_visible(False)
    right.suptitle("Time over the floor of what is computed", fontsize=11, color=_INK)
    right.supxlabel("M, tokens", fontsize=10, color=_INK)
    figure.suptitle(f"low_rank_linear on {_where(results.about)}", fontsize=12, color=_INK, fontweight="bold")
    figure.draw_without_rendering()  # only now is it known how steep the roof is on paper
    _name_the_slope(under_the_roof, max(results.roofs.values(), key=lambda roof: roof["flops"]))
    figure.savefig(path, dpi=140)


def _draw_roofline(axis: Axes, results: Results) -> None:
    from matplotlib.ticker import EngFormatter

    for name, (color, marker) in PROVIDERS.items():
        rows = [row for row in results.measured if row["provider"] == name]
        intensity, achieved = (
            [row["flops"] / row["bytes"] for row in rows],
            [1e6 * row["flops"] / row["median_us"] for row in rows],
        )
        axis.scatter(
            intensity,
            achieved,
            s=28,
            color=color,
            marker=marker,
            alpha=0.75,
            linewidths=0,
            zorder=3,
            label=name if rows else None,
        )
    axis.set(xscale="log", yscale="log")
    low, high = axis.get_xlim()
    high = max([high, *(4 * roof["flops"] / roof["bandwidth"] for roof in results.roofs.values())])
    for dtype, roof in results.roofs.items():
        ridge = roof["flops"] / roof["bandwidth"]
        axis.plot(
            [low, ridge, high], [low * roof["bandwidth"], roof["flops"], roof["flops"]], color=_INK, linewidth=1.4
        )
        axis.annotate(
            f"{dtype} product: {_si(roof['flops'])}FLOP/s",
            (high, roof["flops"]),
            (-4, 4),
            color=_INK,
            fontsize=9,
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
    axis.set_xlim(low, high)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter(EngFormatter())
    axis.set_xlabel("arithmetic intensity, FLOP per byte", color=_INK)
    axis.set_ylabel("achieved FLOP/s", color=_INK)
    axis.set_title("Under the roof that this device was measured to have", fontsize=11, color=_INK)
    axis.legend(frameon=False, loc="lower right", fontsize=10)
    _tidy(axis)


def _name_the_slope(axis: Axes, roof: dict[str, float]) -> None:
    """Write the bandwidth along the roof, half way up."""
    start = (axis.get_xlim()[0] * roof["flops"] / roof["bandwidth"]) ** 0.5
    (x, y), (further_x, further_y) = axis.transData.transform(
        [(at, at * roof["bandwidth"]) for at in (start, 2 * start)]
    )
    axis.annotate(
        f"copy: {_si(roof['bandwidth'])}B/s",
        (start, start * roof["bandwidth"]),
        (-4, 5),
        color=_INK,
        fontsize=9,
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation_mode="anchor",
        rotation=math.degrees(math.atan2(further_y - y, further_x - x)),
    )


def _draw_over_floor(axis: Axes, rows: list[dict], name_dtype: bool) -> None:
    """The rank that was measured most, in full colour; the others faint."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    most = Counter(row["R"] for row in rows).most_common(1)[0][0]
    for name, (color, marker) in PROVIDERS.items():
        for rank in {row["R"] for row in rows}:
            line = sorted((row["M"], row["over_floor"]) for row in rows if row["provider"] == name and row["R"] == rank)
            if line:
                axis.plot(
                    *zip(*line, strict=True),
                    color=color,
                    marker=marker,
                    markersize=4 if rank == most else 2.5,
                    linewidth=1.5 if rank == most else 0.8,
                    alpha=0.95 if rank == most else 0.3,
                )
    axis.axhline(1, color=_INK, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator([4**power for power in range(10)]))
    axis.yaxis.set_major_locator(FixedLocator([0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda M, _: f"{M / 1024:.0f}k" if M >= 1024 else f"{M:.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    first = rows[0]
    dtype = f", {first['dtype']}" if name_dtype else ""
    axis.set_title(f"{first['model']} {first['layer']}, R {most}{dtype}", fontsize=9, color=_INK, loc="left")
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(color=_FAINT, alpha=0.4, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=_INK)


def _where(about: dict) -> str:
    return f"{about['device']}, torch {about['torch']}, {about['date'][:10]}, {about['commit']}"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return "error" if "error" in row else f"{row['median_us']:.4g}"


def _si(value: float) -> str:
    """4.3e12 -> '4.3 T'"""
    power = min(int(math.log10(max(value, 1))) // 3, 5)
    return f"{value / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    path = parser.parse_args(arguments).results
    picture = path.with_suffix(".png")
    try:
        results = load(path)
        draw(results, picture)
    except (ValueError, ImportError) as error:  # what the file or the installation lacks
        parser.exit(1, f"{error}\n")
    console = Console()
    console.print(table(results))
    console.print(f"wrote {picture}", highlight=False)


if __name__ == "__main__":
    main()
