"""Tiny random models of every supported family: a few thousand parameters each, whatever makes the family different kept.

Sliding windows are 16 positions wide: wider than a short test's sequence, narrower than a long one's.
"""

from typing import Any

import torch
import transformers

VOCABULARY = 60

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROTARY = {
    **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_SEQ2SEQ = {**_COMMON, "decoder_start_token_id": 0}
_GEMMA = {**_ROTARY, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}

# family -> (name of the config class, name of the model class, settings)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {**_COMMON, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
         "word_embed_proj_dim": 32},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_ROTARY, "attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_ROTARY, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_ROTARY, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_ROTARY, "head_dim": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_ROTARY, "original_max_position_embeddings": 64, "sliding_window": None}),
    # As Phi-3 with 128k: rows beyond 24 positions turn the whole batch by other factors.
    "phi3-longrope": (
        "Phi3Config", "Phi3ForCausalLM",
        {**_ROTARY, "original_max_position_embeddings": 24, "sliding_window": None,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    ),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                                         "num_hidden_layers": 4}),
    # Its full layers have heads of another size and number than its sliding ones.
    "gemma4": (
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        {**_ROTARY, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 16,
         "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**_ROTARY, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {**_ROTARY, "head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "bart": (
        "BartConfig", "BartForConditionalGeneration",
        {**_SEQ2SEQ, "forced_eos_token_id": None, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    ),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {**_SEQ2SEQ, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
         "relative_attention_max_distance": 20},
    ),
}  # fmt: skip

ENCODER_DECODER = ["bart", "t5"]
EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss"]
CAUSAL = [name for name in _FAMILIES if name not in ENCODER_DECODER]
# PEFT knows one number and one size of heads for all layers.
ONE_SIZE = [name for name in CAUSAL if name != "gemma4"]
# Their own eager functions are the only ones that know soft caps and attention sinks.
EAGER_ONLY = ["gemma2", "gpt_oss"]


def tiny_model(family: str, **changed: Any) -> Any:
    """The family's model with seeded random weights, on the CPU in float32; keyword arguments change its configuration."""
    config, model, settings = _FAMILIES[family]
    settings = {**settings, **changed}
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    # Every key and value should matter: transformers' own initialisation (std 0.02) makes attention nearly uniform and biases zero.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return built


def some_ids(rows: int, length: int) -> torch.Tensor:
    """Token ids [rows, length] without special tokens, the same every time."""
    return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Rows of token ids as one batch: ids and mask [B, T], and where each row stands."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 1), torch.zeros(len(rows), longest, dtype=torch.int64)
    where = [slice(longest - len(row), longest) if left else slice(0, len(row)) for row in rows]
    for i, row in enumerate(rows):
        ids[i, where[i]], mask[i, where[i]] = row, 1
    return ids, mask, where


def tiny_double(family: str, **changed: Any) -> Any:
    """As `tiny_model` in float64, so that equality means equality."""
    model = tiny_model(family, **changed).double().eval()
    # The grouped matrix product of transformers 5.23 knows no float64.
    model.set_experts_implementation("eager")
    return model
