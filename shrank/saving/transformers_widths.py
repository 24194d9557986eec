"""Blocks of one width as transformers' own configs have them, so that their models load without shrank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..model.adapters import LOW_RANK
from ..planning.plan import RankPlan

# What configs call the hidden units of a feed-forward block.
_KEYS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
    "dim_feedforward",
    "d_inner",
)
_MOST_TRIED = 32


def plain_as_possible(model: PreTrainedModel, plan: RankPlan) -> RankPlan:
    """What a plan that was read off a model must still say after the model's own config, which this changes, says the
    widths of its blocks; all of it where a config cannot."""
    if not plan.narrower:
        return plan
    for changed in islice(_configs(model.config, plan), _MOST_TRIED):
        if _builds(changed, model):
            model.config = changed
            layers = tuple(replace(x, narrowed=False, size=x.shape.dense_params) for x in plan.changed)
            return replace(plan, layers=layers, narrowed=())
    return plan


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those of the parts of a composite model."""
    yield config
    for value in vars(config).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, PreTrainedConfig):
                yield from configs_in(part)


def _configs(config: PreTrainedConfig, plan: RankPlan) -> Iterator[PreTrainedConfig]:
    """The config with every setting that may say how many units a block had, set to widths that blocks have now."""
    places = [(i, key) for i, part in enumerate(configs_in(config)) for key in _KEYS if key in vars(part)]
    parts, choices, found = list(configs_in(config)), [], []
    for i, key in places:
        units = vars(parts[i])[key]
        widths = {block.width for block in plan.narrower if units in (block.units, None)}
        if widths:
            found.append((i, key))
            choices.append([*sorted(widths), units])
    for widths in product(*choices):
        changed = copy.deepcopy(config)
        for (i, key), width in zip(found, widths, strict=True):
            vars(list(configs_in(changed))[i])[key] = width
        yield changed


def _builds(config: PreTrainedConfig, model: PreTrainedModel) -> bool:
    """Whether the class makes of a config a model whose weights have the shapes of this one's."""
    with torch.device("meta"):
        made = dict(type(model)(copy.deepcopy(config)).named_modules())
    return all(
        _shapes(made[fqn]) == _shapes(module)
        for fqn, module in model.named_modules()
        if fqn in made and (isinstance(module, LOW_RANK) or module._parameters)
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    if isinstance(module, LOW_RANK):
        return {"weight": tuple(module.weight_shape)}
    return {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None and n == "weight"}
