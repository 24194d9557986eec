"""What a plan does, to look at: a page that needs nothing beside it, and figures for notebooks."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..util.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .plan import LayerPlan, RankPlan

_LOW_RANK, _DENSE, _LINE = "#1f6f8b", "#b9b4a7", "#c8553d"
_LEAST_ERROR = 1e-6
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.totals { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.totals div { background: #f4f2ec; border-radius: .4rem; padding: .6rem 1rem }
.totals b { display: block; font-size: 1.3rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th { text-align: left; border-bottom: 2px solid #ccc; position: sticky; top: 0; background: white }
td { border-bottom: 1px solid #eee; padding: .15rem .6rem .15rem 0 }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; padding-right: 1rem }
tr.dense td { color: #8a8578 } .bar { display: inline-block; height: .6rem; background: #1f6f8b; border-radius: 2px }
.track { display: inline-block; width: 6rem; background: #eae7de; border-radius: 2px; line-height: .6rem }
"""


def write_report(plan: RankPlan, path: str | os.PathLike) -> None:
    """Write one self-contained HTML page: totals, the trade-off, ranks, spectra, errors and every layer's reason."""
    pictures = "".join(f"<h2>{title}</h2>\n<img alt='{title}' src='data:image/png;base64,{_png(figure)}'>\n"
                       for title, figure in figures(plan).items())
    page = (f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>shrank plan</title>"
            f"<style>{_STYLE}</style></head>\n<body>\n<h1>What shrank does to this model</h1>\n"
            f"<p>{html.escape(plan.summary)}</p>\n{_totals(plan)}{pictures}<h2>Every layer</h2>\n{_table(plan)}\n"
            f"<script type='application/json' id='plan'>{_json(plan)}</script>\n</body></html>\n")
    with replacing(path) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")


def figures(plan: RankPlan) -> dict[str, Figure]:
    """Matplotlib figures by title: those for which the plan has what they show. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'shrank[plot]'") from error
    planned = [x for x in plan if x.shape is not None and (x.rank is not None or x.spectrum)]
    drawings = {}
    if plan.trade_off:
        drawings["What the budget could buy"] = (_draw_trade_off, (6.5, 3.2))
    if planned:
        drawings["What every layer keeps"] = (_draw_ranks, (10, max(1.5, 0.16 * len(planned) + 0.8)))
    if any(x.spectrum for x in planned):
        drawings["Singular values"] = (_draw_spectra, (10, 3.4))
    if any(x.measured is not None and x.error is not None for x in planned):
        drawings["Expected and measured error"] = (_draw_errors, (4.2, 4.0))
    found = {}
    for title, (draw, size) in drawings.items():
        found[title] = Figure(size, layout="constrained")
        axis = found[title].subplots()
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, plan, planned)
    return found


def _draw_trade_off(axis: Axes, plan: RankPlan, _: list[LayerPlan]) -> None:
    # The dense end has no error, which a logarithmic axis cannot show.
    kept, errors = zip(*plan.trade_off, strict=True)
    axis.semilogy([100 * x for x in kept], [max(x, _LEAST_ERROR) for x in errors], color=_LOW_RANK)
    if plan.spent is not None:
        axis.semilogy([100 * plan.spent[0]], [max(plan.spent[1], _LEAST_ERROR)], "o", color=_LINE, label="this plan")
        axis.legend(frameon=False)
    axis.set(xlabel="cost of the layers, % of dense", ylabel="squared error over that of no layers",
             ylim=(_LEAST_ERROR, 1.5))
    axis.grid(alpha=0.25)


def _draw_ranks(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    shares = [100 * x.params_after / x.size for x in planned]
    colours = [_DENSE if x.rank is None else _LOW_RANK for x in planned]
    axis.barh(range(len(planned)), shares, color=colours, height=0.7)
    axis.set_yticks(range(len(planned)), [x.fqn or "(root)" for x in planned], fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set(xlabel="% of the layer's weights that are kept (grey: dense)", xlim=(0, 100))


def _draw_spectra(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    shown = [x for x in planned if x.spectrum]
    for number, layer in enumerate(shown):
        places = [100 * i / (len(layer.spectrum) - 1 or 1) for i in range(len(layer.spectrum))]
        axis.semilogy(places, [max(x, 1e-6) for x in layer.spectrum], color=_LOW_RANK, linewidth=0.7,
                      alpha=0.25 + 0.5 * number / len(shown))
    axis.set(xlabel="rank, % of the largest possible", ylabel="singular value over the largest", ylim=(1e-6, 1.5))
    axis.grid(alpha=0.25)


def _draw_errors(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    points = [(x.error, x.measured) for x in planned if x.error is not None and x.measured is not None]
    most = max(max(point) for point in points) * 1.05 or 1.0
    axis.plot([0, most], [0, most], color=_DENSE, linewidth=0.8)
    axis.plot(*zip(*points, strict=True), "o", color=_LOW_RANK, markersize=4, alpha=0.7)
    axis.set(xlabel="expected relative error of the outputs", ylabel="measured", xlim=(0, most),
             ylim=(0, None))


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _totals(plan: RankPlan) -> str:
    touched, kept = (sum(getattr(x, name) for x in plan.low_rank) for name in ("size", "params_after"))
    facts = {"layers made low-rank": f"{len(plan.low_rank)} of {len(plan)}",
             "their weights": f"{touched:,} → {kept:,}",
             "the whole model": f"{plan.params_before:,} → {plan.params_after:,}",
             "kept": f"{100 * plan.params_after / max(plan.params_before, 1):.1f} %"}
    return "<div class='totals'>" + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in facts.items()) + "</div>\n"


def _table(plan: RankPlan) -> str:
    numbers = ("rank", "weights", "kept", "error", "measured")
    head = "".join(f"<th class='number'>{c}</th>" if c in numbers else f"<th>{c}</th>"
                   for c in ("layer", "kind", "shape", *numbers[:3], "", *numbers[3:], "reason"))
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(map(_row, plan)) + "\n</table>"


def _row(layer: LayerPlan) -> str:
    share = 100 * layer.params_after / layer.size if layer.size else 100
    bar = f"<span class='track'><span class='bar' style='width:{min(share, 100):.0f}%'></span></span>"
    errors = ("" if x is None else f"{x:.4f}" for x in (layer.error, layer.measured))
    texts = (layer.fqn or "(root)", layer.kind, str(layer.shape or ""))
    numbers = ("dense" if layer.rank is None else str(layer.rank), f"{layer.size:,}", f"{share:.1f} %")
    cells = [f"<td>{html.escape(x)}</td>" for x in texts] + [f"<td class='number'>{x}</td>" for x in numbers]
    cells += [f"<td>{bar}</td>", *(f"<td class='number'>{x}</td>" for x in errors)]
    kind = " class=dense" if layer.rank is None else ""
    return f"<tr{kind}>{''.join(cells)}<td>{html.escape(layer.reason)}</td></tr>"


def _json(plan: RankPlan) -> str:
    """The plan for programs that read the page; no text in it can end the script."""
    return json.dumps(plan.to_dict()).replace("<", "\\u003c")
