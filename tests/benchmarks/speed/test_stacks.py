"""The stacks: every linear layer of the twin is low-rank, and it computes what the dense one would."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shrank
from benchmarks.speed import stacks
from tests.common.tolerances import assert_close


@pytest.mark.parametrize("config", stacks.TINY, ids=lambda config: config.name)
def test_the_twin_is_low_rank_and_runs(config: stacks.Config) -> None:
    big = stacks.dense(config, "cpu", torch.float32)
    small = stacks.low_rank(big)
    linears = [module for module in big.modules() if isinstance(module, nn.Linear)]
    twins = [module for module in small.modules() if isinstance(module, shrank.LED)]
    assert len(twins) == len(linears) == config.layers * (7 if config.gated else 6)
    x = torch.randn(2, 3, config.hidden)
    assert small(x).shape == big(x).shape == x.shape
    assert_close(shrank.merge(small)(x), small(x))


def test_llama_is_causal_and_minilm_is_not() -> None:
    for config in stacks.TINY:
        model, x = stacks.dense(config, "cpu", torch.float32), torch.randn(1, 4, config.hidden)
        changed = x.clone()
        changed[:, -1] += 1
        assert torch.equal(model(x)[:, 0], model(changed)[:, 0]) is config.gated


def test_rows_hold_every_workload_and_provider() -> None:
    rows = stacks.measure(stacks.TINY[0], "cpu", torch.float32, rounds=1)
    assert [(row["mode"], row["provider"]) for row in rows] == [("eager", "dense"), ("eager", "LED torch")]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e6 * 2 * 8 / row["median_us"])
    assert rows[0]["times_faster"] == 1
