"""Hybrids, soft caps and sink logits under eviction; what no policy can run on is refused by name, before it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from families import BASE, CAPPED, HYBRID, MOE, NO_GROUPS, model, prompts
from test_equality import RAGGED, greedy, policy_of

import kvplan
from kvplan.errors import ModelError, PolicyError
from kvplan.methods.evictors import evictors
from kvplan.model_spec import ADVICE, LayerSpec, ModelSpec
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import spec_of

# --------------------------------------------------------------------------------------------------- hybrids

WINDOW, SLOTS = 12, 20
HYBRIDS = ("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "cohere2", "olmo3")


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_keeps_its_windows_and_budgets_the_other_layers(family: str) -> None:
    made, inputs = model(family), prompts(RAGGED)
    spec, policy = spec_of(made), policy_of(made, "snapkv", Slots(tokens=SLOTS))
    assert [layer.window for layer in spec.layers] == [WINDOW, None] * 2
    with kvplan.attach(made, policy) as runtime:
        cache = runtime.new_cache()
        greedy(made, inputs, cache, 20)
        report = cache.report()
    seen = [n + 19 for n in RAGGED]
    for index, layer in enumerate(report["layers"]):
        most = SLOTS if index % 2 else WINDOW
        assert layer["held"] == [min(n, most) for n in seen]
        shape = spec.layers[index]
        assert layer["keys"] == sum(layer["held"]) * shape.kv_heads * shape.key_dim * 4
        assert layer["values"] == sum(layer["held"]) * shape.kv_heads * shape.value_dim * 4
    # Both kinds of layers are in the totals, here and in the full cache that they are compared with.
    kinds = [sum(sum(layer[kind] for kind in ("keys", "values")) for layer in report["layers"][i::2]) for i in (0, 1)]
    assert all(kinds)
    assert sum(kinds) == report["kv_bytes"] == plan(policy, spec, RAGGED, 19).total
    token = [spec.token_bytes(i) for i in range(4)]
    full = sum(token[0::2]) * sum(min(n, WINDOW) for n in seen) + sum(token[1::2]) * sum(seen)
    assert report["kv_bytes_full"] == full


@pytest.mark.parametrize("slots", [Slots(tokens=64), Slots(tokens=8), Slots(share=9000)], ids=str)
def test_a_native_window_takes_no_budget(slots: Slots) -> None:
    made = model("gemma3_text")
    budgeted = LayerPolicy(slots=slots, sink_tokens=2, recent_tokens=2, evictor=evictors["snapkv"]())
    for policy in (budgeted, LayerPolicy(slots=FULL)):
        layers = tuple(policy if i == 2 else LayerPolicy(slots=FULL) for i in range(4))
        if policy is budgeted:
            said = r"layers\.2\.slots: the model limits this layer to a window of 12 tokens by itself; write full"
            with pytest.raises(PolicyError, match=said), kvplan.attach(made, Policy(layers=layers)):
                pass
        else:
            assert plan(Policy(layers=layers), spec_of(made), [500], 500).slots[::2] == (WINDOW, WINDOW)


def test_layers_of_different_shape_are_read_one_by_one() -> None:
    layers = spec_of(model("gemma4_text")).layers
    assert layers == (LayerSpec(2, 8, 8, WINDOW), LayerSpec(2, 16, 16)) * 2


# ------------------------------------------------------------------------------- soft caps and sink logits


@pytest.mark.parametrize("name", evictors.names())
@pytest.mark.parametrize("family", CAPPED)
def test_a_capped_models_ragged_row_equals_its_own_run(family: str, name: str) -> None:
    made, inputs = model(family, torch.float64), prompts(RAGGED)
    with kvplan.attach(made, policy_of(made, name, Slots(tokens=14))) as runtime:
        together = greedy(made, inputs, runtime.new_cache(), 8)
        for row, n in enumerate(RAGGED):
            own = {k: v[row : row + 1, -n:] for k, v in inputs.items()}
            alone = greedy(made, own, runtime.new_cache(), 8)
            assert torch.equal(together.sequences[row, -8:], alone.sequences[0, -8:])
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", [*CAPPED, "gemma3_text", "llama"])
def test_eviction_equals_the_models_own_attention_under_a_mask(family: str) -> None:
    """Streaming keeps the first tokens and the last ones: a mask says the same to transformers' own code."""
    changes = {"attn_logit_softcapping": 2.0} if family == "gemma2" else {}
    made, prompt, new = model(family, torch.float64, **changes), 30, 12
    policy = policy_of(made, "streaming", Slots(tokens=14))
    with kvplan.attach(made, policy) as runtime:
        found = greedy(made, prompts((prompt,)), runtime.new_cache(), new)
    ids, T = found.sequences[:, :-1], prompt + new - 1
    query, key = torch.arange(T)[:, None], torch.arange(T)
    causal = key <= query
    # 14 slots of which 2 hold sinks; the prompt's own queries saw the whole prompt.
    kept = causal & ((query < prompt) | (key < 2) | (query - key < 14 - 2))
    windowed = causal & (query - key < WINDOW)
    masks = {"full_attention": kept, "sliding_attention": windowed}
    bias = {k: torch.zeros(T, T, dtype=torch.float64).masked_fill(~v, -1e30)[None, None] for k, v in masks.items()}
    with torch.no_grad():
        own = made(ids, attention_mask=bias if family != "llama" else bias["full_attention"], use_cache=False).logits
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, own[:, prompt - 1 + step].float(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- refusals

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v2": ({"kv_lora_rank": 16}, r" caches a compressed latent \(MLA\).*\(kv_lora_rank is 16\)"),
    "deepseek_v3": ({"kv_lora_rank": 16}, r" caches a compressed latent \(MLA\).*\(kv_lora_rank is 16\)"),
    "qwen3_next": ({}, r": layers of type linear_attention are not supported \(layers 0-2\)"),
    "jamba": ({}, ": layers of type .* are not supported"),
    "mamba": ({}, ": layers of type .* are not supported|: the config does not describe a decoder with attention"),
    "recurrent_gemma": ({}, ": layers of type .* are not supported"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, r": layers of type conv .* \(layers 0,2\)"),
    "llama4_text": ({}, r": layers of type chunked_attention are not supported \(layers 0-2\)"),
    "gemma3n_text": ({**HYBRID, "num_kv_shared_layers": 2}, " shares keys and values by itself: its last 2 layers"),
    "gemma4_text": ({**HYBRID, "num_kv_shared_layers": 2}, " shares keys and values by itself: its last 2 layers"),
    "mpt": (NO_GROUPS, " adds position biases to its attention"),
    "t5": (NO_GROUPS, " is an encoder-decoder"),
    "bart": (NO_GROUPS, " is an encoder-decoder"),
}
CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (NO_GROUPS, " does not use transformers' attention interface"),
    "codegen": ({**NO_GROUPS, "rotary_dim": 8}, " does not use transformers' attention interface"),
    "falcon": (NO_GROUPS, " does not use transformers' attention interface"),
    "gptj": ({**NO_GROUPS, "rotary_dim": 8}, " does not use transformers' attention interface"),
    "diffllama": ({}, ": layer 0 attends over other values than it caches"),
    "jetmoe": ({"kv_channels": 8, "head_dim": None, **MOE}, ": layer 0 attends over other keys than it caches"),
    "bert": (NO_GROUPS, ": layer 0 also attends to later tokens"),
    "mimo_v2_flash": (
        {**HYBRID, **MOE, "n_routed_experts": 4, "v_head_dim": 4},
        r": layer 0 caches keys and values of shape \(4, 2, 8\) and \(4, 2, 4\) .* tells \(2, 2, 8\) and \(2, 2, 4\)",
    ),
}


