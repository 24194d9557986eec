"""The losses that weigh errors: their gradients are those of automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shrank.batches import as_batches
from shrank.losses import NextToken, cross_entropy_gradient
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
    for backward in (lambda out: NextToken().backward(out, batch, torch.Generator()),
                     lambda out: (out.loss * count).backward()):
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        backward(model(inputs_embeds=embedded, attention_mask=inputs.get("attention_mask"), labels=labels))
        gradients.append(embedded.grad)
    assert_close(*gradients)
