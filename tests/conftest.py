"""Tiny random models: no download, no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

# For `make nightly`: `pytest --hypothesis-profile nightly`.
settings.register_profile("nightly", deadline=None, print_blob=True)

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(config_class: type = LlamaConfig, **changes: Any) -> Any:
    """A config of the tiny size: 4 layers, 4 query and 2 KV heads, head_dim 8, 128 words."""
    return config_class(**{**TINY, **changes})


def tiny_model(config: Any = None, *, seed: int = 0) -> Any:
    """A random float32 model in eval mode; the same for the same config and seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Shared by all tests of a worker: do not change its weights."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Splits at blanks; ids 0 to 3 are <pad>, <s>, </s> and <unk>, the others are the letters and numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *(str(i) for i in range(98))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
