"""What a model repeats."""

from __future__ import annotations

import pytest
from torch import nn

from shrank.model.blocks import blocks_of
from tests.common.models import WIDTH, hf_model


@pytest.mark.parametrize(
    ("family", "lists"),
    [
        ("llama", {"model.layers"}),
        ("bert", {"bert.encoder.layer"}),
        ("gpt2", {"transformer.h"}),
        ("t5", {"encoder.block", "decoder.block"}),
        ("vit", {"vit.layers"}),
    ],
)
def test_of_transformers_they_are_the_layers(family: str, lists: set[str]) -> None:
    blocks = blocks_of(hf_model(family))
    outside = {name for name, block in blocks.items() if name == block}
    inside = {block for block in blocks.values()} - outside
    assert {block.rpartition(".")[0] for block in inside} == lists and len(inside) == 2 * len(lists)
    assert all(name.startswith(f"{block}.") for name, block in blocks.items() if name not in outside)
    assert all(not name.startswith(tuple(lists)) for name in outside)


def test_an_entry_that_holds_most_is_looked_into() -> None:
    linear = lambda: nn.Linear(WIDTH, WIDTH)  # noqa: E731
    model = nn.Sequential(nn.Sequential(*(nn.Sequential(linear(), linear()) for _ in range(3))), linear())
    assert blocks_of(model) == {
        **{f"0.{i}.{j}": f"0.{i}" for i in range(3) for j in range(2)},
        "1": "1",
    }


def test_what_has_no_forward_is_no_block() -> None:
    model = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2)) for _ in range(2))
    assert set(blocks_of(model).values()) == {"0.0", "0.1", "1.0", "1.1"}
