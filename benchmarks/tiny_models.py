"""A tiny random model of any architecture, with whatever makes it different switched on and small enough to matter.

Configurations are shrunk by the names of their fields, never by architecture. Of layers that differ (`layer_types` and
the like) one of each kind stays. Weights are random everywhere: a norm, a bias or a sink left at its first value would
hide that it was dropped.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WINDOW = 8


@dataclass(frozen=True)
class Variant:
    """How a tiny configuration is made: features and sizes whose name matches `without` keep their default; one layer
    of each kind is there `times` times; with `grouped`, fewer heads of keys than of queries."""

    without: str = "$^"
    times: int = 1
    grouped: bool = True


# Not every architecture can have every feature: what its own code refuses is left out, as little as possible.
VARIANTS = (
    Variant(),
    Variant(times=2),
    Variant(grouped=False),
    Variant("partial_rotary_factor"),
    Variant(".*bias"),
    Variant("use_qk_norm|qk_layernorm|new_decoder_architecture|enable_moe_block"),
    Variant(".*sliding_window.*"),
    Variant(".*bias|partial_rotary_factor|use_qk_norm|qk_layernorm|new_decoder_architecture|enable_moe_block", 2),
    Variant(".*bias|.*sliding_window.*|partial_rotary_factor|use_.*|enable_moe_block", 2, grouped=False),
)

# The first pattern that matches a field's whole name decides. Features come first, sizes after them.
_FEATURES: tuple[tuple[str, Any], ...] = (
    (r".*softcap.*|.*soft_cap.*", 2.0),
    (r"(?!.*(pattern|layers|every|period|mixed|use_)).*sliding_window(_size)?|local_window_size", WINDOW),
    (r"attention_chunk_size", WINDOW),
    (r"use_sliding_window", True),
    (r"attention_bias|qkv_bias|use_qkv_bias|attn_bias|mlp_bias|lm_head_bias|use_bias", True),
    (r"use_qk_norm|qk_layernorm|new_decoder_architecture", True),
    (r"norm_topk_prob", True),
    (r"enable_moe_block|is_decoder", True),
    (r"default_language", "en_XX"),
    (r"axial_pos_embds", False),
    (r"attention_type", "original_full"),
)
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size", 2),
    (r"vocab_size_per_layer_input|(.*_)?vocab_size", 128),
    (r"unpadded_vocab_size", 120),
    (r"max_window_layers|num_dense_layers|first_k_dense_replace|.*offset", 1),
    (r".*_(period|interval|pattern|step)|global_attn_every_n_layers|layer_group_size", 2),
    (r"hidden_size_per_layer_input|ple_embed_dim", 16),
    (r"qk_head_dim", 24),
    (r"mamba_d_head|mamba_headdim", 32),
    (r"mamba_d_ssm", 128),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"head_dim|.*_head_dim|d_kv|kv_channels|mamba_head_dim", 16),
    (
        (
            r"(hidden_size|d_model|n_embd|embedding_size|dim|width|hidden_dim|attention_hidden_size|dim_model"
            r"|embed_dim|attn_hidden_size|d_embed|word_embed_proj_dim|cross_attention_hidden_size)"
        ),
        64,
    ),
    (
        (
            r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(en|de)coder_layers|num_blocks|depth"
            r"|n_encoder_layers|num_mem_blocks"
        ),
        2,
    ),
    (r"indexer_kv_heads", 1),
    (r".*num_key_value_heads|num_kv_heads|n_head_kv|.*num_key_heads|.*_kv_heads|multi_query_group_num", 2),
    (
        (
            r"(.*_)?(num_heads|n_heads?|num_attention_heads|attention_heads|num_value_heads|n_mamba_heads)"
            r"|mamba_num_heads|linear_num_heads"
        ),
        4,
    ),
    (
        (
            r"(moe|shared|expert|shared_expert|shared_experts)_(expert_)?(intermediate|ffn_hidden)_(size|dim)"
            r"|.*expert.*(intermediate|hidden)_(size|dim)|moe_intermediate.*|expert_ffn_hidden_size"
        ),
        32,
    ),
    (
        (
            r".*intermediate_size.*|ffn_hidden_size|(.*_)?ffn_dim|ffn_dim|d_inner|dim_ff|d_ff|n_inner|mlp_dim|inner_dim"
            r"|intermediate_dim"
        ),
        96,
    ),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts|top_k", 2),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts", 8),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|topk_group", 1),
    (r"n_group|num_expert_group|moe_n_group", 2),
    (r"q_lora_rank|.*lora_rank|.*lowrank|.*_rank", 16),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_ssm", 16),
    (r".*chunk_size", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 2),
    (r"index_topk|.*_budget", 8),
    (r"indexer_compress_ratio", 2),
    (
        (
            r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions|max_source_positions"
            r"|model_max_length|seq_length|max_length|max_sequence_length)"
        ),
        128,
    ),
)


# Fields that are None where a size is meant, not where a feature is absent.
_NEEDED = (
    r"head_dim|num_experts|n_routed_experts|n_shared_experts|num_experts_per_tok|top_k_experts|moe_intermediate_size|indexer_.*|n_group"
    r"|topk_group"
)


def tiny_model(model_type: str, variant: Variant = VARIANTS[0]) -> nn.Module:
    """A random causal language model of that type, in eval mode, always the same one; eager attention.

    Raises what the model's own code raises.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]
    config = tiny_config(model_class.config_class, variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation="eager")
        randomize(model)
    return model.eval()  # type: ignore[no-any-return]


