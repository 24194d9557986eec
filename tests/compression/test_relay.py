"""Blocks run one at a time, with what they are called with in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shrank.calibration.batches import Batch, as_batches
from shrank.compression.relay import CannotRunAlone, Links, Relay
from tests.common.models import WIDTH, draw, hf_inputs, hf_model, seeded
from tests.compression.test_refine import Block, model_of_blocks


def relay_of(model: nn.Module, blocks: list[str], data: list) -> tuple[Links, Relay]:
    batches = [Batch(b.args, b.kwargs, number=i) for i, b in enumerate(as_batches(data))]
    links = Links(model, blocks)
    with torch.no_grad():
        for batch in batches:
            with links.observed(batch.number):
                batch.call(model)
    return links, Relay(lambda: model, links, batches)


def outputs_of(model: nn.Module, blocks: list[str], batch: Batch) -> dict[str, Tensor]:
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.update({name: y}))
        for name in blocks
    ]
    with torch.no_grad():
        batch.call(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_block_does_alone_what_it_does_in_the_model(family: str) -> None:
    model = hf_model(family)
    model.config.use_cache = False
    blocks = [
        name
        for name, m in model.named_modules()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    ]
    links, relay = relay_of(model, blocks, [hf_inputs(model)] * 2)
    first = Counter()
    model.get_submodule(blocks[0]).register_forward_hook(lambda *_: first.update([1]))
    for block in blocks:
        links.require_alone(block, relay)
        for number in (0, 1):
            expected = outputs_of(model, blocks, relay._batches[number])[block]
            assert torch.equal(relay.run(block, number), expected)
            assert (links.of(block, number) is None) == (block == blocks[0])


def test_every_block_runs_once_to_reach_the_next() -> None:
    model, calls = model_of_blocks(4), Counter()
    _, relay = relay_of(model, ["0", "1", "2", "3"], [draw(5, WIDTH)])
    for name in "0123":
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    for name in "0123":
        relay.arguments(name, 0)
    assert calls == {"0": 1, "1": 1, "2": 1}


def test_what_was_changed_is_run_anew() -> None:
    model = model_of_blocks(3)
    _, relay = relay_of(model, ["0", "1", "2"], [draw(5, WIDTH)])
    before = relay.arguments("1", 0)[0][0]
    relay.changed("0")
    with torch.no_grad():
        model[0].up.weight.zero_()
    after = relay.arguments("1", 0)[0][0]
    assert not torch.equal(before, after) and torch.equal(after, model[0](draw(5, WIDTH)))


class Between(nn.Module):
    """Does something to what one block returns before the next gets it: in place, or not."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.change = nn.ModuleList([Block(), Block()]), change

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.change(self.blocks[0](x)))


@pytest.mark.parametrize("change", [lambda x: x * 2, lambda x: x.mul_(2)], ids=["anew", "in place"])
def test_what_the_model_computes_between_blocks_is_run_by_the_model(change: Callable[[Tensor], Tensor]) -> None:
    model, x = seeded(lambda: Between(change)), draw(5, WIDTH)
    links, relay = relay_of(model, ["blocks.0", "blocks.1"], [x])
    assert links.of("blocks.1", 0) is None
    with torch.no_grad():
        assert torch.equal(relay.run("blocks.1", 0), model(x))


def test_a_block_that_runs_twice_hands_nothing_on() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.blocks[0](x)))

    model, x = seeded(Twice), draw(5, WIDTH)
    links, relay = relay_of(model, ["blocks.0", "blocks.1"], [x])
    with pytest.raises(CannotRunAlone, match="several times"):
        links.require_alone("blocks.0", relay)
    with torch.no_grad():
        assert torch.equal(relay.run("blocks.1", 0), model(x))


def test_a_block_that_shares_an_object_with_the_model_cannot_run_alone() -> None:
    model = hf_model("llama")  # whose cache knows what it did before
    blocks = ["model.layers.0", "model.layers.1"]
    links, relay = relay_of(model, blocks, [hf_inputs(model)])
    for block in blocks:
        with pytest.raises(CannotRunAlone, match="shares an object"):
            links.require_alone(block, relay)
