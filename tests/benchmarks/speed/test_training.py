"""The training benchmark: its ops compute the stack's own function, and what it counts as kept is kept."""

from __future__ import annotations

import json

import torch
from torch import nn

from benchmarks.speed import training
from tests.common.tolerances import assert_close


def test_the_ops_compute_what_the_layers_do() -> None:
    models = training.providers(training.TINY[0], "cpu", torch.float32, rank=16)
    x = torch.randn(2, 8, 64)
    exact = models["two calls"].double()(x.double())
    models["two calls"].float()
    assert_close(models["ops"](x), exact, models["two calls"](x))


def test_what_is_kept_is_counted_once_and_without_parameters() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    assert training.kept_bytes(layer, x) == 0, "the input and the weight are there anyway"
    assert training.kept_bytes(nn.Sequential(layer, nn.GELU(), nn.Linear(4, 2)), x) == 2 * 3 * 4 * 4  # z, and its GELU


def test_a_bert_layer_keeps_a_fifth_less_by_the_ops() -> None:
    config = training.CONFIGS[0]
    assert (config.layers, config.hidden, config.intermediate) == (12, 768, 3072)
    one = training.Config("a layer", 1, 768, 12, 12, 3072, False, ((1, 128),))
    models, x = training.providers(one, "cpu", torch.float32), torch.randn(1, 128, 768)
    kept = {name: training.kept_bytes(model, x) for name, model in models.items()}
    assert kept["ops"] <= 0.8 * kept["two calls"], kept


def test_rows_hold_every_provider(tmp_path) -> None:
    training.main(["--tiny", "--out", str(tmp_path / "rows.json")])
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["provider"] for row in written["rows"]] == ["dense", "two calls", "ops"]
    assert all(row["milliseconds"] > 0 and row["kept_bytes"] > 0 for row in written["rows"])
    assert written["torch"] == torch.__version__
