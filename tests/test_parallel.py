"""Compressed models in what PyTorch and transformers offer for several processes: DDP, FSDP2, tensor parallelism."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import shrank
from shrank import ColwiseParallel, RowwiseParallel, auto_fact
from tests.common.models import WIDTH, draw, hf_model, seeded, tokens
from tests.common.processes import in_processes
from tests.common.tolerances import assert_close

_DENSE = ["*0.self_attn.v_proj", "*1.mlp.gate_proj", "lm_head"]  # the same name is low-rank in one block, dense in one
_WHOLE_STATE = StateDictOptions(full_state_dict=True)
State = dict[str, Tensor]


def small_llama() -> nn.Module:
    return auto_fact(hf_model("llama"), 0.5, exclude=_DENSE)


class Block(nn.Module):
    """As of a transformer: two layers side by side, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def block() -> nn.Module:
    return auto_fact(seeded(Block), 0.6)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module, loss: Tensor) -> tuple[Tensor, State, State]:
    """The loss, its gradients, and the weights after a step."""
    model.zero_grad()
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False).step()
    return whole(loss), gradients, {name: whole(p) for name, p in model.named_parameters()}


def inputs() -> Tensor:
    return tokens(4, 8)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _data_parallel(rank: int) -> tuple[tuple, State]:
    model = DistributedDataParallel(small_llama())
    loss, gradients, weights = trained(model, loss_of(model, inputs().chunk(2)[rank]))
    dist.all_reduce(loss)
    plain = {name: value.detach() for name, value in model.module.state_dict().items()}
    return (
        loss / 2,
        *({n.removeprefix("module."): t for n, t in part.items()} for part in (gradients, weights)),
    ), plain


def _fully_sharded(rank: int) -> tuple[tuple, State]:
    model = small_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    result = trained(model, loss_of(model, inputs().chunk(2)[rank]))
    loss = result[0]
    dist.all_reduce(loss)
    state = get_model_state_dict(model, options=_WHOLE_STATE)
    again = small_llama()  # of FSDP's state dict a plain model, and the other way round
    if rank == 0:
        again.load_state_dict(state)
    set_model_state_dict(model, small_llama().state_dict(), options=_WHOLE_STATE)
    assert_close(loss_of(model, inputs()).detach(), loss_of(small_llama(), inputs()).detach())
    return (loss / 2, *result[1:]), state


def _tensor_parallel(rank: int, mesh: DeviceMesh, sequence: bool) -> tuple[tuple, State]:
    """Of a block, whose inputs and outputs are whole, or split by positions."""
    model, x = block(), draw(2, 6, WIDTH)
    layout = Shard(1) if sequence else Replicate()
    into, out = ColwiseParallel(input_layouts=layout), RowwiseParallel(output_layouts=layout)
    parallelize_module(model, mesh, {"gate": into, "up": into, "down": out})
    assert all(isinstance(p, DTensor) for p in model.parameters())
    stages = model.gate.led_unit, model.down.led_unit
    assert [s[i].weight.to_local().shape for s in stages for i in (0, 1)] == [
        (model.gate.rank, WIDTH),
        (64 // 2, model.gate.rank),
        (model.down.rank, 64 // 2),
        (WIDTH, model.down.rank),
    ]
    y = DTensor.from_local(model(x.chunk(2, 1)[rank] if sequence else x), mesh, [layout])
    loss = y.square().sum()
    return trained(model, loss), {"y": whole(y)} | get_model_state_dict(model, options=_WHOLE_STATE)


def _from_pretrained(rank: int, folder: str) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how the plan is passed
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    ids, way = inputs(), DistributedConfig(tp_size=2)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, distributed_config=way)(ids).logits, logits)
        said = [
            model.generate(ids[:, :4], max_new_tokens=4, do_sample=False, cache_implementation=cache)
            for cache in (None, "static")
        ]
    model.save_pretrained(f"{folder}-again")
    split = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return {
        "logits": logits,
        "said": said,
        "plan": model.tp_plan,
        "split": split,
        "trained": trained(model.train(), loss_of(model, ids)),
    }


