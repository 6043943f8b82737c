"""A policy that keeps everything is a no-op; a ragged row is its own run; storage is the plan."""

from __future__ import annotations

import pytest
import torch
from families import CORE, FAMILIES, model, prompts

import kvplan
from kvplan.methods.evictors import evictors
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import spec_of

RAGGED = (40, 23, 31, 9)


def greedy(made, inputs, cache=None, new_tokens=16, **kwargs):
    return made.generate(
        **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip


def policy_of(made, name: str, slots: Slots, **kwargs) -> Policy:
    """That evictor on every full-attention layer; native windows stay as they are."""
    spec = spec_of(made)
    layer = LayerPolicy(slots=slots, sink_tokens=2, recent_tokens=4, min_slots=8, evictor=evictors[name](), **kwargs)
    native = LayerPolicy(slots=FULL)
    return Policy(layers=tuple(layer if s.window is None else native for s in spec.layers))


# Eager attention in float64 makes nan of padding where it has a soft cap.
FLOAT32 = ("gemma2",)


@pytest.mark.parametrize("lengths", [(40,), RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_slots_give_the_models_own_tokens_and_logits(family: str, lengths: tuple[int, ...]) -> None:
    made = model(family, torch.float32 if family in FLOAT32 else torch.float64)
    inputs, new_tokens = prompts(lengths), 16 if family in CORE else 8
    expected = greedy(made, inputs, new_tokens=new_tokens)
    evicting = ("snapkv", "h2o") if family in CORE else ("h2o",)
    for policy in (kvplan.full_policy(made), *(policy_of(made, n, Slots(tokens=64)) for n in evicting)):
        with kvplan.attach(made, policy) as runtime:
            found = greedy(made, inputs, runtime.new_cache(), new_tokens)
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            # transformers returns float32 logits: in float64 nothing but the rounding may be left.
            rtol, atol = (1e-5, 1e-5) if family in FLOAT32 else (2e-7, 0)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in CORE for n in evictors.names()] + [(f, "tova") for f in FAMILIES if f not in CORE],
)
def test_a_ragged_row_equals_its_own_run_with_eviction(family: str, name: str) -> None:
    made, inputs = model(family, torch.float64), prompts(RAGGED)
    new_tokens = 12 if family in CORE else 6
    for slots in (Slots(tokens=14), Slots(share=4000))[: 2 if family in CORE else 1]:
        with kvplan.attach(made, policy_of(made, name, slots)) as runtime:
            together = greedy(made, inputs, runtime.new_cache(), new_tokens)
            for row, n in enumerate(RAGGED):
                own = {k: v[row : row + 1, -n:] for k, v in inputs.items()}
                alone = greedy(made, own, runtime.new_cache(), new_tokens)
                assert torch.equal(together.sequences[row, -new_tokens:], alone.sequences[0, -new_tokens:])
                for a, b in zip(together.logits, alone.logits, strict=True):
                    torch.testing.assert_close(a[row], b[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", evictors.names())
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "opt"])
def test_storage_is_the_plan_at_every_step(family: str, name: str) -> None:
    made, inputs = model(family), prompts(RAGGED)
    policy, spec = policy_of(made, name, Slots(share=5000)), spec_of(made)
    with kvplan.attach(made, policy) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        positions = inputs["attention_mask"].cumsum(-1) - 1
        made(**inputs, position_ids=positions.clamp(min=0), past_key_values=cache)
        for step in range(70):
            planned = plan(policy, spec, list(RAGGED), step)
            report = cache.report()
            assert cache.kv_bytes == planned.total == report["kv_bytes_planned"]
            assert cache.full_kv_bytes == planned.full
            assert cache.peak_kv_bytes >= cache.kv_bytes
            made(input_ids=torch.full((4, 1), 5), position_ids=positions[:, -1:] + 1 + step, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt", "phi3"])
def test_beams_equal_the_models_own(family: str) -> None:
    made, inputs = model(family), prompts((30, 17))
    expected = greedy(made, inputs, num_beams=3)
    with kvplan.attach(made, kvplan.full_policy(made)) as runtime:
        assert torch.equal(greedy(made, inputs, runtime.new_cache(), num_beams=3).sequences, expected.sequences)
    with kvplan.attach(made, policy_of(made, "h2o", Slots(tokens=12))) as runtime:
        evicting = greedy(made, inputs, runtime.new_cache(), num_beams=3)
        assert evicting.sequences.shape == expected.sequences.shape


def test_sampling_and_several_sequences_work() -> None:
    made, inputs = model("llama"), prompts((30, 17))
    with kvplan.attach(made, policy_of(made, "snapkv", Slots(share=5000))) as runtime:
        cache = runtime.new_cache()
        torch.manual_seed(0)
        out = made.generate(
            **inputs, past_key_values=cache, max_new_tokens=8, do_sample=True, num_return_sequences=2, pad_token_id=0
        )
    assert out.shape == (4, 38)
    assert cache.kv_bytes == cache.plan.total
