"""Tiny random models of several families, float64 so that equality means equality."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.prefix import FrozenBase, Prefix, PrefixBank
from pipeline.prefix.initialise import from_text

VOCABULARY = 60


def tiny_model(kind: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    encoder_decoder = {"decoder_start_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(
            **common, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if kind == "opt":
        config = OPTConfig(
            **common,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
        return OPTForCausalLM(config)
    if kind == "bart":
        config = BartConfig(
            **common, **encoder_decoder, forced_eos_token_id=None, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )  # fmt: skip
        return BartForConditionalGeneration(config)
    assert kind == "t5"
    config = T5Config(
        **common, **encoder_decoder, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


CAUSAL = ["llama", "gpt2", "opt"]
ENCODER_DECODER = ["bart", "t5"]


@pytest.fixture
def bank_of_text() -> Callable[..., PrefixBank]:
    """A bank in float64: slot 0 empty, slot 1 the prefix of a text, slot 2 another, shorter one."""

    def make(base: FrozenBase, text: list[int]) -> PrefixBank:
        prefix: Prefix = from_text(base, text, len(text))
        bank = PrefixBank(base.sites, slots=3, length=len(text) + 2).double()
        bank.put(1, prefix)
        bank.put(2, {site: (key[:, :2] * 1.5, value[:, :2]) for site, (key, value) in prefix.items()})
        return bank

    return make
