"""What the runtime cannot do correctly it refuses, in one clear line."""

from __future__ import annotations

import pytest
import torch
from families import model, prompts

import kvplan
from kvplan.errors import PolicyError, RuntimeLimitError
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import LayerPolicy, Policy, Slots

POLICY = Policy(layers=(LayerPolicy(slots=Slots(tokens=24), evictor=evictors["snapkv"]()),) * 4)


@pytest.fixture(scope="module")
def llama():
    return model("llama")


def test_a_four_dimensional_mask(llama) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    with kvplan.attach(llama, POLICY) as runtime, pytest.raises(RuntimeLimitError, match="4-D attention mask"):
        llama(prompts((8,))["input_ids"], attention_mask=mask, past_key_values=runtime.new_cache())


def test_padding_on_the_right(llama) -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    with kvplan.attach(llama, POLICY) as runtime, pytest.raises(RuntimeLimitError, match="left padding"):
        llama(prompts((4,))["input_ids"], attention_mask=mask, past_key_values=runtime.new_cache())


def test_padding_in_a_later_turn(llama) -> None:
    inputs = prompts((6, 4))
    with kvplan.attach(llama, POLICY) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        llama(**inputs, past_key_values=cache)
        later = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1], [0, 1]])], 1)
        with pytest.raises(RuntimeLimitError, match="later turn has padding"):
            llama(torch.full((2, 2), 5), attention_mask=later, past_key_values=cache)


def test_a_cache_outside_its_with_block(llama) -> None:
    with kvplan.attach(llama, POLICY) as runtime:
        cache = runtime.new_cache()
    with pytest.raises(RuntimeLimitError, match="no longer attached"):
        llama(**prompts((6,)), past_key_values=cache)


def test_two_policies_on_one_model(llama) -> None:
    with kvplan.attach(llama, POLICY), pytest.raises(RuntimeLimitError, match="already attached"):
        with kvplan.attach(llama, POLICY):
            pass


def test_a_policy_that_breaks_its_own_rules(llama) -> None:
    tight = LayerPolicy(slots=Slots(tokens=4))
    with pytest.raises(PolicyError, match="4"), kvplan.attach(llama, Policy(layers=(tight,) * 4)):
        pass


def test_assisted_decoding(llama) -> None:
    with kvplan.attach(llama, POLICY) as runtime, pytest.raises((RuntimeLimitError, ValueError)):
        llama.generate(
            **prompts((6,)), past_key_values=runtime.new_cache(), max_new_tokens=4, prompt_lookup_num_tokens=2
        )


def test_forwards_without_our_cache_are_transformers_own(llama) -> None:
    inputs = prompts((6,))
    with torch.no_grad():
        expected = llama(**inputs).logits
        with kvplan.attach(llama, POLICY) as runtime:
            assert torch.equal(llama(**inputs).logits, expected)
            # A forward that broke off leaves nothing behind.
            with pytest.raises(RuntimeLimitError):
                llama(inputs["input_ids"], attention_mask=torch.zeros(1, 1, 6, 6), past_key_values=runtime.new_cache())
            assert torch.equal(llama(**inputs).logits, expected)
            mine = llama(**inputs, past_key_values=runtime.new_cache()).logits
            torch.testing.assert_close(mine, expected)


def test_two_caches_take_turns(llama) -> None:
    inputs = prompts((30,))
    with kvplan.attach(llama, POLICY) as runtime, torch.no_grad():
        first, second = runtime.new_cache(), runtime.new_cache()
        a = llama(**inputs, past_key_values=first).logits
        b = llama(**inputs, past_key_values=second).logits
        step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[30]])}
        c = llama(**step, past_key_values=first).logits
        d = llama(**step, past_key_values=second).logits
    assert torch.equal(a, b)
    assert torch.equal(c, d)


def test_chunks_are_refused_where_a_second_turn_would_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("llama")
    monkeypatch.setattr("kvplan.runtime.attach.transformers.__version__", "5.17.0")
    policy = Policy(layers=(LayerPolicy(),) * 4, prefill_chunk_tokens=8)
    with pytest.raises(RuntimeLimitError, match=r"need transformers 5\.23\.0 or newer, this is 5\.17\.0"):
        with kvplan.attach(made, policy):
            pass
    assert made.config._attn_implementation == "sdpa"