def tiny_config(config_class: Any, variant: Variant = VARIANTS[0]) -> Any:
    """The shrunk configuration of a class of configurations."""
    unwanted = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype"}
    fields = {n: v for n, v in config_class().to_dict().items() if n not in unwanted and not n.startswith("_")}
    return config_class(**_shrink(fields, variant))


def _shrink(fields: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """New values of the fields of one configuration, nested ones included."""
    small: dict[str, Any] = {}
    kept = _kept_layers(fields) * variant.times
    for name, value in fields.items():
        if isinstance(value, dict) and name == "per_layer_config":
            small[name] = _per_layer(value, kept, variant)
        elif isinstance(value, dict) and "model_type" in value:
            small[name] = _shrink(value, variant)
        elif isinstance(value, dict) and name.endswith("_config"):
            small[name] = value | _shrink(value, variant)
        elif isinstance(value, list) and kept and len(value) == _depth(fields):
            small[name] = [value[i] for i in kept]
        elif (new := _new_value(name, value, fields, variant)) is not None:
            small[name] = new
        elif name == "model_type":
            small[name] = value
    if kept:
        small |= {name: len(kept) for name in _DEPTHS if name in fields}
    return small | _special_tokens(fields) | _rotary(fields, variant) | _related(fields, small, variant)


_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _depth(fields: Mapping[str, Any]) -> int:
    return next((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), 0)


def _kept_layers(fields: Mapping[str, Any]) -> list[int]:
    """One layer of each kind: indices that together show every value of every per-layer list; none without lists."""
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == _depth(fields) > 1]
    kept: list[int] = []
    for values in lists:
        for value in dict.fromkeys(map(str, values)):
            if not any(str(values[i]) == value for i in kept):
                kept.append([str(v) for v in values].index(value))
    while lists and len(kept) < 2:
        kept.append(next(i for i in range(_depth(fields)) if i not in kept))
    return sorted(kept)


def _per_layer(changes: Mapping[Any, Any], kept: list[int], variant: Variant) -> dict[int, Any]:
    """What single layers have of their own, for the layers that are kept."""
    by_layer = {int(layer): fields for layer, fields in changes.items()}
    return {new: by_layer[old] | _shrink(by_layer[old], variant) for new, old in enumerate(kept) if old in by_layer}


def _new_value(name: str, value: Any, fields: Mapping[str, Any], variant: Variant) -> Any:
    """The value a field gets in a tiny model; None keeps its default."""
    if re.fullmatch(variant.without, name):
        return None
    for pattern, new in _FEATURES:
        if re.fullmatch(pattern, name):
            return new
    needed = value is None and re.fullmatch(_NEEDED, name)
    if not needed and (not isinstance(value, int) or isinstance(value, bool) or value <= 1):
        return None
    return next((new for pattern, new in _SIZES if re.fullmatch(pattern, name)), None)


