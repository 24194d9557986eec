"""Tiny random models of the transformers families that can be built without a network.

Run as a script to try all families, or those named on the command line.
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

VOCAB, WIDTH, WIDE, HEADS, BATCH, SEQUENCE, IMAGE, FRAMES = 256, 64, 128, 4, 2, 12, 64, 64

# The first pattern found in a field's name caps its integers, also those in lists; None leaves them alone.
CAPS: tuple[tuple[str, int | None], ...] = (
    (r"rope_parameters|type_vocab|kernel|stride|scale|padding|dilation|num_channels|window_size|merge", None),
    (r"patch_dim|keypoint_decoder|_labels$", None),
    (r"vocab|num_embeddings", VOCAB),
    (r"max_source|num_pos_feats", FRAMES // 2),
    (r"upsample_groups|mel_|_mels|num_frames$", FRAMES),
    (r"num_position_embeddings", 256),
    (r"position|n_ctx|max_seq|context_length|max_length", 512),
    (r"heads$|heads_per_layer|n_head$", HEADS),
    (r"topk|top_k|per_tok|moe_k$|n_?groups?$|expert_group|period|interval|step$|pattern|frequency", 2),
    (r"experts$|expert_capacity|image_embedding_size", 4),
    (r"num_groups|num_filters", 8),
    (r"head_?dim|d_kv$|dim_head|d_head|kv_channels|rotary_dim|state_size|d_state|patch_size|num_queries", 16),
    (r"image_size|img_size|crop_size|input_size", IMAGE),
    (r"intermediate|ffn|ff_|d_ff|mlp_dim|inner|feed_?forward", WIDE),
    (r"offset|first_k|(^|_)expand$", 1),
    (r"hidden|dim|size|channel|embd|d_model|d_ssm|rank|units|width|filters|features$", WIDTH),
)
DEPTH_NAME = re.compile(r"(^|_)((?<!per_)layers?|depths?|(?<!attention_)blocks?|repeats)$")
INDEX_NAME = re.compile(r"(indices|indexes|idxs|_layers|layer_ids|hook_ids|feature_layer)$")
TOKEN_NAME = re.compile(r"(_id|_ids|_token_index)$")

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
SERIES = {"prediction_length": 4, "context_length": 8, "label_length": 4, "inputs": {
    "past_values": (2, 15), "past_time_features": (2, 15, 0), "past_observed_mask": (2, 15),
    "future_values": (2, 4), "future_time_features": (2, 4, 0)}}
NAFLEX = {"pixel_values": (2, 16, 768), "pixel_attention_mask": (2, 16), "spatial_shapes": [[4, 4], [4, 4]]}
ZAMBA, IDS = {"attention_hidden_size": 128, "attention_head_dim": 32}, (BATCH, SEQUENCE)
# Config values by their dotted paths, where a default is missing or sizes depend on each other, and under
# "inputs" what forward needs beyond its required parameters: a shape to draw, a list of values, or None for
# nothing. Families separated by blanks share an entry.
OVERRIDES: dict[str, dict] = {
    "align": {"projection_dim": 128, "vision_config.hidden_dim": 2560},
    "audio-spectrogram-transformer": {"inputs": {"input_values": (2, 512, 64)}},
    "audioflamingo3_encoder": {"inputs": {"input_features_mask": (2, FRAMES)}},
    "autoformer informer time_series_transformer": SERIES,
    "bridgetower": {"inputs": {"pixel_values": (2, 3, IMAGE, IMAGE), "pixel_mask": (2, IMAGE, IMAGE)}},
    "bros": {"dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_projection": 16,
        "inputs": {"bbox": (*IDS, 4)}},
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121}},
    "cohere_compass": {"text_config.rope_parameters": ROPES},
    "cohere_compass_text": {"rope_parameters": ROPES}, "cvt": {"depth": (1, 2, 3)},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "decision_transformer": {"inputs": {
        "states": (*IDS, 17), "actions": (*IDS, 4), "returns_to_go": (*IDS, 1), "timesteps": IDS}},
    "deepseek_v2": {"num_experts_per_tok": 2}, "depth_pro": {"intermediate_hook_ids": (1, 0)},
    "dia": {"inputs": {"decoder_input_ids": (*IDS, 9)}}, "donut-swin swin": {"window_size": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config.head_dim": 64}, "dots3_note_text": {"head_dim": 64},
    "efficientnet": {"hidden_dim": 2560}, "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2}, "falcon_h1": {"mamba_d_head": 16},
    "fun_asr_nano_encoder": {"inputs": {"input_features": (2, FRAMES, 448)}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite_speech5_ctc granite_speech5_encoder": {"inputs": {"input_features": (2, FRAMES, 256)}},
    "grounding-dino mm-grounding-dino": {"max_text_len": SEQUENCE, "backbone_config.window_size": 2},
    "kimi_k25_vision": {"inputs": {"pixel_values": (16, 3, 14, 14)}},
    "kyutai_speech_to_text": {"inputs": {"input_ids": (*IDS, 33)}},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lightglue superglue": {"inputs": {"pixel_values": (1, 2, 3, IMAGE, IMAGE)}}, "lilt": {"hidden_size": 96},
    "lxmert": {"inputs": {"visual_feats": (2, 5, WIDTH), "visual_pos": (2, 5, 4)}},
    "minicpm_ocr_vision minicpmv4_7_vision": {"inputs": {"target_sizes": [[4, 4]]}},
    "mimi_decoder pocket_tts_audio_tokenizer_decoder": {"inputs": {"latents": (2, WIDTH, 12)}},
    "patchtsmixer patchtst": {"inputs": {"past_values": (2, 32, 1)}},
    "perceiver": {"inputs": {"inputs": (2, 20, WIDTH)}},
    "qwen2_5_omni_thinker qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 8)},
    "sam3 sam3_lite_text sam3_lite_text_text_model": {"inputs": {"input_ids": IDS}},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "siglip2 siglip2_vision_model": {"inputs": NAFLEX},
    "speecht5": {"inputs": {"input_values": (*IDS, WIDTH), "decoder_input_values": (*IDS, WIDTH)}},
    "step3p7": {"text_config.sliding_window": 8},
    "timesfm timesfm2_5": {"inputs": {"past_values": (2, 512), "past_values_padding": (2, 512)}},
    "udop": {"inputs": {"bbox": (*IDS, 4)}},
    "vibevoice_acoustic_tokenizer_decoder": {"inputs": {"hidden_states": (2, WIDTH, 4)}},
    "vibevoice_acoustic_tokenizer_encoder": {"inputs": {"hidden_states": (2, 1, 6400)}},
    "videomt": {"inputs": {"pixel_values": None, "pixel_values_videos": (1, 2, 3, IMAGE, IMAGE)}},
    "vilt": {"inputs": {"pixel_values": (2, 3, IMAGE, IMAGE)}},
    "vitmatte": {"convstream_hidden_sizes": [16, 32, 64], "fusion_hidden_sizes": [64, 32, 16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, **ZAMBA},
    "zamba2": ZAMBA,
}
OVERRIDES = {family: entry for names, entry in OVERRIDES.items() for family in names.split()}
# Why families are not built or run, found by trying them.
_UNBUILDABLE_BY_REASON = {
    "needs timm": """
        edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo pe_audio_video
        pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper""",
    "needs natten, detectron2 or torchaudio": """
        dinat layoutlmv2 higgs_audio_v2_tokenizer""",
    "has no forward, or transformers lacks its class": """
        bark glm_image_vqmodel qwen2_5_omni voxtral_realtime_text""",
    "its default config cannot be built": """
        deepseek_ocr2 diffusion_gemma granite4_vision moonshine_streaming musicgen musicgen_melody
        pp_ocrv5_server_det pp_ocrv6_medium_det qwen3_omni_moe qwen4_exp qwen4_exp_text t5gemma2_encoder""",
    "needs inputs or sizes that no rule here makes": """
        blip-2 blip_2_qformer blt clap clvp edgetam_video efficientloftr gemma3n_audio gemma4_assistant
        gemma4_unified_assistant gemma4_vision idefics inkling2_vision instructblip instructblipvideo
        jev kosmos-2 lw_detr muse_glimmer_assistant nemotron3_5_transcribe_word_timestamp neucodec
        oneformer pi0 pix2struct pp_doclayout_v2 pp_ocrv5_mobile_rec pp_ocrv6_small_det
        qwen3_asr_encoder sam2 sam2_hiera_det_model sam2_video sam2_vision_model sam3_tracker_video
        sam3_video seggpt shieldgemma2 speech-encoder-decoder tvp uvdoc voxtral_realtime xcodec xcodec2""",
}
UNBUILDABLE: dict[str, str] = {
    family: reason for reason, names in _UNBUILDABLE_BY_REASON.items() for family in names.split()
}
# Encoders, decoders, mixtures of experts, state spaces, HF Conv1D, vision, audio, multimodal, shared layers.
FAST: tuple[str, ...] = tuple("""
    albert bart bert bit bloom clip codegen convnext deberta-v2 deepseek_v3 detr distilbert falcon
    falcon_mamba gemma2 gemma3 gpt2 gpt_neox hubert jamba llama llava mamba2 mistral mixtral mobilenet_v2
    modernbert mpnet olmo2 opt qwen2 qwen2_moe qwen2_vl resnet roberta sam segformer siglip swin t5 vit
    vit_mae wav2vec2 whisper
""".split())


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
    indices = {n: v for n, v in others.items() if INDEX_NAME.search(n) and {type(item) for item in v} == {int}}
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
            setattr(config, name, map_ints(value, lambda i: min(i, limit)))


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
        **dict.fromkeys(("grid_thw", "image_grid_thw"), [[1, 4, 4]]),
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
