"""Tiny random models of the transformers families that can be built without a network.

Run `python -m tests.common.zoo` to try all families, or those named on the command line.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, ResNetConfig
from transformers.models.auto import modeling_auto

from tests.common.zoo_tables import (
    BATCH,
    CAPS,
    DEPTH_NAME,
    FRAMES,
    HEADS,
    IDS,
    IMAGE,
    INDEX_NAME,
    OVERRIDES,
    TOKEN_NAME,
    VOCAB,
    WIDTH,
)


def sub_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Lists the config and all configs nested in it, outermost first."""
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(inner for value in nested for inner in sub_configs(value))]


def find(config: PreTrainedConfig, *names: str, default=None):
    """Returns the first of the named fields that is set in the config or in a nested one."""
    values = (getattr(current, name, None) for current in sub_configs(config) for name in names)
    return next((value for value in values if value is not None), default)


def map_ints(value, change: Callable[[int], int]):
    """Applies change to an integer or to the integers of a nested list or tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_ints(item, change) for item in value)
    return change(value) if type(value) is int else value


def capped(name: str, value):
    """Returns a field's value with its integers capped by what the name says they measure."""
    if TOKEN_NAME.search(name):
        # Special tokens stay distinct, and above the ids that inputs use.
        token = VOCAB // 2 + zlib.crc32(name.encode()) % (VOCAB // 2)
        return map_ints(value, lambda i: i if i < VOCAB // 2 else token)
    cap = next((cap for pattern, cap in CAPS if re.search(pattern, name)), None)
    if cap == HEADS and "head" in name:
        # Powers of two divide the width.
        return map_ints(value, lambda i: min(1 << (i.bit_length() - 1), cap) if i > 0 else i)
    return value if cap is None else map_ints(value, lambda i: min(i, cap))


def shrink_depth(config: PreTrainedConfig) -> None:
    """Cuts the layer count, keeping one layer of every kind that the per-layer lists name."""
    fields = dict(vars(config))
    lists = {name: value for name, value in fields.items() if isinstance(value, (list, tuple))}
    count = getattr(config, "num_hidden_layers", None)
    # Shorter lists describe the stages of a pyramid, which keeps all of them.
    per_layer = {name: value for name, value in lists.items() if len(value) == count and count > 4}
    others = {name: value for name, value in lists.items() if name not in per_layer}
    indices = {n: v for n, v in others.items() if INDEX_NAME.search(n) and {type(i) for i in v} == {int}}
    depth = max([2] + [min(4, len(value)) + 1 for value in indices.values()])
    if per_layer:
        numbering = list(range(count))
        described = [value for value in per_layer.values() if list(value) != numbering]
        kinds = {repr([value[i] for value in described]): i for i in reversed(numbering)}
        spare = [i for i in numbering if i not in kinds.values()]
        kept = sorted([*kinds.values(), *spare[: max(0, depth - len(kinds))]])
        depth = len(kept)
        for name, value in per_layer.items():
            short = range(depth) if list(value) == numbering else [value[i] for i in kept]
            setattr(config, name, type(value)(short))
    if not hasattr(config, "depths"):
        shrink_indices(config, indices, depth, count)
    for name, value in fields.items():
        # A config with a depth per stage counts its stages, not its layers, in the other fields.
        counts_stages = hasattr(config, "depths") and type(value) is int
        if DEPTH_NAME.search(name) and not (name in per_layer or name in indices or counts_stages):
            limit = depth if type(value) is int else 1
            setattr(config, name, map_ints(value, lambda i, limit=limit: min(i, limit)))


def shrink_indices(config: PreTrainedConfig, indices: dict[str, list], depth: int, count: int | None) -> None:
    """Points the fields that select layers at the last layers of the shortened model."""
    for name, value in indices.items():
        if min(value) >= 0:
            # The indices of a backbone's outputs count its stem as stage 0.
            stop = depth + (name == "_out_indices")
            setattr(config, name, type(value)(range(stop - min(len(value), depth), stop)))
    stages = getattr(config, "stage_names", None)
    if stages and count and len(stages) == count + 1:
        config.stage_names = stages[: depth + 1]
        config._out_features = [config.stage_names[i] for i in config._out_indices]


def shrink(config: PreTrainedConfig) -> None:
    """Shrinks the sizes of a config and of the configs nested in it, in place."""
    for current in reversed(sub_configs(config)):
        current.per_layer_config = None
        for name, value in list(vars(current).items()):
            if getattr(value, "model_type", None) == "timm_backbone":
                # timm is an optional dependency; the backbone it would load is a ResNet.
                setattr(current, name, ResNetConfig(out_features=["stage2", "stage3", "stage4"]))
    for current in sub_configs(config):
        old = dict(vars(current))
        shrink_depth(current)
        # Tables of whole blocks fix all the widths of their networks.
        tabled = "block_configs" in old or "stage_configs" in old
        for name, value in list(vars(current).items()):
            fixed = tabled or DEPTH_NAME.search(name) or INDEX_NAME.search(name)
            if not fixed and (small := capped(name, value)) != value:
                setattr(current, name, small)
        restore_ratios(current, old)
        current.dtype = None
        if hasattr(current, "use_cache"):
            current.use_cache = False


def restore_ratios(config: PreTrainedConfig, old: dict) -> None:
    """Recomputes the fields that must agree with others of the same config."""
    if type(old.get("embed_dim")) is int and "depths" in old and "hidden_size" in old:
        config.embed_dim = WIDTH // 2
        config.hidden_size = config.embed_dim * 2 ** (len(old["depths"]) - 1)
    heads, width = vars(config).get("num_attention_heads"), vars(config).get("hidden_size")
    if type(heads) is not int or type(width) is not int:
        return
    old_heads = old["num_attention_heads"]
    if "head_dim" in old and (old["head_dim"] or 0) * old_heads in (0, old["hidden_size"]):
        config.head_dim = width // heads
    if "num_key_value_heads" in old:
        old_kv_heads = old["num_key_value_heads"] or old_heads
        config.num_key_value_heads = heads if old_kv_heads == old_heads else min(2, old_kv_heads)
    if "qk_head_dim" in old:
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        if old.get("head_dim") == old["qk_head_dim"]:
            config.head_dim = config.qk_head_dim
    rope = vars(config).get("rope_parameters") or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "rope_theta" in part:
            # Multimodal models split half of the rotary dimensions in three, by default for released sizes.
            head_dim = vars(config).get("head_dim") or width // heads
            third = (half := int(head_dim * part.get("partial_rotary_factor", 1)) // 2) * 3 // 8
            part["mrope_section"] = [third, third, half - 2 * third]


def class_names() -> dict[str, str]:
    """Maps a model type to its base model class, or else to its first model with a head."""
    names = dict(modeling_auto.MODEL_MAPPING_NAMES)
    for mapping, entries in vars(modeling_auto).items():
        if mapping.startswith("MODEL_FOR") and mapping.endswith("_MAPPING_NAMES"):
            names = {**entries, **names}
    return {family: name if isinstance(name, str) else name[0] for family, name in names.items()}


def families() -> list[str]:
    """Lists the model types of transformers that have a model class, the unbuildable ones too."""
    return sorted(class_names())


def input_specs(config: PreTrainedConfig) -> dict[str, tuple | list]:
    """Returns the shape, or the list of values, that each input has by default."""
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    size = find(config, "image_size", default=IMAGE)
    size = tuple(size[-2:]) if isinstance(size, (list, tuple)) else (size, size)
    frames = find(config, "num_frames", "frames_per_clip")
    codec = find(config, "audio_channels", "upsampling_ratios", "downsampling_ratios", "codebook_size")
    images = (BATCH, *([frames] if frames else []), channels, *size)
    return {
        **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "attention_mask"), IDS),
        **dict.fromkeys(("pixel_values", "pixel_values_videos"), images),
        "input_values": (BATCH, *([1] if codec else []), 3840),
        # Spectrograms are square, because families disagree about which axis is time.
        "input_features": (BATCH, FRAMES, FRAMES),
        "input_features_mask": (BATCH, FRAMES),
        "freq": (BATCH, 1),
        "merge_sizes": [1],
        **{name: [[1, 4, 4]] for name in ("grid_thw", "image_grid_thw")},
    }


