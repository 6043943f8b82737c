"""The decode step of fixed shapes does what the step of growing shapes does."""

from __future__ import annotations

import pytest
import torch
from families import model, prompts

import kvplan
from kvplan.errors import RuntimeLimitError
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime import static

BUDGETED = [name for name in evictors.names() if evictors[name]().forgets_after is None]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is traced whole, as for compiling, but not compiled: code generation takes a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(static.torch, "compile", lambda f, **kwargs: compile_(f, backend="eager", **kwargs))
    torch._dynamo.reset()


def policy(name: str, slots: Slots = Slots(tokens=20)) -> Policy:
    layer = LayerPolicy(slots=slots, sink_tokens=2, recent_tokens=4, min_slots=8, evictor=evictors[name]())
    return Policy(layers=(layer, LayerPolicy(slots=FULL), layer, layer))


def both(made, made_policy: Policy, inputs, new: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    with kvplan.attach(made, made_policy) as runtime:
        plain = runtime.generate(**inputs, max_new_tokens=new)
        compiled = runtime.generate(**inputs, max_new_tokens=new, compiled=True)
    assert made.config._attn_implementation not in ("kvplan", static.IMPLEMENTATION)
    return plain, compiled


@pytest.mark.parametrize("name", BUDGETED)
def test_tokens_equal_those_of_plain_generate(name: str) -> None:
    plain, compiled = both(model("llama", torch.float64), policy(name), prompts((30, 30)))
    assert torch.equal(plain, compiled)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gpt_neox"])
def test_other_families(family: str) -> None:
    made = model(family, torch.float64)
    layers = LayerPolicy(slots=FULL) if family == "mistral" else policy("h2o").layers[0]
    plain, compiled = both(made, Policy(layers=(layers,) * 4), prompts((14, 14)))
    assert torch.equal(plain, compiled)


def test_a_ragged_batch_with_a_fixed_number_of_slots() -> None:
    layer = policy("streaming").layers[0]
    plain, compiled = both(model("llama", torch.float64), Policy(layers=(layer,) * 4), prompts((30, 22, 9)))
    assert torch.equal(plain, compiled)


def test_a_layer_that_shares_reads_the_fixed_slots() -> None:
    layer = policy("h2o").layers[0]
    shared = Policy(layers=(layer, LayerPolicy(shares=0), layer, LayerPolicy(shares=2)))
    plain, compiled = both(model("llama", torch.float64), shared, prompts((30, 30)))
    assert torch.equal(plain, compiled)


ENCODED = LayerPolicy(slots=Slots(tokens=24), key_codec=codecs["int8"](), value_codec=codecs["int8"]())


@pytest.mark.parametrize(("refused", "message"), [
    (policy("streaming", Slots(share=5000)), "layer 0: the rows of this batch hold 11 to 15 slots"),
    (Policy(layers=(ENCODED,) * 4), "layer 0: a compiled decode step needs plain slots"),
])  # fmt: skip
def test_what_has_no_fixed_shape_is_refused_before_the_prompt_is_read(
    refused: Policy, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model("llama")

    def unread(*args: object, **kwargs: object) -> None:
        raise AssertionError("the prompt was read")

    with kvplan.attach(made, refused) as runtime:
        monkeypatch.setattr(type(made), "forward", unread)
        with pytest.raises(RuntimeLimitError, match=message):
            runtime.generate(**prompts((30, 22)), max_new_tokens=4, compiled=True)


def test_bytes_stay_within_the_plan() -> None:
    made = model("llama")
    with kvplan.attach(made, policy("h2o")) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        made(**prompts((30, 30)), past_key_values=cache)
        fixed = static.StaticCache(cache, 24)
        assert 0 < fixed.kv_bytes <= kvplan.policy.memory.plan(runtime.policy, runtime.spec, [30, 30], 24).total
        assert cache.layers[0].pool is None  # held once