def config(family: str, changes: dict[str, Any]) -> Any:
    fields = {k: v for k, v in {**BASE, **changes}.items() if v is not None or k == "eos_token_id"}
    return tf.CONFIG_MAPPING[family](**fields)


def assert_clear(error: ModelError, family: str) -> None:
    """One line: where, what was found, what is allowed, what to do."""
    assert str(error).startswith(family)
    assert str(error).endswith(f"; {ADVICE}")
    assert "\n" not in str(error)


@pytest.mark.parametrize("family", KINDS)
def test_a_kind_of_model_is_refused_from_its_config(family: str) -> None:
    changes, said = KINDS[family]
    with pytest.raises(ModelError, match=f"^{family}{said}") as caught:
        ModelSpec.from_config(config(family, changes), "float32")
    assert_clear(caught.value, family)


@pytest.mark.parametrize("family", CLASSES)
def test_a_model_is_refused_when_attaching(family: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, said = CLASSES[family]
    made = tf.AutoModelForCausalLM.from_config(config(family, changes)).eval()
    before, policy = made.config._attn_implementation, kvplan.full_policy(made)
    caplog.clear()
    with pytest.raises(ModelError, match=f"^{family}{said}") as caught:
        with kvplan.attach(made, policy):
            pytest.fail("attached")
    assert_clear(caught.value, family)
    assert not caplog.records
    assert made.config._attn_implementation == before
    with torch.no_grad():
        assert made(**prompts((6,))).logits.isfinite().all()


def test_position_biases_in_the_attention_call_are_refused() -> None:
    made = model("llama")
    attention = made.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, position_bias=torch.zeros(1, 4, 2, 2), **kwargs)
    with pytest.raises(ModelError, match="llama: layer 1 adds a position bias"):
        with kvplan.attach(made, kvplan.full_policy(made)):
            pass


