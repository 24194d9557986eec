"""What transformers' models do with layers and configs of their own, for low-rank ones: resizing and tying heads, and
loading a folder with another config object."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from wrapt import wrap_function_wrapper

from ..layers.led import LED
from ..model.surgery import carry_over
from .checks import check_saveable, is_plan
from .transformers_loading import untied


def from_pretrained(load: Callable, _: type, args: tuple, kwargs: dict) -> nn.Module:
    """from_pretrained with a config object, such as that of a loaded model: the plan is the folder's."""
    config, source = kwargs.get("config"), args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if isinstance(config, PreTrainedConfig) and "quantization_config" not in vars(config) and source is not None:
        file = Path(source, kwargs.get("subfolder") or "", "config.json")
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if is_plan(stored.get("quantization_config")):
            config = kwargs["config"] = copy.deepcopy(config)
            config.quantization_config = stored["quantization_config"]
            config.architectures = config.architectures or stored.get("architectures")
    return load(*args, **kwargs)


def tied_keys(find: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> dict[str, str]:
    """The parameters that are tied, target to source: a low-rank layer is tied to nothing, whatever its config says."""
    return untied(model, find(*args, **kwargs))


def resized_head(resize: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> nn.Module:
    """The language model's head for another number of words."""
    head, outputs, transposed, by_mean = _arguments(*args, **kwargs)
    if type(head) is not LED or outputs in (None, head.out_features) or transposed:
        return resize(*args, **kwargs)
    check_saveable(head)
    added = None
    if outputs > head.out_features and not by_mean:
        added = nn.Linear(head.in_features, outputs - head.out_features, bias=False, device=head.down.device)
        model._init_weights(added)
        added = added.weight
    return resized(head, outputs, added)


@torch.no_grad()
def resized(head: LED, outputs: int, added: Tensor | None = None) -> LED:
    """A low-rank layer with its first `outputs` outputs, or with more: rows added (A, in_features) as near as the down
    factor allows, or without them the mean of all rows, as transformers does for dense heads. Never pivoted: the
    outputs that are given up may be pivots."""
    down, coefficients, bias = head.down, _coefficients(head), head.bias  # (R, K), (N, R), (N,)
    more = outputs - len(coefficients)
    if more > 0:
        new = coefficients.float().mean(0).expand(more, -1)
        if added is not None:
            new = torch.linalg.lstsq(down.float().mT, added.float().mT).solution.mT  # (A, R)
        coefficients = torch.cat((coefficients, new.to(coefficients.dtype)))
        bias = None if bias is None else torch.cat((bias, bias.mean().expand(more)))
    if outputs < head.rank:  # more than a matrix of so few rows can have
        down, coefficients = coefficients[:outputs] @ down, torch.eye(outputs, dtype=down.dtype, device=down.device)
    new = LED(head.in_features, outputs, len(down), bias is not None, device="meta", dtype=down.dtype)
    new.set_factors(down.clone(), coefficients[:outputs].clone(), None if bias is None else bias[:outputs].clone())
    carry_over(head, new)
    return new


def _coefficients(head: LED) -> Tensor:
    """What every output is in terms of the down factor's rows (N, R); pivots are these rows themselves."""
    if not head.pivoted:
        return head.up
    return torch.cat((torch.eye(head.rank, dtype=head.up.dtype, device=head.up.device), head.up))[head.order]


def _arguments(
    old_lm_head: nn.Module, new_num_tokens: int | None = None, transposed: bool = False, mean_resizing: bool = True
) -> tuple[nn.Module, int | None, bool, bool]:
    return old_lm_head, new_num_tokens, transposed, mean_resizing


wrap_function_wrapper(PreTrainedModel, "from_pretrained", from_pretrained)
wrap_function_wrapper(PreTrainedModel, "get_expanded_tied_weights_keys", tied_keys)
wrap_function_wrapper(PreTrainedModel, "_get_resized_lm_head", resized_head)
