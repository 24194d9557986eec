"""What a model says of its arguments: their names, and how its masks are meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masks import Rule, Traits


def parameters_of(model: Callable) -> list[inspect.Parameter]:
    """The parameters of a model's forward; [] where it does not say them."""
    try:
        return list(inspect.signature(getattr(model, "forward", model)).parameters.values())
    except (TypeError, ValueError):  # of compiled and scripted functions
        return []


def traits_of(model: nn.Module) -> Traits:
    """How masks for this model are meant."""
    config = getattr(model, "config", None)
    configs = [c for c in (config, *(getattr(config, n, None) for n in ("decoder", "text_config"))) if c is not None]
    pad, start = (
        next((value for c in configs if isinstance(value := getattr(c, name, None), int)), None)
        for name in ("pad_token_id", "decoder_start_token_id")
    )
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    has_decoder = any(p.name.startswith("decoder_") for p in parameters_of(model))
    return Traits(
        pad,
        start,
        has_decoder,
        any(not m.batch_first for m in attentions),
        type(model).__module__.startswith("transformers."),
        tuple(_rules(model)),
    )


def _rules(model: nn.Module) -> list[Rule]:
    """How the positions of its layers come from those of its inputs, where it has functions for that."""
    rules = []
    for module in model.modules():
        if not rules and hasattr(module, "_get_feature_vector_attention_mask"):
            with_adapter = "add_adapter" in inspect.signature(module._get_feature_vector_attention_mask).parameters
            options = [{"add_adapter": False}, {"add_adapter": True}] if with_adapter else [{}]
            rules += [_subsampling(module, option) for option in options]
    if any(name.startswith("_pad_to_") for m in model.modules() for name in dir(type(m))):
        rules.append(_padded_further)
    return rules


def _subsampling(module: nn.Module, options: dict[str, bool]) -> Rule:
    """Of models of speech in transformers."""

    def rule(positions: int, counts: Tensor) -> Tensor | None:
        if int(module._get_feat_extract_output_lengths(torch.tensor(counts.shape[1]), **options)) != positions:
            return None
        mask = module._get_feature_vector_attention_mask(positions, counts.long(), **options)
        return mask.bool() & counts.any(1, keepdim=True)

    return rule


def _padded_further(positions: int, counts: Tensor) -> Tensor | None:
    """Of models that pad to whole windows or blocks of attention, as Longformer and BigBird do."""
    more = positions - counts.shape[1]
    return F.pad(counts, (0, more), value=False) if more > 0 else None