def make_input(name: str, spec: tuple | list, config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    """Makes one input: ones for masks and the like, ids without special meaning, or normal noise."""
    if isinstance(spec, list):
        return torch.tensor(spec)
    if re.search(r"mask|freq|timesteps", name):
        return torch.ones(spec, dtype=torch.long)
    if not name.endswith("_ids"):
        return torch.zeros(spec) if name.endswith("padding") else torch.randn(spec, generator=generator)
    fields = [field for current in sub_configs(config) for field in vars(current).items()]
    special = {value for field, value in fields if TOKEN_NAME.search(field) and type(value) is int}
    vocab = min(96, find(config, "vocab_size", default=VOCAB))
    allowed = torch.tensor([i for i in range(3, vocab) if i not in special])
    return allowed[torch.randint(len(allowed), spec, generator=generator)]


def make_inputs(family: str, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Makes the inputs that forward requires by its signature, and those in the overrides."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    specs, chosen = input_specs(config), OVERRIDES.get(family, {}).get("inputs", {})
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {model.main_input_name, *chosen} & set(parameters)
    names |= {n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic}
    names |= {"decoder_input_ids"} & set(parameters)
    if hasattr(model, "get_text_features"):
        names |= {"pixel_values"} & set(parameters)
    if "input_ids" in names:
        names |= {"attention_mask"} & set(parameters)
    if "grid_thw" in parameters:
        channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
        frames = find(config, "temporal_patch_size", "patch_temporal", default=1)
        flat = (16, channels * frames * find(config, "patch_size") ** 2)
        specs.update(hidden_states=flat, pixel_values=flat)
    specs.update(chosen)
    if missing := names - set(specs):
        raise NotImplementedError(f"no rule makes the inputs {sorted(missing)}")
    return {name: make_input(name, specs[name], config, generator) for name in sorted(names) if specs[name]}


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Builds the tiny random model of a family, in eval mode, and keyword inputs for its forward."""
    config = CONFIG_MAPPING[family]()
    shrink(config)
    for path, value in OVERRIDES.get(family, {}).items():
        if path != "inputs":
            parent, _, name = path.rpartition(".")
            setattr(attrgetter(parent)(config) if parent else config, name, value)
    seed = zlib.crc32(family.encode())
    torch.manual_seed(seed)
    model = getattr(transformers, class_names()[family])(config).float().eval()
    for parameter in model.parameters():
        # Zeros, such as biases, would hide their loss; memory that nothing initialised may hold anything.
        if not parameter.any() or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.02)
    return model, make_inputs(family, model, torch.Generator().manual_seed(seed))


def flatten(value) -> Iterator[Tensor]:
    """Yields the floating tensors of nested dicts, lists and tuples; caches are none of these."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from flatten(item)


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Runs the model, with a fixed seed, and returns the floating tensors of its output in their order."""
    torch.manual_seed(0)
    return list(flatten(model(**inputs)))


def main(names: list[str]) -> None:
    """Tries the families and prints how each of them fares."""
    warnings.simplefilter("ignore")
    begin, sound = time.perf_counter(), 0
    for family in names:
        start = time.perf_counter()
        try:
            model, inputs = build(family)
            tensors = outputs(model, inputs)
            fine = bool(tensors) and all(tensor.isfinite().all() for tensor in tensors)
            parameters = sum(p.numel() for p in model.parameters())
            verdict = f"{parameters:9d} {'' if fine else 'FAIL no or non-finite output'}"
            sound += fine
        except Exception as error:  # The sweep reports every failure.
            verdict = "FAIL " + " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"{family:40} {time.perf_counter() - start:6.2f} s {verdict}", flush=True)
    print(f"{sound} of {len(names)} families run, in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or families())