def _refused(rank: int, mesh: DeviceMesh) -> list[str]:
    found = []
    pivoted = auto_fact(seeded(Block), 0.6, pivot=True)
    adapted = block()
    adapted.gate.led_unit[1] = nn.Sequential(adapted.gate.led_unit[1])
    for model in (pivoted, adapted):
        with pytest.raises(ValueError, match="cannot be split between processes") as refused:
            parallelize_module(model, mesh, {"gate": ColwiseParallel(), "down": RowwiseParallel()})
        found.append(str(refused.value))
    parallelize_module(shrank.unpivot(pivoted), mesh, {"gate": ColwiseParallel()})
    return found


def _everything(rank: int, folder: str) -> dict[str, object]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    return {
        "data parallel": _data_parallel(rank),
        "fully sharded": _fully_sharded(rank),
        "tensor parallel": _tensor_parallel(rank, mesh, False),
        "sequence parallel": _tensor_parallel(rank, mesh, True),
        "transformers": _from_pretrained(rank, folder),
        "refused": _refused(rank, mesh),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, object]:
    """What two processes make of it; both the same."""
    small_llama().save_pretrained(folder / "llama")
    first, second = in_processes(_everything, str(folder / "llama"), folder=folder)
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    return {name: (first[name], second[name]) for name in first}


def assert_alike(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name])


def assert_trained_alike(one: tuple, other: tuple) -> None:
    """Of weights after a step of Adam, whose direction is the gradient's sign, only where they went."""
    assert_close(one[0], other[0])
    assert_alike(one[1], other[1])
    assert_alike(one[2], other[2])


@pytest.mark.parametrize("name", ["data parallel", "fully sharded"])
def test_data_parallel_training_is_that_of_one_process(found, name) -> None:
    alone = small_llama()
    expected = trained(alone, loss_of(alone, inputs()))
    for result, _ in found[name]:
        assert_trained_alike(result, expected)
    state = found[name][0][1]
    assert state.keys() == alone.state_dict().keys() and not any(isinstance(t, DTensor) for t in state.values())
    assert_alike(state, alone.state_dict())


@pytest.mark.parametrize("name", ["tensor parallel", "sequence parallel"])
def test_styles_split_a_low_rank_block(found, name) -> None:
    alone = block()
    y = alone(draw(2, 6, WIDTH))
    expected = trained(alone, y.square().sum())
    for result, state in found[name]:
        assert_close(state.pop("y"), y)
        assert_trained_alike(result, expected)
    assert_alike(found[name][0][1], alone.state_dict())


def test_from_pretrained_splits_a_compressed_llama(found, folder) -> None:
    alone = small_llama()
    with torch.no_grad():
        logits = alone(inputs()).logits
    again = AutoModelForCausalLM.from_pretrained(folder / "llama-again")
    assert shrank.describe(again) == shrank.describe(alone)
    assert_alike(again.state_dict(), alone.state_dict())
    said = alone.generate(inputs()[:, :4], max_new_tokens=4, do_sample=False)
    expected = trained(alone.train(), loss_of(alone, inputs()))
    low_rank = {layer.fqn for layer in shrank.describe(alone)}
    for result in found["transformers"]:
        assert_close(result["logits"], logits)
        assert all(torch.equal(tokens, said) for tokens in result["said"])
        assert_trained_alike(result["trained"], expected)
        assert result["plan"] == alone.tp_plan  # by which others count the heads of a process
        by_columns = {n for n in result["split"] if n.endswith("led_unit.0.weight")}
        assert by_columns == {f"{n}.led_unit.0.weight" for n in low_rank if n.endswith(("o_proj", "down_proj"))}
        by_rows = {n for n in result["split"] if n.endswith("led_unit.1.weight")}
        assert by_rows == {f"{n}.led_unit.1.weight" for n in low_rank if not n.endswith(("o_proj", "down_proj"))}


def test_what_cannot_be_split_is_refused_in_words(found) -> None:
    for pivoted, adapted in found["refused"]:
        assert "call shrank.unpivot(model) first, or compress with pivot=False" in pivoted
        assert "a stage of it is a torch.nn.modules.container.Sequential" in adapted
