"""The families of transformers in the zoo: those that the rules alone build, and one row for each that needs more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers_zoo import BATCH, LENGTH, Row

M_ROPE = {"rope_parameters": {"mrope_section": [2, 3, 3]}}


def _random(*shape: int) -> Any:
    return lambda _config: torch.randn(BATCH, *shape)


def _ones(*shape: int) -> Any:
    return lambda _config: torch.ones(BATCH, *shape, dtype=torch.long)


def _grid(_config: Any) -> Tensor:
    """Two pictures of 4 x 8 and 4 x 4 patches."""
    return torch.tensor([[1, 4, 8], [1, 4, 4]])


def _patches(config: Any) -> Tensor:
    """The patches of `_grid`, flat."""
    channels, depth = getattr(config, "in_channels", 3), getattr(config, "temporal_patch_size", 1)
    return torch.randn(48, channels * depth * config.patch_size**2)


def _video(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    frames = getattr(vision, "num_frames", 8)
    return torch.randn(BATCH, frames, 3, vision.image_size, vision.image_size)


GRID = {"hidden_states": _patches, "grid_thw": _grid}
SMALL_SWIN = {"window_size": 4, "image_size": 32, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32}

DIFFERENT = (
    # text
    Row("bros", config={"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
        inputs={"bbox": lambda c: torch.rand(BATCH, LENGTH, 4)}),
    Row("esm", config={"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"}),
    Row("esmc", config={"num_key_value_heads": 4}),
    Row("falcon_h1", config={"mamba_d_ssm": 128}),
    Row("gemma3n_text", config={"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0],
                                "num_kv_shared_layers": 0}),
    Row("gpt_neo", config={"attention_layers": ["global", "local"], "attention_types": [[["global", "local"], 1]],
                           "num_layers": 2, "window_size": 6}),
    Row("layoutlmv3", config={"coordinate_size": 11, "shape_size": 10, "input_size": 32, "num_channels": 3}),
    Row("lilt", config={"hidden_size": 96, "channel_shrink_ratio": 4}),
    Row("longformer", config={"attention_window": [8, 8]}),
    Row("led", config={"attention_window": [8, 8]}),
    Row("xlnet", config={"d_inner": 96}),
    Row("xmod", config={"languages": ["en_XX"], "default_language": "en_XX"}),
    Row("reformer", config={"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"],
                            "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 1},
        inputs={"input_ids": lambda c: torch.randint(20, 99, (BATCH, 32)), "attention_mask": None}),
    Row("lxmert", config={"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 24},
        inputs={"visual_feats": _random(6, 24), "visual_pos": _random(6, 4)}),
    Row("decision_transformer", config={"state_dim": 5, "act_dim": 3},
        inputs={"input_ids": None, "attention_mask": _ones(6), "states": _random(6, 5), "actions": _random(6, 3),
                "returns_to_go": _random(6, 1), "rewards": _random(6, 1), "timesteps": _ones(6)}),
    # multi-head latent attention, sections of rotary embedding
    Row("deepseek_v2", config={"num_experts_per_tok": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    *(Row(name, config={"text_config": M_ROPE, **M_ROPE}) for name in ("qwen2_vl", "qwen2_5_vl")),
    *(Row(name, config=M_ROPE) for name in ("qwen2_vl_text", "qwen2_5_vl_text")),
    *(Row(name, config={"text_config": M_ROPE}) for name in ("glm4v", "glm46v", "glm_image", "glm_ocr")),
    *(Row(name, config=M_ROPE) for name in ("glm4v_text", "glm_image_text", "glm_ocr_text")),
    Row("paddleocr_vl", config={"text_config": M_ROPE}),
    # pictures
    # (their keys are pooled: in a smaller picture only one would be left)
    *(Row(name, config={"image_size": 64}, inputs={"pixel_values": lambda c: torch.randn(BATCH, 3, 64, 64)})
      for name in ("pvt", "pvt_v2", "segformer", "glpn")),
    *(Row(name, config={"image_size": size}, inputs={"pixel_values": lambda c, size=size: torch.randn(BATCH, 3, *size)})
      for name, size in (("mobilevit", [128, 128]), ("hiera", [64, 64]))),
    Row("maskformer", inputs={"pixel_values": lambda c: torch.randn(BATCH, 3, 64, 64)}),
    Row("vitdet", config={"window_size": 2, "window_block_indices": [0]}),
    Row("dinov3_vit", config={"rope_theta": 100.0}),
    *(Row(name, config=SMALL_SWIN) for name in ("swin", "swinv2", "donut-swin", "maskformer-swin")),
    Row("swin2sr", config={**SMALL_SWIN, "embed_dim": 64, "num_heads": [4, 4], "upscale": 2}),
    Row("levit", config={"hidden_sizes": [32, 48], "num_attention_heads": [2, 3], "depths": [2, 2], "key_dim": [16, 16],
                         "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "image_size": 64,
                         "down_ops": [["Subsample", 16, 2, 4, 2, 2]], "patch_size": 16}),
    Row("sam_vision_model", config={"window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16}),
    Row("sam_hq_vision_model", config={"window_size": 2, "global_attn_indexes": [1]}),
    Row("siglip2_vision_model", inputs={"pixel_values": _random(12, 192), "pixel_attention_mask": _ones(12),
                                        "spatial_shapes": lambda c: torch.tensor([[3, 4], [4, 3]])}),
    *(Row(name, inputs={"pixel_values": _video}) for name in ("vivit", "timesformer", "videomae")),
    Row("perceiver", config={"d_latents": 32, "d_model": 64, "num_blocks": 1, "num_self_attends_per_block": 2,
                             "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
        inputs={"input_ids": None, "attention_mask": None, "inputs": _random(12, 64)}),
    *(Row(name, inputs=GRID) for name in ("qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision", "glm4v_vision",
                                          "qwen3_5_vision", "exaone4_5_vision")),
    # sound
    Row("audio-spectrogram-transformer", config={"max_length": 64, "num_mel_bins": 32},
        inputs={"input_values": _random(64, 32)}),
    Row("speech_to_text", config={"input_feat_per_channel": 80, "conv_channels": 32},
        inputs={"input_features": _random(64, 80), "attention_mask": None}),
    Row("wav2vec2-bert", inputs={"input_features": _random(24, 160), "attention_mask": None}),
    Row("moonshine", config={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    *(Row(name, inputs={"input_features": _random(128, 80)}) for name in ("parakeet_encoder", "parakeet_ctc")),
    Row("gemma3n_audio", inputs={"audio_mel": _random(48, 128),
                                 "audio_mel_mask": lambda c: torch.zeros(BATCH, 48, dtype=torch.bool)}),
    # series
    Row("patchtst", config={"context_length": 32, "patch_length": 4}, inputs={"past_values": _random(32, 1)}),
    # several
    Row("speecht5", model="SpeechT5ForSpeechToText"),
)  # fmt: skip
# Built by the rules alone.
BY_RULES = (
    "afmoe", "aimv2", "aimv2_vision_model", "albert", "altclip", "apertus", "arcee", "aria", "aria_text",
    "audioflamingo3", "axk1", "axk2", "aya_vision", "bamba", "bart", "beam", "beit", "bert", "bert-generation",
    "big_bird", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small", "blip", "bloom", "bridgetower",
    "camembert", "canine", "chinese_clip", "chinese_clip_vision_model", "clip", "clip_text_model", "clip_vision_model",
    "clipseg", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere2_vision", "convbert", "cosmos3_edge",
    "cosmos3_edge_text", "cosmos3_omni", "cpmant", "ctrl", "cvt", "cwm", "data2vec-audio", "data2vec-text", "deberta",
    "deberta-v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_vl", "deepseek_vl_hybrid", "deit", "diffllama",
    "dinov2", "dinov2_with_registers", "distilbert", "doge", "dots3_note_text", "dpr", "dpt", "electra",
    "embedding_gemma2", "embedding_gemma2_text", "ernie", "ernie4_5", "ernie4_5_moe", "eurobert", "evolla", "exaone4",
    "exaone4_5", "exaone_moe", "falcon", "fastspeech2_conformer", "flaubert", "flava", "flex_olmo", "flint", "fsmt",
    "funnel", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "git", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glmasr", "glmasr_encoder",
    "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite",
    "granite_docling", "granite_docling_text", "granite_speech", "granite_speech_plus", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoeshared", "groupvit", "gte", "helium", "higgs_audio_v2", "hrm_text", "hubert",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "hyperclovax_vision_v2", "ibert", "idefics2",
    "idefics3", "ijepa", "imagegpt", "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text", "internlm3",
    "internvl", "internvl_vision", "iquestcoder", "jais2", "jetmoe", "jina_embeddings_v3", "kimi_k25", "kimi_linear",
    "kolibri1", "kosmos-2.5", "lfm2", "lfm2_vl", "lfm3", "lfm3_vl", "lighton_ocr", "llama", "llama4", "llama4_text",
    "llava", "llava_next", "llava_next_video", "llava_onevision", "longcat_flash", "longt5", "luke", "m2m_100", "marian",
    "markuplm", "mbart", "megatron-bert", "mellum", "metaclip_2", "mgp-str", "mimo_v2_flash", "minicpm3",
    "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text",
    "ministral", "ministral3", "mistral", "mistral3", "mixtral", "mlcd", "mlcd_vision_model", "mllama", "mobilebert",
    "modernbert", "modernbert-decoder", "modernvbert", "molmo2_text", "moshi", "moss_transcribe_diarize",
    "moss_transcribe_diarize_audio", "mpnet", "mpt", "mt5", "muse_glimmer", "muse_glimmer_text", "muse_spark_text",
    "musicflamingo", "mvp", "nanochat", "neomme", "nllb-moe", "nomic_bert", "nystromformer", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "openai-gpt", "openai_privacy_filter", "opt", "ovis2", "owlv2", "owlvit", "paligemma",
    "pegasus", "pegasus_x", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "pixio", "pixtral", "plbart",
    "prophetnet", "qianfan_ocr", "qianfan_ocr_vision", "qwen2", "qwen2_audio", "qwen2_audio_encoder",
    "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_asr", "qwen3_moe",
    "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "radio", "recurrent_gemma", "rembert",
    "rf_detr", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "sam3", "sam3_lite_text",
    "sam3_lite_text_text_model", "sam3_vision_model", "sam3_vit_model", "seed_oss", "sew", "sew-d", "siglip",
    "siglip_vision_model", "smollm3", "smolvlm", "solar_open", "splinter", "squeezebert", "stablelm", "starcoder2",
    "switch_transformers", "t5", "t5gemma", "t5gemma2", "tapas", "tipsv2", "tipsv2_text_model", "tipsv2_vision_model",
    "udop", "ultrabert", "ultravbert", "umt5", "unispeech", "unispeech-sat", "vaultgemma", "video_llama_3", "video_llava",
    "videoprism", "videoprism_vision_model", "vilt", "vipllava", "vision-text-dual-encoder", "visual_bert", "vit",
    "vit_mae", "vit_msn", "vjepa2", "voxtral", "voxtral_encoder", "voxtral_realtime_encoder", "wav2vec2",
    "wav2vec2-conformer", "wavlm", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "yolos", "youtu", "zaya",
)  # fmt: skip

ROWS = (*(Row(name) for name in BY_RULES), *DIFFERENT)
