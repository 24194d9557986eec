"""What a plan does, as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from typing import TYPE_CHECKING

from ..planning.plan import LayerPlan, RankPlan
from ..util.files import write_text
from .drawings import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def report(plan: RankPlan, path: str | os.PathLike) -> None:
    """Write a plan as one self-contained HTML page: totals, the trade-off, ranks, spectra, errors, and the reasons.

    Args:
        plan: The plan, such as `model.shrank_plan` of a compressed model.
        path: The file to write; an older one is replaced in one step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures = "".join(
        f"<h2>{title}</h2>\n<img alt='{title}' src='data:image/png;base64,{_png(figure)}'>\n"
        for title, figure in figures(plan).items()
    )
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>shrank plan</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>What shrank does to this model</h1>\n"
        f"<p>{html.escape(plan.summary)}</p>\n{_totals(plan)}{pictures}<h2>Every layer</h2>\n{_table(plan)}\n"
        f"<script type='application/json' id='plan'>{_json(plan)}</script>\n</body></html>\n"
    )
    write_text(path, page)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _totals(plan: RankPlan) -> str:
    touched, kept = (sum(getattr(x, name) for x in plan.low_rank) for name in ("size", "params_after"))
    facts = {
        "layers made low-rank": f"{len(plan.low_rank)} of {len(plan)}",
        "their weights": f"{touched:,} → {kept:,}",
        "the whole model": f"{plan.params_before:,} → {plan.params_after:,}",
        "kept": f"{100 * plan.params_after / max(plan.params_before, 1):.1f} %",
    }
    if any(layer.storage.grid for layer in plan):
        facts["bytes of these layers, of 16 bits dense"] = (
            f"{sum(x.size * 2 for x in plan.changed):,} → {sum(x.bytes() for x in plan.changed):,}"
        )
    return "<div class='totals'>" + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in facts.items()) + "</div>\n"


def _table(plan: RankPlan) -> str:
    numbers = ("rank", "weights", "kept", "error", "measured")
    head = "".join(
        f"<th class='number'>{c}</th>" if c in numbers else f"<th>{c}</th>"
        for c in ("layer", "kind", "shape", *numbers[:3], "", *numbers[3:], "reason")
    )
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(map(_row, plan)) + "\n</table>"


def _row(layer: LayerPlan) -> str:
    share = 100 * layer.params_after / layer.size if layer.size else 100
    bar = f"<span class='track'><span class='bar' style='width:{min(share, 100):.0f}%'></span></span>"
    errors = ("" if x is None else f"{x:.4f}" for x in (layer.error, layer.measured))
    texts = (layer.fqn or "(root)", layer.kind, str(layer.shape or ""))
    stored = f" {layer.storage}" if layer.storage.grid else ""
    rank = ("dense" if layer.rank is None else str(layer.rank)) + stored
    numbers = (rank, f"{layer.size:,}", f"{share:.1f} %")
    cells = [f"<td>{html.escape(x)}</td>" for x in texts] + [f"<td class='number'>{x}</td>" for x in numbers]
    cells += [f"<td>{bar}</td>", *(f"<td class='number'>{x}</td>" for x in errors)]
    kind = "" if layer.changes else " class=dense"
    return f"<tr{kind}>{''.join(cells)}<td>{html.escape(layer.reason)}</td></tr>"


def _json(plan: RankPlan) -> str:
    """The plan for programs that read the page; no text in it can end the script."""
    return json.dumps(plan.to_dict()).replace("<", "\\u003c")