def test_a_layer_that_attends_over_anothers_keys_is_refused() -> None:
    made = model("llama")
    made.model.layers[3].self_attn.layer_idx = 2
    with pytest.raises(ModelError, match=r"llama: layer 2 caches its keys out of turn \(layer 3 is next\)"):
        with kvplan.attach(made, kvplan.full_policy(made)):
            pass


def test_a_window_that_the_config_does_not_tell_is_refused() -> None:
    made = model("mistral")
    policy = kvplan.full_policy(made)
    spec = ModelSpec(tuple(LayerSpec(2, 8, 8) for _ in range(4)), 4, "float32", model_type="mistral")
    with pytest.raises(ModelError, match="mistral: layer 0 attends over a window of 12, the config tells None"):
        with kvplan.attach(made, Policy(layers=policy.layers), spec):
            pass


def test_a_model_that_fails_is_refused_with_its_error() -> None:
    made = model("mixtral")
    made.config.num_experts_per_tok = made.model.layers[0].mlp.gate.top_k = 9
    with pytest.raises(ModelError, match=r"mixtral: fails on its first tokens \(RuntimeError: "):
        with kvplan.attach(made, kvplan.full_policy(made)):
            pass


def test_the_trial_runs_once_and_leaves_nothing_behind() -> None:
    made, calls = model("llama"), []
    made.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        with kvplan.attach(made, kvplan.full_policy(made)):
            pass
    assert len(calls) == 1
    assert made.config._attn_implementation == "sdpa"


def test_each_part_of_a_model_gets_its_own_attention_back() -> None:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    text = config("gemma3_text", {**HYBRID, "query_pre_attn_scalar": 8})
    whole = tf.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    made = tf.Gemma3ForConditionalGeneration._from_config(
        whole, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    ).eval()
    inputs = prompts((20, 9))
    expected = greedy(made, inputs, new_tokens=4)
    with kvplan.attach(made, kvplan.full_policy(made)) as runtime:
        assert made.config.text_config._attn_implementation == "kvplan"
        found = greedy(made, inputs, runtime.new_cache(), 4)
    parts = [made.config.text_config, made.config.vision_config]
    assert [part._attn_implementation for part in parts] == ["eager", "sdpa"]
    assert torch.equal(found.sequences, expected.sequences)
