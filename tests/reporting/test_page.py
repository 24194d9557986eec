"""The report: one page that needs nothing else, figures, and errors measured beside the expected ones."""

from __future__ import annotations

import copy
import html.parser
import json
import re

import pytest
import torch

from shrank import (
    Budget,
    Calibrate,
    LayerPlan,
    RankPlan,
    auto_fact,
    calibrate,
    figures,
    make_plan,
    measure_errors,
    report,
)
from tests.common.models import WIDTH, Mixed, assert_untouched, draw, fingerprint, mlp, seeded


def planned(keep: float = 0.5) -> RankPlan:
    model = mlp()
    return make_plan(model, Budget(keep_params=keep), calibration=calibrate(model, [draw(200, WIDTH)]))


class Tags(html.parser.HTMLParser):
    """Checks that tags close in order and collects what pages may load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_everything(tmp_path) -> None:
    plan = planned()
    report(plan, tmp_path / "report.html")
    page, tags = (tmp_path / "report.html").read_text(), Tags()
    tags.feed(page)
    assert not tags.open and len(tags.loads) == 3 and all(x.startswith("data:image/png;base64,") for x in tags.loads)
    for layer in plan:
        assert f"<td>{layer.fqn}</td>" in page and layer.reason in page
    assert f"{plan.params_before:,} → {plan.params_after:,}" in page
    stored = re.search(r"<script type='application/json' id='plan'>(.*?)</script>", page).group(1)
    assert RankPlan.from_dict(json.loads(stored)) == plan


def test_names_cannot_break_the_page(tmp_path) -> None:
    bad = "</script><b>&'x"
    plan = RankPlan((LayerPlan(bad, "Linear", 10, reason=bad),))
    report(plan, tmp_path / "report.html")
    page, tags = (tmp_path / "report.html").read_text(), Tags()
    tags.feed(page)
    assert not tags.open and "<b>&'" not in page and page.count("</script>") == 1


def test_figures_are_of_what_is_known() -> None:
    assert list(figures(planned())) == ["What the budget could buy", "What every layer keeps", "Singular values"]
    plain = make_plan(mlp(), 4)
    assert list(figures(plain)) == ["What every layer keeps"]
    assert figures(RankPlan(())) == {}
    curve = figures(planned())["What the budget could buy"].axes[0].lines
    assert len(curve) == 2 and len(curve[1].get_xdata()) == 1  # the trade-off, and this plan


@pytest.mark.parametrize(
    "build, x", [(mlp, (200, WIDTH)), (lambda: seeded(Mixed), (100, 16, 8, 8))], ids=["mlp", "mixed"]
)
def test_on_the_calibration_data_measured_errors_are_the_expected_ones(build, x) -> None:
    model, x = build(), draw(*x)
    small = auto_fact(
        copy.deepcopy(model),
        Budget(keep_params=0.6),
        groups_out=True,
        allow_slower=True,
        calibrate=Calibrate([x], loss="none"),
    )
    found = measure_errors(small.shrank_plan, model, small, [x])
    assert found.low_rank
    for layer in found.low_rank:
        # Expected errors count a little of what the data did not show: shrinkage.
        assert layer.measured == pytest.approx(layer.error, rel=0.35, abs=0.02), layer.fqn
    assert "Expected and measured error" in figures(found)
    assert not any(m._forward_hooks for m in model.modules())


def test_measuring_changes_neither_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.Dropout())
    small = auto_fact(model, 4, deepcopy=True)
    before = [fingerprint(m) for m in (model, small)]
    measure_errors(small.shrank_plan, model, small, [draw(9, WIDTH)])
    for m, state in zip((model, small), before, strict=True):
        assert_untouched(m, state)


def test_measured_errors_are_relative_to_the_outputs() -> None:
    model, x = mlp(1), draw(50, WIDTH)
    small = auto_fact(copy.deepcopy(model), 4)
    (layer,) = measure_errors(small.shrank_plan, model, small, [x]).low_rank
    y = model(x).detach()
    expected = ((small(x) - y).norm() / (y - y.mean(0)).norm()).item()
    assert layer.measured == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="not in both models"):
        measure_errors(small.shrank_plan, torch.nn.Sequential(), small, [x])


def test_bars_tell_forms_and_bytes_where_there_are_few_bits(tmp_path) -> None:
    model = mlp(5)
    found = calibrate(model, [draw(200, WIDTH)], inputs=True)
    plan = make_plan(model, Budget(keep_bytes=0.1, group_sizes=(8,), correction_ranks=(2,)), calibration=found)
    title = "What every layer keeps"
    axis = figures(plan)[title].axes[0]
    assert "bytes" in axis.get_xlabel()
    widths = {round(bar.get_width(), 3) for bar in axis.patches}
    shown = [layer for layer in plan if layer.changes or layer.spectrum]
    assert widths == {round(100 * layer.bytes() / (2 * layer.size), 3) for layer in shown}
    named = {text.get_text() for text in axis.get_legend().get_texts()}
    assert "few bits" in named and named <= {
        "dense",
        "low rank",
        "few bits",
        "low rank in few bits",
        "few bits, corrected",
    }
    assert "bytes" not in figures(planned())[title].axes[0].get_xlabel()
    report(plan, tmp_path / "report.html")
    assert "bytes of these layers" in (tmp_path / "report.html").read_text()
