"""What a server's processes hold of a layer: together the whole of it, in the order in which parts are stacked."""

from __future__ import annotations

import pytest
import torch

from shrank.linalg import Shape
from shrank.planning.plan import LayerPlan, RankPlan
from shrank.serving.shares import Slice, require_built, served_layers, shares
from tests.common.models import draw

NAMES = ("q_proj", "k_proj", "v_proj")


def planned(fqn: str, N: int, K: int, rank: int | None, **changes: object) -> LayerPlan:
    return LayerPlan(fqn, **{"kind": "Linear", "size": N * K, "shape": Shape(N, K), "rank": rank, **changes})


PLANS = {"q_proj": planned("q_proj", 16, 8, 3), "v_proj": planned("v_proj", 8, 8, 2)}


def slices(process: int, processes: int, kv_heads: int) -> list[Slice]:
    """16 outputs of q, and 8 of k and v each, of which processes hold the same where they are more than heads."""
    replicas = max(1, processes // kv_heads)
    kv = Slice.of(8 * replicas // processes, process // replicas, processes // replicas)
    return [Slice.of(16 // processes, process, processes), kv, kv]


@pytest.mark.parametrize(("processes", "kv_heads"), [(1, 2), (2, 2), (4, 2)])
def test_rows_of_all_processes_are_the_layer(processes: int, kv_heads: int) -> None:
    whole = [draw(n, 3) for n in (16, 8, 8)]
    held = [shares(NAMES, PLANS, slices(p, processes, kv_heads), Slice.of(8)) for p in range(processes)]
    replicas = max(1, processes // kv_heads)
    for number, each in enumerate((1, replicas, replicas)):
        parts = [held[p][number].rows_of(whole[number]) for p in range(0, processes, each)]
        assert torch.equal(torch.cat(parts), whole[number])
        assert all(len(part) == held[0][number].outputs for part in parts)
    assert [share.rank for share in held[0]] == [3, None, 2]
    assert [share.has_all_rows for share in held[0]] == [processes == 1] * 3


def test_columns_of_all_processes_are_the_layer() -> None:
    weight, plan = draw(16, 8), {"o_proj": planned("o_proj", 16, 8, 3)}
    held = [shares(["o_proj"], plan, [Slice.of(16)], Slice.of(2, p, 4))[0] for p in range(4)]
    assert torch.equal(torch.cat([share.columns_of(weight) for share in held], 1), weight)
    assert all(torch.equal(share.rows_of(weight), weight) and share.has_all_rows for share in held)


def test_a_layer_that_the_server_splits_in_parts_is_split_in_each() -> None:
    weight, plan = draw(32, 8), {"qkv_proj": planned("qkv_proj", 32, 8, 3)}
    held = [shares(["qkv_proj"], plan, slices(p, 2, 2), Slice.of(8))[0].rows_of(weight) for p in range(2)]
    q, k, v = weight.split([16, 8, 8])
    for p, rows in enumerate(held):
        assert torch.equal(rows, torch.cat([part.chunk(2)[p] for part in (q, k, v)]))


def test_a_dense_layer_is_what_the_others_leave() -> None:
    parts = [Slice.of(n) for n in (16, 8, 8, 4)]
    one, other = shares(["qkv", "z"], {"z": planned("z", 4, 8, 2)}, parts, Slice.of(8))
    assert (one.whole, other.whole) == ((32, 8), (4, 8)) and (one.rank, other.rank) == (None, 2)


def test_words_that_are_too_few_for_the_processes_are_padded_with_zeros() -> None:
    head, plan = draw(10, 8), {"lm_head": planned("lm_head", 10, 8, 2)}
    rows = [Slice(0, 8, 10), Slice(8, 2, 10, padding=6)]
    held = [shares(["lm_head"], plan, [each], Slice.of(8))[0].rows_of(head) for each in rows]
    assert torch.equal(torch.cat(held)[:10], head) and not torch.cat(held)[10:].any() and len(held[1]) == 8
    bias = shares(["lm_head"], plan, [rows[1]], Slice.of(8))[0].rows_of(head[:, 0])
    assert bias.shape == (8,) and torch.equal(bias[:2], head[8:, 0])


REFUSED = {
    "outputs": (planned("q_proj", 12, 8, 3), "q_proj: the plan says 12x8, the server has 16x8"),
    "inputs": (planned("q_proj", 16, 4, 3), "q_proj: the plan says 16x4, the server has 16x8"),
    "rank": (planned("q_proj", 16, 8, 9), "q_proj: rank 9 is too large for a layer of 16x8"),
    "groups": (planned("q_proj", 16, 8, 2, shape=Shape(16, 8, 2, 2, 2)), "q_proj: a layer in groups"),
}


@pytest.mark.parametrize(("layer", "says"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_is_refused(layer: LayerPlan, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shares(NAMES, {"q_proj": layer}, slices(0, 1, 2), Slice.of(8))


def test_parts_that_are_nobodys_are_refused() -> None:
    parts = [Slice.of(n) for n in (16, 8, 8)]
    for names, plan in ((["a", "b"], {}), (["a", "b"], {"a": planned("a", 12, 8, 2)})):
        with pytest.raises(ValueError, match=r"stacks a, b into parts of \[16, 8, 8\] outputs, and nothing says"):
            shares(names, plan, parts, Slice.of(8))


def test_only_linear_layers_are_served() -> None:
    layers = tuple(planned(f"c{i}", 16, 8, 2, kind="Conv2d") for i in range(7))
    with pytest.raises(ValueError, match=r"c0 is a Conv2d.*and 2 more; .*shrank merge"):
        served_layers(RankPlan((*layers, planned("q_proj", 16, 8, 3))))
    inner = planned("q_proj.led_unit.0", 3, 8, 1)
    with pytest.raises(ValueError, match=r"low-rank in turn are not served: q_proj.led_unit.0"):
        served_layers(RankPlan((planned("q_proj", 16, 8, 3), inner)))
    assert list(served_layers(RankPlan((planned("q_proj", 16, 8, 3), planned("k_proj", 8, 8, None))))) == ["q_proj"]


def test_layers_that_nobody_built_are_named() -> None:
    require_built(PLANS, {"q_proj", "v_proj", "o_proj"})
    with pytest.raises(ValueError, match="in place of v_proj;"):
        require_built(PLANS, {"q_proj"})
