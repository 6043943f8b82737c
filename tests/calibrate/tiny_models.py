"""Tiny random models of many families, and prompts for them."""

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvplan.calibrate.examples import Example

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
    "phi3": {},
    "phi": {},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 20, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"num_key_value_heads": 4, "n_positions": 256},
    "gpt_oss": {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def tiny(family, implementation=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **EXTRA[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # attention that is not almost uniform
    return model


def example(name, num_tokens):
    rng = random.Random(f"{name}-{num_tokens}")
    ids = tuple(rng.randrange(3, 97) for _ in range(num_tokens))
    return Example(
        id=str(name),
        task="text",
        prompt_ids=ids,
        continuation_ids=(),
        answers=(),
        question_aware=False,
        text="",
        max_new_tokens=None,
    )


def examples(*lengths):
    return [example(i, n) for i, n in enumerate(lengths)]
