from typing import Any

import pytest
from transformers import GPT2Config, Lfm2Config, MistralConfig, Qwen3Config, T5Config

from kvplan.errors import ModelError
from kvplan.model_spec import LayerSpec, ModelSpec, model_fingerprint
from tests.conftest import tiny_config, tiny_model

TINY_LAYER = LayerSpec(kv_heads=2, key_dim=8, value_dim=8)


def test_llama_is_read() -> None:
    spec = ModelSpec.from_config(tiny_config(), "bfloat16", "sha256:x")
    assert spec == ModelSpec((TINY_LAYER,) * 4, 4, "bfloat16", 4096, "llama", "sha256:x")


def test_a_model_without_grouped_heads_has_a_kv_head_per_query_head() -> None:
    spec = ModelSpec.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64), "float32")
    assert spec.layers == (LayerSpec(4, 8, 8),) * 2
    assert spec.max_context_tokens == 64


def test_a_window_without_layer_types_applies_to_every_layer() -> None:
    spec = ModelSpec.from_config(tiny_config(MistralConfig, sliding_window=16), "float32")
    assert [layer.window for layer in spec.layers] == [16] * 4


def test_layer_types_decide_the_window() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    config = tiny_config(Qwen3Config, layer_types=types, sliding_window=16, use_sliding_window=True)
    assert [layer.window for layer in ModelSpec.from_config(config, "float32").layers] == [16, None, 16, None]


def test_layers_that_are_not_attention_are_refused() -> None:
    types = ["conv", "full_attention"]
    config = Lfm2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types=types)
    with pytest.raises(ModelError, match="lfm2: layers of type conv are not supported"):
        ModelSpec.from_config(config, "float32")


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        ModelSpec.from_config(T5Config(), "float32")


def test_bytes_of_the_full_cache() -> None:
    spec = ModelSpec((TINY_LAYER, LayerSpec(2, 8, 8, window=5)), 4, "float16")
    assert spec.token_bytes(0) == 2 * (8 + 8) * 2
    assert spec.full_kv_bytes([10, 3]) == 64 * (10 + 3) + 64 * (5 + 3)


def test_a_spec_survives_json() -> None:
    spec = ModelSpec((TINY_LAYER, LayerSpec(1, 8, 4, window=5)), 4, "float16", 99, "llama", "sha256:x")
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_the_policy_block_is_short_when_layers_agree() -> None:
    block = ModelSpec((TINY_LAYER,) * 4, 4, "float32", model_type="llama").policy_block()
    assert block == {"type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}


def test_the_fingerprint_is_of_the_weights(tiny_llama: Any) -> None:
    assert model_fingerprint(tiny_model()) == model_fingerprint(tiny_llama)
    assert model_fingerprint(tiny_model(seed=1)) != model_fingerprint(tiny_llama)


def test_the_fingerprint_is_of_the_config() -> None:
    changed = tiny_model()
    before = model_fingerprint(changed)
    changed.config.rms_norm_eps *= 2
    assert model_fingerprint(changed) != before