def _related(fields: Mapping[str, Any], small: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Sizes that follow from others."""
    related: dict[str, Any] = {}
    if "qk_rope_head_dim" in fields:  # latent attention: all heads have keys of their own, one part of them rotated
        related |= {"head_dim": small["qk_rope_head_dim"]} if "head_dim" in fields else {}
    if "qk_rope_head_dim" in fields or not variant.grouped:
        related |= dict.fromkeys((n for n in fields if n.endswith("num_key_value_heads")), 4)
    if {"expand", "num_heads", "state_size"} <= set(fields):  # a state space: heads divide the expanded channels
        related["num_heads"] = 64 * int(fields["expand"]) // 16
    if fields.get("attention_hidden_size") == 2 * fields.get("hidden_size", 0):  # a block that sees two streams
        related |= {"attention_hidden_size": 128, "attention_head_dim": 32}
    if fields.get("num_kv_shared_layers") and "layer_types" in small:  # the last layers read what the first wrote
        related["num_kv_shared_layers"] = len(small["layer_types"]) // 2
    return related


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens that lie outside the small vocabulary move to its end."""
    tokens = [n for n in fields if n.endswith(("token_id", "token_index"))]
    outside = [n for n in tokens if not isinstance(fields[n], int) or fields[n] > 99]
    return {name: 127 - i for i, name in enumerate(sorted(outside)) if fields[name] is not None}


def _rotary(fields: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Rotate a part of the channels only, where the architecture can; latent attention does that by its own sizes."""
    if re.fullmatch(variant.without, "partial_rotary_factor") or "qk_rope_head_dim" in fields:
        return {}
    small: dict[str, Any] = {}
    if isinstance(fields.get("partial_rotary_factor"), float):
        small["partial_rotary_factor"] = 0.5
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict):
        small["rope_parameters"] = _small_rope(rope)
    return small


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters for short sequences and heads of 16 channels."""
    small = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if "partial_rotary_factor" in small:
        small["partial_rotary_factor"] = 0.5
    if "mrope_section" in small:
        small["mrope_section"] = [2, 1, 1] if small.get("partial_rotary_factor", 1.0) < 1 else [4, 2, 2]
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 64
    return small


def randomize(model: nn.Module) -> None:
    """Random values for every parameter, and for buffers that are all zero, at scales that keep activations near 1."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise if id(parameter) in embeddings else noise * parameter.shape[-1] ** -0.5)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.any():
                buffer.add_(0.1 * torch.randn_like(buffer))


def features(model: nn.Module) -> list[str]:
    """What a tiny model has that a capture could lose, in a few words each."""
    return sorted(set(_features(model)))


def _features(model: nn.Module) -> Iterator[str]:
    config = model.config.get_text_config(decoder=True).to_dict()
    names = [name for name, _ in model.named_parameters()]
    for name, value in config.items():
        if value == WINDOW and ("window" in name or name == "attention_chunk_size"):
            yield "chunks" if "chunk" in name else "window"
        if "softcap" in name and value:
            yield "soft cap"
    if "'partial_rotary_factor': 0.5" in str(config) or config.get("rotary_dim"):
        yield "partial rotary"
    patterns = {
        r"\.(sinks?|s_aux)\b": "sinks",
        r"attn?.*\.(q|query|qkv|c_attn|query_key_value|q_proj|Wqkv|in_proj)[a-z_]*\.bias": "attention bias",
        r"experts?": "experts",
        r"(kv_a|kv_b|kv_lora).*": "latent attention",
        r"A_log|conv1d": "state space or linear attention",
        r"(q|k|query|key)_?(layer)?norm": "query and key norms",
    }
    for pattern, feature in patterns.items():
        if any(re.search(pattern, name) for name in names):
            yield feature
    if len(set(config.get("layer_types") or ())) > 1:
        yield "mixed layers"
    if config.get("tie_word_embeddings"):
        yield "tied embeddings"
