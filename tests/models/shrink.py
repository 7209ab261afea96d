"""Small configs of transformers models, by rules over the names of their fields.

A default config is walked with its sub-configs, and every field whose name is in the table becomes small. All widths become
the same, so that the parts of a composite model fit together without naming any of them. What the rules get wrong for one
family is corrected in its row of `transformers_rows.py`.
"""

from __future__ import annotations

import re
from typing import Any

WIDTH, HEADS, HEAD_DIM, LAYERS, INNER, VOCABULARY = 64, 4, 16, 2, 96, 99
IMAGE, PATCH, POSITIONS, WINDOW = 32, 8, 128, 6

# Fields by exact name or regular expression, the first that fits; a callable gets the old value.
_RULES: tuple[tuple[str, Any], ...] = (
    # tokens
    (r"(\w+_)?vocab_size|vocabulary_size|n_vocab|text_vocab_size", VOCABULARY),
    (r"codebook_size", 64),
    (r"type_vocab_size", lambda old: min(old, 4)),
    # widths
    (r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_dim|embedding_size|word_embed_proj_dim|emb_dim", WIDTH),
    (r"(text|vision|audio|encoder|decoder|cross|output|out|backbone|projector|target|llm|fpn|qformer|query|input|image)_"
     r"(hidden_size|hidden_dim|embed_dim|dim|embedding_size|embed_size)", WIDTH),
    (r"projection_dim|projection_size|d_embed|hidden_states_dim|proj_hidden_size|pooler_output_size|encoder_width", WIDTH),
    (r"intermediate_size|(\w+_)?ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|(\w+_)?intermediate_size|d_inner|dim_ff|"
     r"ffn_size|feed_forward_size|dim_feedforward|ffn_embed_dim", INNER),
    # heads
    (r"num_key_value_heads|(\w+_)?num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads",
     lambda old: 2 if old > 1 else old),
    (r"(\w+_)?num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|attention_heads", HEADS),
    (r"head_dim|global_head_dim|attention_head_dim|d_kv|qk_head_dim_total|attention_head_size|d_head|kv_channels", HEAD_DIM),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"v_head_dim|qk_head_dim", HEAD_DIM),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 32),
    (r"index_head_dim", HEAD_DIM), (r"index_n_heads", 2), (r"index_topk", 8),
    # depth
    (r"(\w+_)?num_hidden_layers|n_layers?|(\w+_)?num_layers|(en|de)coder_layers|num_blocks|depth|n_enc_layers|layers|"
     r"num_(en|de)coder_layers|num_attention_layers|max_window_layers|num_hidden_groups", lambda old: min(old, LAYERS)),
    # experts
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", lambda old: min(old, 4)),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_experts_per_token", lambda old: min(old, 2)),
    (r"n_group|topk_group|first_k_dense_replace", 1),
    # lengths
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|block_size|context_size|seq_length", POSITIONS),
    (r"max_(source|target)_positions|original_max_position_embeddings", POSITIONS),
    (r"sliding_window|sliding_window_size|attention_window_size|local_attention", WINDOW),
    (r"attention_chunk_size", 8),
    (r"num_queries|num_query_tokens|num_latents", lambda old: min(old, 8)),
    # images
    (r"image_size|img_size|pretrain_image_size|input_size", IMAGE),
    (r"patch_size", lambda old: PATCH if old > 4 else old),
    # state space and linear attention
    (r"mamba_d_state|ssm_state_size|state_size", 8), (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16), (r"mamba_n_groups", 1), (r"mamba_chunk_size|chunk_size", lambda old: min(old, 16)),
    (r"linear_num_(key|value)_heads", 2), (r"linear_(key|value)_head_dim", HEAD_DIM), (r"lru_width", WIDTH),
    # audio
    (r"num_conv_pos_embeddings", 8), (r"num_conv_pos_embedding_groups", 4),
)  # fmt: skip
_DROPPED = ("id2label", "label2id", "out_features", "out_indices", "stage_names", "per_layer_config")
_DROPOUTS = re.compile(r"\w*(dropout|dropout_rate|dropout_prob|pdrop|layerdrop|drop_path_rate|drop_rate)(_\w+)?$")
_NO_RATE = re.compile(r"layerdrop|drop_path|spec_augment|\w*layerdrop")


def shrink(values: dict[str, Any], dropout: float = 0.0) -> dict[str, Any]:
    """The fields of a config, as a new dictionary, small. `dropout` is the rate of every dropout (never of whole layers)."""
    found = {str(name): _small(str(name), value, dropout) for name, value in values.items() if name not in _DROPPED}
    depth = next((found[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(found.get(n), int)), LAYERS)
    for name, value in found.items():
        if name in _PER_LAYER and isinstance(value, list):
            found[name] = _first_of_each(value, depth)
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            found[name] = _token(name)
        if name.endswith(("_token_index", "_token_ids")) and isinstance(value, int) and value >= VOCABULARY:
            found[name] = _token(name)
    if isinstance(found.get("eos_token_id"), list):
        found["eos_token_id"] = 2
    if "qk_rope_head_dim" in found:  # multi-head latent attention: one key head a query head, a head's rotated part
        found["head_dim"], found["num_key_value_heads"] = HEAD_DIM // 2, found.get("num_attention_heads", HEADS)
    elif found.get("head_dim", 0) is None:
        found["head_dim"] = HEAD_DIM
    if isinstance(found.get("num_heads"), list) and "embed_dim" in found:  # widths double from stage to stage
        found["num_heads"], found["depths"] = [HEADS] * len(found["num_heads"]), [LAYERS] * len(found["num_heads"])
    return found


def _small(name: str, value: Any, dropout: float) -> Any:
    if isinstance(value, dict):
        return _small_rope(value) if "rope" in name else shrink(value, dropout)
    if isinstance(value, float) or (value == 0 and value is not False):
        return _rate(name, value, dropout) if _DROPOUTS.match(name) else value
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            if isinstance(value, int):
                return small(value) if callable(small) else small
            if name in ("image_size", "img_size", "input_size"):
                return [IMAGE] * len(value)
    return list(value) if isinstance(value, tuple) else value


def _rate(name: str, value: float, dropout: float) -> float:
    """A rate of dropout. Of whole layers nothing is ever dropped; an integer zero stays one, as some fields are typed so."""
    return value * 0 if _NO_RATE.match(name) or not dropout else dropout


def _small_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: sections of a head must add up to half of it."""
    found = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in values.items()}
    if found.get("mrope_section"):
        found["mrope_section"] = [2, 3, 3] if len(found["mrope_section"]) == 3 else [2] * len(found["mrope_section"])
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = POSITIONS // 2
    return found


_PER_LAYER = frozenset({"layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_types",
                        "no_rope_layers", "indexer_types", "layer_rope_theta"})  # fmt: skip


def _first_of_each(kinds: list[Any], depth: int) -> list[Any]:
    """One layer of each kind, filled up with the first kinds again."""
    different = [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]] or [None]
    return [different[place % len(different)] for place in range(depth)]


def _token(name: str) -> int:
    """A small id for a special token, one name one id, below all ids that texts are made of and above pad, bos and eos."""
    known = ("pad", "bos", "eos")
    word = name.split("_")[0]
    return known.index(word) if word in known else 3 + sum(map(ord, name)) % 17


FIRST_TEXT_TOKEN = 20
