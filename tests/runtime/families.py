"""Tiny random models of many decoder families."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from packaging.version import Version

from kvplan.runtime.attach import CHUNKS_NEED

# Whether this transformers can read a prompt in chunks.
CHUNKS = Version(tf.__version__) >= CHUNKS_NEED

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
WINDOW = {"sliding_window": 12}
HYBRID = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}
GPT2 = {**NO_GROUPS, "intermediate_size": None, "n_positions": 512, "max_position_embeddings": None}
# model_type -> what its config has instead of, or besides, BASE; None takes a field away.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma3_text": {**HYBRID, "query_pre_attn_scalar": 8},
    "gpt_neox": NO_GROUPS,
    "opt": {**NO_GROUPS, "intermediate_size": None, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": {"head_dim": None},
    # The eight above are tested with every evictor, the others with one.
    "apertus": {},
    "biogpt": NO_GROUPS,
    "cohere": {"head_dim": None},
    "cohere2": HYBRID,
    "ernie4_5": {},
    "exaone4": HYBRID,
    "gemma": {},
    "gemma2": {**HYBRID, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **HYBRID, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    },
    "glm4": {},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_oss": {**HYBRID, **MOE},
    "granite": {},
    "granitemoe": {**MOE, "head_dim": None},
    "mixtral": MOE,
    "nemotron": {},
    "olmo2": {"head_dim": None},
    "olmo3": {**HYBRID, "head_dim": None},
    "olmoe": {**MOE, "head_dim": None},
    "phi": {"head_dim": None},
    "qwen2_moe": {**MOE, "head_dim": None, "shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "smollm3": {"head_dim": None},
    "stablelm": {"head_dim": None},
    "starcoder2": {"head_dim": None},
}  # fmt: skip
FAMILIES = tuple(CHANGES)
CORE = FAMILIES[:8]
# Soft-capped logits and sink logits: transformers has them in its eager attention alone.
CAPPED = ("gemma2", "gpt_oss")


def config(family: str, **changes: Any) -> Any:
    fields = {**BASE, **CHANGES[family], **changes}
    return tf.CONFIG_MAPPING[family](**{k: v for k, v in fields.items() if v is not None or k == "eos_token_id"})


def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(
        config(family, **changes), dtype=torch.float32, attn_implementation="eager" if family in CAPPED else "sdpa"
    )
    for parameter in made.parameters():
        # Larger weights than the default: attention that is nearly uniform would hide mistakes.
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    for name, parameter in made.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    # The default way through the experts has no float64.
    made.set_experts_implementation("eager")
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
