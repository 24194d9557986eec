"""auto_fact: the ancestors' call, their defects as regression tests, and what is new."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn

import shrank
from shrank import Energy, auto_fact
from shrank.lr_module import CED, LED
from tests.common.tolerances import assert_close


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


def test_the_ancestors_positional_arguments() -> None:
    names = list(inspect.signature(auto_fact).parameters)[:7]
    assert names == ["module", "rank", "groups_out", "skip_high_groups", "submodules", "deepcopy", "fact_led_unit"]
    net = model()
    small = auto_fact(net, 8, False, True, [net[0]], True, False)
    assert small is not net and type(small[0]) is LED and type(small[2]) is nn.Linear and type(net[0]) is nn.Linear


def test_in_place_returns_the_same_model() -> None:
    net = model()
    assert auto_fact(net, 8) is net and type(net[0]) is LED


class Switching(nn.Module):
    """Puts another module in the place of one of its own when it is called, as BigBird does for short texts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.body = nn.Sequential(*self.body)
        return self.body(x)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few tokens
def test_a_model_that_changes_its_modules_as_it_runs_gets_its_layers() -> None:
    torch.manual_seed(0)
    data = torch.randn(4, 64, 64)
    for rank in (8, shrank.Budget(keep_params=0.5), shrank.make_plan(Switching(), 8)):
        net = auto_fact(Switching(), rank, calibrate=list(data))
        assert net.shrank_plan.low_rank
        assert net.shrank_plan.params_after == sum(p.numel() for p in net.parameters())


def test_a_trained_weight_is_approximated_not_redrawn() -> None:
    """Greenformer's default solver draws at random."""
    weight = model()[0].weight
    twin = auto_fact(model(), 32)[0]
    assert (twin.dense_weight() - weight).norm() < 0.7 * weight.norm()


def test_grouped_convolutions_are_factorised_per_group() -> None:
    """One SVD across the groups is worse than zero: relative error 1.19."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 64, 3, groups=4), torch.randn(2, 32, 9, 9)
    for groups_out in (False, True):
        exact = auto_fact(conv, 10**6, groups_out, deepcopy=True, allow_growth=True)
        assert type(exact) is CED
        assert_close(exact(x), conv(x))
        half = auto_fact(conv, 24, groups_out, deepcopy=True, allow_slower=True)
        assert (half(x) - conv(x)).norm() < (conv(x) - conv.bias[:, None, None]).norm()


def test_convolutions_use_their_true_break_even_rank() -> None:
    """Without the kernel in the formula, 64 -> 64 3x3 would refuse ranks from 32; the true limit is 57."""
    assert type(auto_fact(nn.Conv2d(64, 64, 3), 50, allow_slower=True)) is CED
    with pytest.warns(UserWarning, match="no layer was replaced"):
        assert type(auto_fact(nn.Conv2d(64, 64, 3), 58, allow_slower=True)) is nn.Conv2d


def test_a_linear_under_the_root_is_not_skipped() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

    assert type(auto_fact(Wrapper(), 8).fc) is LED


def test_a_plan_is_carried_out_as_it_stands() -> None:
    plan = shrank.make_plan(model(), 8).with_rank("2", None)
    small = auto_fact(model(), plan)
    assert [type(m) for m in small] == [LED, nn.ReLU, nn.Linear]
    with pytest.raises(TypeError, match="without further options"):
        auto_fact(model(), plan, round_to=8)


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    other = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Linear(40, 40))
    plan = shrank.make_plan(other, 8)
    net = model()
    says = r"does not fit the model:\n  '2': it is 64x96 here and 32x96 in the plan\n  '3': the model has no such layer"
    with pytest.raises(ValueError, match=says):
        auto_fact(net, plan)
    assert type(net[0]) is nn.Linear


def test_an_edited_rank_beyond_full_is_refused() -> None:
    plan = shrank.make_plan(model(), 8).with_rank("0", 65)
    with pytest.raises(ValueError, match=r"rank 65 is not a multiple of 1 in 1\.\.64"):
        auto_fact(model(), plan)


def test_the_plan_that_was_carried_out_stays_with_the_model(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="shrank"):
        small = auto_fact(model(), 8)
    assert small.shrank_plan["0"].rank == 8 and small.shrank_plan["0"].error > 0
    assert "2 of 2 layers low-rank" in caplog.text


def test_low_rank_layers_are_left_alone_unless_opened() -> None:
    net = auto_fact(model(), 30)
    assert [x.reason for x in shrank.make_plan(net, 8)] == ["already low-rank"] * 2
    with pytest.warns(DeprecationWarning, match="merge the model and factorise it once") as told:
        opened = auto_fact(net, 8, fact_led_unit=True)
    assert told[0].filename == __file__
    assert type(opened[0].led_unit[0]) is LED
    assert opened(torch.randn(3, 64)).shape == (3, 64)


def test_training_reduces_the_loss() -> None:
    small = auto_fact(model(), 8)
    x = torch.randn(256, 64)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (small(x) - x.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_it_works_in_inference_mode_and_its_result_still_trains() -> None:
    net, x = model(), torch.randn(4, 64)
    with torch.inference_mode():
        copied = auto_fact(net, 8, deepcopy=True)
        in_place = auto_fact(net, 8)
        assert_close(copied(x), in_place(x))
    in_place(x).sum().backward()
    assert all(p.grad is not None for p in in_place.parameters())


def test_the_random_stream_of_the_user_is_not_touched(tmp_path) -> None:
    shrank.save(auto_fact(model(), 8), tmp_path / "m.safetensors")
    other = model()
    state = torch.random.get_rng_state()
    shrank.load(other, tmp_path / "m.safetensors")
    auto_fact(shrank.merge(other), 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_working_on_layers_in_parallel_changes_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64 + 8 * i, 72 + 8 * i) for i in range(12)))
    plans, states = [], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        plans.append(shrank.make_plan(net, Energy(0.7)))
        states.append(auto_fact(net, 0.5, deepcopy=True).state_dict())
    assert plans[0].diff(plans[1]) == {}
    for one, other in zip(plans[0], plans[1], strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-6)
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert_close(one, other)
