"""Every batch and every call counts: layers that few batches reach, that are called on several inputs or on none."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shrank import Budget, Calibrate, Calibration, auto_fact, calibrate, make_plan
from shrank.calibration.sharing import Inputs
from shrank.model.adapters import target
from tests.common.models import WIDTH, draw, mlp, seeded
from tests.common.tolerances import assert_close


class Two(nn.Module):
    """Long batches take another layer than short ones, and that one has a wider neighbour of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long, self.beside = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 64)
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) if len(x) < 5 else torch.cat([self.long(x), self.beside(x)], -1)


class Joint(nn.Module):
    """Keys of two inputs, of which one is the queries' too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.k(c), self.v(x), self.v(c)], -1)


class Interleaved(nn.Module):
    """Both inputs go through one layer before they go through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([self.k(x), self.k(c), self.v(x), self.v(c)], -1)


class Sometimes(nn.Module):
    """Two layers share their input in the first batch, but not in the one of nine rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x * 2 if len(x) == 9 else x)


class InPlace(nn.Module):
    """The same tensor with other numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.q(x) + self.k(x.mul_(2))


class Routed(nn.Module):
    """Rows with a positive first number go through the second layer."""

    def __init__(self, out: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, out)

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = self.first(x), x[:, 0] > 0
        return torch.cat([y.sum()[None], self.second(y[chosen]).flatten()])


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(16, 32, 3), nn.Conv1d(32, 32, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def signed(sign: int) -> Tensor:
    x = draw(20, WIDTH)
    x[:, 0] = sign * x[:, 0].abs()
    return x


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[Tensor, ...]]]] = {
    "reached later": (Two, [(draw(4, WIDTH),), (draw(40, WIDTH),), (draw(3, WIDTH) * 3,)]),
    "two inputs": (Joint, [(draw(9, WIDTH), draw(9, WIDTH) + 1), (draw(5, WIDTH), draw(7, WIDTH)[:5] * 2)]),
    "interleaved": (Interleaved, [(draw(9, WIDTH), draw(9, WIDTH) + 1)]),
    "shared in the first batch": (Sometimes, [(draw(5, WIDTH),), (draw(9, WIDTH),), (draw(4, WIDTH),)]),
    "changed in place": (InPlace, [(draw(9, WIDTH),)]),
    "no rows in the second": (Routed, [(signed(1),), (signed(-1),)]),
    "no rows in the first": (Routed, [(signed(-1),), (signed(1),)]),
    "no rows, by inputs": (lambda: Routed(64), [(signed(-1),), (signed(1),), (signed(-1),)]),
    "an empty batch": (Convolved, [(draw(2, 16, 12),), (draw(0, 16, 12),), (draw(1, 16, 9),)]),
    "an empty batch first": (lambda: mlp(2), [(draw(0, WIDTH),), (draw(5, WIDTH),)]),
}


def observed(model: nn.Module, calls: list[tuple[Tensor, ...]]) -> dict[str, dict[str, Tensor]]:
    """Rows of inputs, of outputs without bias and of gradients of the sum of squares / 2, by layer, in float64."""
    model, rows = copy.deepcopy(model).double(), {}

    def note(name: str, found, module: nn.Module, args: tuple, y: Tensor) -> None:
        entry = rows.setdefault(name, {"inputs": [], "outputs": [], "gradients": []})
        flat = lambda t: found.tokens(t.detach()).flatten(0, -2)  # noqa: E731
        entry["inputs"].append(flat(args[0].clone()))
        entry["outputs"].append(flat(y) - module.bias.detach())
        y.register_hook(lambda g: entry["gradients"].append(flat(g)))

    for name, module in model.named_modules():
        if found := target(module):
            module.register_forward_hook(lambda m, a, y, name=name, found=found: note(name, found, m, a, y))
            module.weight.requires_grad_(False)  # its gradient would need inputs that may have changed
    for args in calls:
        (model(*(x.double() for x in args)).square().sum() / 2).backward()
    return {name: {key: torch.cat(value) for key, value in entry.items()} for name, entry in rows.items()}


def half_square(output: Tensor, batch: object) -> Tensor:
    return output.square().sum() / 2


def assert_saw(found: Calibration, model: nn.Module, calls: list[tuple[Tensor, ...]]) -> None:
    expected = observed(model, calls)
    assert set(found) == {name for name, rows in expected.items() if len(rows["outputs"])}
    for name in found:
        got, rows, found_target = found[name], expected[name], target(model.get_submodule(name))
        data = rows["inputs" if got.of_inputs else "outputs"]
        assert got.tokens == len(data)
        gradients = rows["gradients"]
        if got.of_inputs and gradients.shape[1] > got.data.shape[1]:
            gradients = gradients @ model.get_submodule(name).weight.detach().double()
        for field, values in (("data", data), ("gradient", gradients)):
            grouped = values.unflatten(1, (len(getattr(got, field)), -1)).transpose(0, 1)
            assert_close(getattr(got, field), grouped.mT @ grouped / len(data))
        assert_close(got.mean.flatten(), data.mean(0))
        if found_target.takes_vectors:
            assert_close(got.input_energy.flatten(), rows["inputs"].square().mean(0))
        assert got.input_energy.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_every_call_in_every_batch(case: str, tmp_path) -> None:
    build, calls = CASES[case]
    model = seeded(build)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no batch reaches")
        found = calibrate(model, calls, loss=half_square, cache=tmp_path)
        assert_saw(found, model, calls)
        apart = calibrate(model, calls, loss=half_square, cache=tmp_path / "apart", max_memory=1)
        again = calibrate(model, calls, loss=half_square, cache=tmp_path)
        assert_saw(apart, model, calls)
    assert list(again) == list(found) and again.folder == found.folder and again.unseen == found.unseen


