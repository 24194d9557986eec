"""oneDNN's products on a CPU: that they compute what PyTorch's calls do. Where they run: test_cpu.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.ops import onednn, reference
from tests.common import gated_cases, linear_cases
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.ops import doubled
from tests.common.tolerances import assert_close

LARGE = LinearCase((7,), 384, 500, 160, True, "gelu", True)
LARGE_GATE = GatedCase((7,), 384, 500, 180, 160)


def is_not_empty(case: LinearCase | GatedCase) -> bool:
    return all(each.numel() for each in case.tensors(torch.float32, "cpu") if isinstance(each, torch.Tensor))


@pytest.mark.parametrize(
    "case",
    list(filter(is_not_empty, [LARGE, *linear_cases.ENDS, *linear_cases.SHAPES, *linear_cases.MATRICES])),
    ids=str,
)
def test_a_linear_layer_is_as_good_as_pytorchs(case: LinearCase) -> None:
    arguments = case.tensors(torch.float32, "cpu")
    found = onednn.low_rank_linear(*arguments)
    assert_close(found, reference.low_rank_linear(*doubled(arguments)), reference.low_rank_linear(*arguments))


@pytest.mark.parametrize(
    "case", list(filter(is_not_empty, [LARGE_GATE, *gated_cases.ENDS, *gated_cases.SHAPES])), ids=str
)
def test_a_gated_layer_is_as_good_as_pytorchs(case: GatedCase) -> None:
    arguments = case.tensors(torch.float32, "cpu")
    found = onednn.low_rank_gated(*arguments)
    assert_close(found, reference.low_rank_gated(*doubled(arguments)), reference.low_rank_gated(*arguments))


def test_inputs_are_left_as_they_are() -> None:
    """Sums and products are made in place, of the results."""
    for case, op in ((LARGE, onednn.low_rank_linear), (LARGE_GATE, onednn.low_rank_gated)):
        arguments = case.tensors(torch.float32, "cpu")
        before = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        op(*arguments)
        assert all(
            torch.equal(one, other) for one, other in zip(arguments, before, strict=True) if isinstance(one, Tensor)
        )


def test_two_halves_of_one_layer_share_h(monkeypatch: pytest.MonkeyPatch) -> None:
    products, product = [], onednn.product
    monkeypatch.setattr(onednn, "product", lambda *given: products.append(given) or product(*given))
    x, down, up, *_ = LARGE.tensors(torch.float32, "cpu")
    halves = up.chunk(2)
    found = onednn.low_rank_gated(x, down, halves[0], None, down, halves[1], None)
    assert len(products) == 3
    assert_close(found, reference.low_rank_gated(x, down, halves[0], None, down, halves[1], None))
