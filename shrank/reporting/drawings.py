"""What a plan does, as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..planning.plan import LayerPlan, RankPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOW_RANK, _DENSE, _LINE = "#1f6f8b", "#b9b4a7", "#c8553d"
_LEAST_ERROR = 1e-6
# What a layer became: the colour of its bar.
_FORMS = {
    "dense": _DENSE,
    "low rank": _LOW_RANK,
    "few bits": "#d8a13a",
    "low rank in few bits": "#7a4f9a",
    "few bits, corrected": "#5d8a3a",
}


def figures(plan: RankPlan) -> dict[str, Figure]:
    """Draw what a plan knows.

    Args:
        plan: The plan, such as `model.shrank_plan` of a compressed model.

    Returns:
        Matplotlib figures by title. A figure is left out if the plan lacks what it shows: the trade-off and the
        singular values need a budget, the measured errors `shrank.measure_errors`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'shrank[plot]'") from error
    planned = [x for x in plan if x.shape is not None and (x.changes or x.spectrum)]
    drawings = {}
    if plan.trade_off:
        drawings["What the budget could buy"] = (_draw_trade_off, (6.5, 3.2))
    if planned:
        drawings["What every layer keeps"] = (_draw_ranks, (10, max(1.5, 0.16 * len(planned) + 0.8)))
    if any(x.spectrum for x in planned):
        drawings["Singular values"] = (_draw_spectra, (10, 3.4))
    if any(x.measured is not None and x.error is not None for x in planned):
        drawings["Expected and measured error"] = (_draw_errors, (4.2, 4.0))
    drawn = {}
    for title, (draw, size) in drawings.items():
        drawn[title] = Figure(size, layout="constrained")
        axis = drawn[title].subplots()
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, plan, planned)
    return drawn


def _draw_trade_off(axis: Axes, plan: RankPlan, _: list[LayerPlan]) -> None:
    # The dense end has no error, which a logarithmic axis cannot show.
    kept, errors = zip(*plan.trade_off, strict=True)
    axis.semilogy([100 * x for x in kept], [max(x, _LEAST_ERROR) for x in errors], color=_LOW_RANK)
    if plan.spent is not None:
        axis.semilogy([100 * plan.spent[0]], [max(plan.spent[1], _LEAST_ERROR)], "o", color=_LINE, label="this plan")
        axis.legend(frameon=False)
    axis.set(
        xlabel="cost of the layers, % of dense", ylabel="squared error over that of no layers", ylim=(_LEAST_ERROR, 1.5)
    )
    axis.grid(alpha=0.25)


def _draw_ranks(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    in_bytes = any(x.storage.grid for x in planned)
    shares = [100 * (x.bytes() / (2 * x.size) if in_bytes else x.params_after / x.size) for x in planned]
    forms = [_form(x) for x in planned]
    for form in (form for form in _FORMS if form in forms):
        places = [number for number, of_layer in enumerate(forms) if of_layer == form]
        axis.barh(places, [shares[n] for n in places], color=_FORMS[form], height=0.7, label=form)
    axis.legend(frameon=False, fontsize=8, ncols=len(_FORMS), loc="lower left", bbox_to_anchor=(0, 1))
    axis.set_yticks(range(len(planned)), [x.fqn or "(root)" for x in planned], fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    unit = "% of the layer's bytes in 16 bits" if in_bytes else "% of the layer's weights that are kept"
    axis.set(xlabel=unit, xlim=(0, 100))


def _form(layer: LayerPlan) -> str:
    if layer.rank is None:
        return "few bits" if layer.storage.grid else "dense"
    if layer.storage.corrected:
        return "few bits, corrected"
    return "low rank in few bits" if layer.storage.grid else "low rank"


def _draw_spectra(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    shown = [x for x in planned if x.spectrum]
    for number, layer in enumerate(shown):
        places = [100 * i / (len(layer.spectrum) - 1 or 1) for i in range(len(layer.spectrum))]
        axis.semilogy(
            places,
            [max(x, 1e-6) for x in layer.spectrum],
            color=_LOW_RANK,
            linewidth=0.7,
            alpha=0.25 + 0.5 * number / len(shown),
        )
    axis.set(xlabel="rank, % of the largest possible", ylabel="singular value over the largest", ylim=(1e-6, 1.5))
    axis.grid(alpha=0.25)


def _draw_errors(axis: Axes, plan: RankPlan, planned: list[LayerPlan]) -> None:
    points = [(x.error, x.measured) for x in planned if x.error is not None and x.measured is not None]
    most = max(max(point) for point in points) * 1.05 or 1.0
    axis.plot([0, most], [0, most], color=_DENSE, linewidth=0.8)
    axis.plot(*zip(*points, strict=True), "o", color=_LOW_RANK, markersize=4, alpha=0.7)
    axis.set(xlabel="expected relative error of the outputs", ylabel="measured", xlim=(0, most), ylim=(0, None))
