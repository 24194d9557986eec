"""What the zoo knows of transformers' families: how fields shrink, what defaults lack, what cannot be built."""

from __future__ import annotations

import re

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
SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "label_length": 4,
    "inputs": {
        "past_values": (2, 15),
        "past_time_features": (2, 15, 0),
        "past_observed_mask": (2, 15),
        "future_values": (2, 4),
        "future_time_features": (2, 4, 0),
    },
}
NAFLEX = {"pixel_values": (2, 16, 768), "pixel_attention_mask": (2, 16), "spatial_shapes": [[4, 4], [4, 4]]}
ZAMBA, IDS = {"attention_hidden_size": 128, "attention_head_dim": 32}, (BATCH, SEQUENCE)
# Config values by their dotted paths, where a default is missing or sizes depend on each other, and under
# "inputs" what forward needs beyond its required parameters: a shape to draw, a list of values, or None for
# nothing. Families separated by blanks share an entry.
OVERRIDES: dict[str, dict] = {
    # Its kernel predictor gives 4 * 2 * 32 * 32 * 3 numbers in one convolution: moments of 2.4 GB.
    "univnet": {"model_hidden_channels": 8},
    "align": {"projection_dim": 128, "vision_config.hidden_dim": 2560},
    "audio-spectrogram-transformer": {"inputs": {"input_values": (2, 512, 64)}},
    "audioflamingo3_encoder": {"inputs": {"input_features_mask": (2, FRAMES)}},
    "autoformer informer time_series_transformer": SERIES,
    "bridgetower": {"inputs": {"pixel_values": (2, 3, IMAGE, IMAGE), "pixel_mask": (2, IMAGE, IMAGE)}},
    "bros": {
        "dim_bbox_sinusoid_emb_1d": 2,
        "dim_bbox_sinusoid_emb_2d": 16,
        "dim_bbox_projection": 16,
        "inputs": {"bbox": (*IDS, 4)},
    },
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121}},
    "cohere_compass": {"text_config.rope_parameters": ROPES},
    "cohere_compass_text": {"rope_parameters": ROPES},
    "cvt": {"depth": (1, 2, 3)},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "decision_transformer": {
        "inputs": {"states": (*IDS, 17), "actions": (*IDS, 4), "returns_to_go": (*IDS, 1), "timesteps": IDS}
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {"intermediate_hook_ids": (1, 0)},
    "dia": {"inputs": {"decoder_input_ids": (*IDS, 9)}},
    "donut-swin swin": {"window_size": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config.head_dim": 64},
    "dots3_note_text": {"head_dim": 64},
    "efficientnet": {"hidden_dim": 2560},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "fun_asr_nano_encoder": {"inputs": {"input_features": (2, FRAMES, 448)}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite_speech5_ctc granite_speech5_encoder": {"inputs": {"input_features": (2, FRAMES, 256)}},
    "grounding-dino mm-grounding-dino": {"max_text_len": SEQUENCE, "backbone_config.window_size": 2},
    "kimi_k25_vision": {"inputs": {"pixel_values": (16, 3, 14, 14)}},
    "kyutai_speech_to_text": {"inputs": {"input_ids": (*IDS, 33)}},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lightglue superglue": {"inputs": {"pixel_values": (1, 2, 3, IMAGE, IMAGE)}},
    "lilt": {"hidden_size": 96},
    "lxmert": {"inputs": {"visual_feats": (2, 5, WIDTH), "visual_pos": (2, 5, 4)}},
    "minicpm_ocr_vision minicpmv4_7_vision": {"inputs": {"target_sizes": [[4, 4]]}},
    "mimi_decoder pocket_tts_audio_tokenizer_decoder": {"inputs": {"latents": (2, WIDTH, 12)}},
    "omniasr_audio omniasr_ctc": {"inputs": {"input_values": (2, 1, 3840)}},
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
    "its forward reads a field that its output lacks": """
        llama4""",
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
FAST: tuple[str, ...] = tuple(
    """
    albert bart bert bit bloom clip convnext deberta-v2 deepseek_v3 detr distilbert falcon
    falcon_mamba gemma2 gemma3 gpt2 gpt_neox hubert jamba llama llava mamba2 mistral mixtral mobilenet_v2
    modernbert opt qwen2 qwen2_moe qwen2_vl resnet sam segformer siglip swin t5 vit
    vit_mae wav2vec2 whisper
""".split()
)
# Of those, the ones that are also calibrated, given unequal ranks, saved and loaded.
FAST_CALIBRATED: tuple[str, ...] = tuple(
    """
    bert convnext falcon_mamba gpt2 llama mixtral resnet
""".split()
)
# Those whose blocks are also narrowed, and how many these have: of hidden units, heads and channels.
FAST_NARROWED: dict[str, int] = {"bert": 4, "gpt2": 2, "llama": 4, "resnet": 4, "whisper": 5}
# And those that are also put into few bits.
FAST_OF_FEW_BITS: tuple[str, ...] = ("funnel", "gpt2", "mixtral", "t5")
# Families without any layer that rank 8 could make smaller, and why.
NOTHING_TO_REPLACE: dict[str, str] = {
    "bit": "its convolutions standardise their weights in a subclass of nn.Conv2d",
    "encodec": "all its convolutions are parametrized by weight_norm",
    "falcon": "its linear layers are a subclass of nn.Linear",
    "patchtsmixer": "its shrunk layers are too narrow",
    "wavtokenizer_encoder": "all its convolutions are parametrized by weight_norm",
}
# Families without a candidate when data has a say, and why.
NOTHING_FOR_A_BUDGET: dict[str, str] = {
    **{family: NOTHING_TO_REPLACE[family] for family in ("bit", "encodec", "falcon", "wavtokenizer_encoder")},
    "mllama": "its shrunk text model is layers of cross-attention, which text without images skips",
    "prompt_depth_anything": "its random model predicts no depth: its last ReLU is zero, and passes no gradient back",
}
# Families whose main output passes no gradient back to a layer: errors are weighted by inputs alone (loss="none").
NO_GRADIENTS: dict[str, str] = {
    "ibert": "its linear layers are of its own class, but for the pooler's, which its main output does not pass",
    "reformer": "its backward pass runs in training mode alone",
    "superpoint": "its main output is the places of key points, which are chosen",
}
# Predicted durations set the lengths of their outputs, so other weights give other shapes.
SHAPE_DEPENDS_ON_WEIGHTS = ("fastspeech2_conformer", "fastspeech2_conformer_with_hifigan", "vits")
# They select the top queries by score; in a random model rounding decides among them, and all outputs jump.
ROUNDING_DECIDES = ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4", "rt_detr", "rt_detr_v2")
# Dense models whose own save_pretrained and from_pretrained do not round-trip: their shrunk configs are refused, or
# rebuilt with other sizes, when read back.
DENSE_DOES_NOT_LOAD = tuple(
    """
    apertus1p5 data2vec-audio depth_pro dory dots3_note dots3_note_text embedding_gemma2 embedding_gemma2_text
    fun_asr_nano gemma4 gemma4_text gemma4_unified gemma4_unified_text glm5_next glm5_next_text hubert
    minimax_m3_vl molmo2 sew sew-d speecht5 step3p7 unispeech unispeech-sat vibevoice_asr wav2vec2
    wav2vec2-conformer wavlm
""".split()
)