def test_what_no_batch_reaches_is_told_and_nothing_else() -> None:
    calls = CASES["reached later"][1]
    with pytest.warns(UserWarning, match="^layers that no batch reaches stay as they are: never$"):
        found = calibrate(seeded(Two), calls)
    assert found.unseen == ["never"]
    plan = make_plan(seeded(Two), 0.6, calibration=found)
    assert [x.fqn for x in plan if x.reason == "it saw no data in the calibration"] == ["never"]
    with pytest.warns(UserWarning, match="no batch reaches stay as they are: second"):
        assert calibrate(seeded(Routed), [(signed(-1),)] * 2).unseen == ["second"]  # it was called, on nothing


def test_an_interrupted_calibration_is_gone_on_from(tmp_path, monkeypatch) -> None:
    from shrank.calibration import passes

    model, calls = seeded(Two), CASES["reached later"][1]
    write, written = passes.write_moments, []

    def interrupted(*args: object) -> None:
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(passes, "write_moments", interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, calls, loss=half_square, cache=tmp_path, max_memory=1)
        found = calibrate(model, calls, loss=half_square, cache=tmp_path, max_memory=1)
    assert len(written) == 2 + len(list(tmp_path.rglob("*.safetensors"))) - 1  # the first pass is not made again
    assert_saw(found, model, calls)


@pytest.mark.parametrize("rank", [0.6, 4, Budget(keep_params=0.7)], ids=str)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_whole_models_are_compressed(case: str, anchored: bool, rank: object) -> None:
    build, calls = CASES[case]
    model = seeded(build)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, and of layers that stay
        small = auto_fact(copy.deepcopy(model), rank, calibrate=Calibrate(calls, loss="none"), anchored=anchored)
    assert all(p.isfinite().all() for p in small.parameters())
    for args in calls:
        assert small(*args).shape == model(*args).shape


def test_calibrations_without_a_layer_are_calibrations() -> None:
    for model, calls in ((nn.Sequential(nn.ReLU()), [draw(3, WIDTH)]), (mlp(), [draw(0, WIDTH)])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = calibrate(model, calls)
            assert isinstance(found, Calibration) and found and len(found) == 0 and not found.has_gradients
            assert auto_fact(model, 4, calibrate=found)(draw(2, WIDTH)).shape == (2, WIDTH)


def test_memory_is_planned_for_all_the_rows(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("shrank.calibration.sharing.ROWS_IN_FLOAT32", 64)
    monkeypatch.setattr("shrank.calibration.moment.ROWS_IN_FLOAT32", 64)
    room = 4 * 3 * 2 * WIDTH**2  # moments and gradients of one layer, each a float64 sum beside a float32 one
    calibrate(mlp(2), [draw(4, WIDTH), draw(400, WIDTH)], cache=tmp_path, max_memory=room)  # not two small batches
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_model_that_does_not_do_the_same_twice_is_named() -> None:
    class Moody(Sometimes):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.q(x) + self.k(x * 2 if self.runs > 1 else x)

    model = seeded(Moody)
    with pytest.raises(RuntimeError, match=r"k is called with another input than q, .* does not do the same twice"):
        calibrate(model, [draw(4, WIDTH)])


def test_inputs_are_known_while_they_are_the_same() -> None:
    inputs, x, y = Inputs(), draw(3), draw(3)
    assert [inputs.number(t) for t in (x, y, x, x.view(3), y)] == [0, 1, 0, 2, 1]
    x.add_(1)
    assert inputs.number(x) == 3
    with torch.inference_mode():
        z = draw(3)
        assert inputs.number(z) == inputs.number(z) == 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: object) -> object:
        return UserDict(sentence_embedding=self.a(batch["x"]))


def test_the_cache_knows_data_in_containers_and_losses_by_what_they_do(tmp_path) -> None:
    x = draw(2000, WIDTH)
    y = x.clone()
    y[100:-100] *= 9
    first = calibrate(seeded(Net), [(UserDict(x=x),)], cache=tmp_path)
    other = calibrate(seeded(Net), [(UserDict(x=y),)], cache=tmp_path)
    assert_close(other["a"].data, calibrate(seeded(Net), [(UserDict(x=y),)])["a"].data)
    assert calibrate(seeded(Net), [(UserDict(x=x.clone()),)], cache=tmp_path).folder == first.folder != other.folder
    losses = [lambda out, batch: out["sentence_embedding"].sum(), lambda out, batch: out["sentence_embedding"].mean()]
    assert len({calibrate(seeded(Net), [(UserDict(x=x),)], cache=tmp_path, loss=f).folder for f in losses}) == 2
    with torch.autocast("cpu"):
        assert calibrate(seeded(Net), [(UserDict(x=x),)], cache=tmp_path).folder != first.folder
    relu, gelu = (nn.Sequential(*mlp(2), act) for act in (nn.ReLU(), nn.GELU()))
    assert calibrate(relu, [x], cache=tmp_path).folder != calibrate(gelu, [x], cache=tmp_path).folder


def test_what_cannot_be_known_again_is_not_cached_and_said(tmp_path) -> None:
    calls = [({"x": draw(5, WIDTH), "rows": iter([1])},), ({"x": draw(5, WIDTH), "lines": (i for i in ())},)]
    with pytest.warns(UserWarning, match=r"without the cache: .*\['data'\]\[1\].*\['lines'\] is a generator"):
        found = calibrate(seeded(Net), calls, cache=tmp_path)
    assert found.tokens("a") == 10 and not list(tmp_path.iterdir())
