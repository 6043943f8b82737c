"""Tiny random models of several decoder families."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt_neox", "opt", "phi3")


def config(family: str) -> Any:
    if family == "opt":
        return tf.OPTConfig(
            vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=None,
            pad_token_id=0, dropout=0.0,
        )  # fmt: skip
    if family == "gpt_neox":
        skipped = ("num_key_value_heads", "head_dim")
        return tf.GPTNeoXConfig(**{k: v for k, v in BASE.items() if k not in skipped})
    if family == "gemma3":
        return tf.Gemma3TextConfig(
            **BASE, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=8
        )
    changes = {"sliding_window": 12} if family == "mistral" else {}
    skipped = ("head_dim",) if family in ("qwen2", "phi3") else ()
    makers = {
        "llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config,
        "mistral": tf.MistralConfig, "phi3": tf.Phi3Config,
    }  # fmt: skip
    return makers[family](**{k: v for k, v in BASE.items() if k not in skipped}, **changes)


def model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    for parameter in made.parameters():
        # Larger weights than the default: attention that is nearly uniform would hide mistakes.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return made.to(dtype).eval()


def prompts(lengths: tuple[int, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, width - n :] = torch.randint(3, 96, (n,), generator=generator)
        mask[row, width - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}
