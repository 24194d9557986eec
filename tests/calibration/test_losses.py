"""The losses that weight errors: their gradients are those of automatic differentiation."""

from __future__ import annotations

import math
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from shrank import calibrate
from shrank.calibration.batches import as_batches
from shrank.calibration.losses import (
    Divergence,
    NextToken,
    NotComparable,
    OutputSensitivity,
    as_training_loss,
    cross_entropy_gradient,
    divergences,
    main_output,
)
from tests.common.models import draw, hf_model, tokens
from tests.common.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [[], [2, 5], list(range(7))], ids=["none", "some", "all"])
def test_the_gradient_of_the_cross_entropy(ignored: list[int], dtype: torch.dtype) -> None:
    logits, targets = (3 * draw(7, 20)).to(dtype).requires_grad_(), tokens(7) % 20
    targets[ignored] = -100
    exact = logits.detach().double().requires_grad_()
    for tensor in (logits, exact):
        F.cross_entropy(tensor, targets, ignore_index=-100, reduction="sum").backward()
    found = cross_entropy_gradient(logits.detach(), targets)
    assert found.dtype == dtype
    assert_close(found, exact.grad, baseline=logits.grad)


@pytest.mark.parametrize("padded", [False, True])
def test_next_tokens_of_a_language_model(padded: bool) -> None:
    model = hf_model("llama").requires_grad_(False)
    inputs = {"input_ids": tokens(2, 8)}
    if padded:
        inputs["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    targets = inputs["input_ids"][:, 1:].clone()
    if padded:
        targets[inputs["attention_mask"][:, 1:] == 0] = -100
    labels, count = F.pad(targets, (1, 0), value=-100), int((targets != -100).sum())
    batch, gradients = as_batches([inputs])[0], []
    for backward in (
        lambda out: NextToken().backward(out, batch, torch.Generator()),
        lambda out: (out.loss * count).backward(),
    ):
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        backward(model(inputs_embeds=embedded, attention_mask=inputs.get("attention_mask"), labels=labels))
        gradients.append(embedded.grad)
    assert_close(*gradients)


OUTPUTS = {
    "logits first": {"last_hidden_state": draw(2), "logits": draw(3)},
    "a mapping that is no dict": UserDict(hidden=[draw(4)], logits=draw(3)),
    "an object": SimpleNamespace(loss=torch.tensor(1.0), logits=draw(3)),
    "embeddings": UserDict(token_embeddings=draw(2, 3), sentence_embedding=draw(3)),
    "the first tensor of numbers": (torch.arange(3), None, torch.tensor(1.0), {"y": draw(3)}),
    "deep": [{"ids": torch.arange(4)}, (SimpleNamespace(out=UserDict(logits=draw(3))),)],
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_the_main_output_is_found_wherever_it_is(output: object) -> None:
    assert torch.equal(main_output(output), draw(3))
    with pytest.raises(TypeError, match="no tensor of numbers but UserDict"):
        main_output(UserDict(ids=torch.arange(3)))


@pytest.mark.parametrize("padded", [False, True])
def test_divergence_is_that_of_the_columns_that_are_possible(padded: bool) -> None:
    answer, target = draw(5, 20).requires_grad_(), -2 * draw(5, 20)
    exact = answer.detach().double().requires_grad_()
    columns = 15 if padded else 20
    found = divergences(*(t.masked_fill(torch.arange(20) >= columns, -torch.inf) for t in (answer, target)))
    logs = [t[:, :columns].double().log_softmax(-1) for t in (exact, target)]
    wanted = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    assert_close(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert_close(answer.grad, exact.grad)


def test_what_only_the_dense_model_rules_out_costs_the_model_its_share() -> None:
    target, answer = torch.zeros(1, 4), torch.zeros(1, 4)
    target[0, 2:] = -torch.inf
    assert divergences(answer, target).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("whose, says", [(0, "the model's logits"), (1, "the dense model's logits")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_logits_that_cannot_be_compared_are_named(whose: int, says: str, value: float | None) -> None:
    logits = [draw(3, 4), draw(3, 4)]
    logits[whose][2, slice(None) if value is None else 1] = -torch.inf if value is None else value
    with pytest.raises(NotComparable, match=f"{says} hold .* in row 2"):
        divergences(*logits)


def test_what_the_model_alone_rules_out_is_named() -> None:
    answer = draw(3, 4)
    answer[1, 2] = -torch.inf
    with pytest.raises(NotComparable, match=r"-inf where the dense model's are not, first for token 2 in row 1"):
        divergences(answer, draw(3, 4))


def test_batches_without_a_token_that_counts_contribute_nothing() -> None:
    model = hf_model("llama")
    (empty,) = as_batches([{"input_ids": tokens(2, 8), "labels": torch.full((2, 8), -100)}])
    loss = NextToken().mean(model(**empty.kwargs), empty)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    for loss in (NextToken(), OutputSensitivity()):
        assert loss.backward(model(input_ids=tokens(2, 8)), as_batches([inputs])[0], torch.Generator()) == 0
    nothing = divergences(draw(0, 4), draw(0, 4))
    assert nothing.shape == (0,)
    real, padding = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}, inputs
    for loss in ("output", "lm"):
        one, both = (calibrate(model, data, loss=loss) for data in ([real], [real, padding]))
        for name in one:
            assert both[name].gradient_samples == one[name].gradient_samples and both.tokens(name) == one.tokens(name)
            assert_close(both[name].gradient, one[name].gradient)
            assert_close(both[name].data, one[name].data)


@pytest.mark.parametrize("given", ["logits", "probabilities"])
def test_gradients_of_what_is_drawn_have_the_hessian_of_the_divergence(given: str) -> None:
    """By the logits, whatever the model returns."""
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(20000, 1)[None].requires_grad_()
    output = logits.softmax(-1) if given == "probabilities" else logits * 1
    rows = Divergence().backward(output, as_batches([{"x": draw(1)}])[0], torch.Generator().manual_seed(0))
    found, p = logits.grad[0], logits[0, 0].detach().softmax(-1)
    hessian = p.diag() - torch.outer(p, p)  # of KL(p || softmax(logits)) where these are equal
    assert rows == 20000 and (found.T @ found / rows - hessian).abs().max() < 0.01


def test_what_is_masked_draws_nothing() -> None:
    logits = draw(1, 4, 5).requires_grad_()
    batch = as_batches([{"input_ids": tokens(1, 4), "attention_mask": torch.tensor([[1, 1, 0, 0]])}])[0]
    output = SimpleNamespace(logits=logits * 1)
    assert Divergence().backward(vars(output), batch, torch.Generator().manual_seed(0)) % 2 == 0
    assert (logits.grad[0, :2] != 0).all() and (logits.grad[0, 2:] == 0).all()


def test_divergence_weighs_a_language_model_without_labels() -> None:
    model = hf_model("gpt2")
    inputs = {"input_ids": tokens(4, 8)}
    kl, lm = (calibrate(model, [inputs], loss=loss) for loss in ("kl", "lm"))
    assert kl.has_gradients and len(kl) == len(lm)
    with pytest.raises(ValueError, match="got 'kl': the outputs are compared anyway"):
        as_training_loss("kl")
