"""Over random policies: storage is the plan at every step, rows are their own runs, detaching restores the model."""

from __future__ import annotations

import os
from typing import Any

import torch
from families import model, prompts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kvplan
from kvplan.errors import MethodError
from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.policy.layout import layout
from kvplan.policy.memory import plan
from kvplan.policy.rules import layer_problems
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.registry import Registry
from kvplan.runtime.attach import spec_of

MODEL = model("llama", torch.float64)
SPEC = spec_of(MODEL)


def per_head(heads: tuple[Slots, ...]) -> Slots:
    return Slots(heads=heads)


shares = st.integers(500, 10_000).map(lambda n: Slots(share=n))
tokens = st.integers(24, 60).map(lambda n: Slots(tokens=n))
slots = st.one_of(
    st.just(FULL), tokens, shares, st.tuples(st.one_of(tokens, shares), st.one_of(tokens, shares)).map(per_head)
)
codec = st.sampled_from(
    [
        *(codecs[name]() for name in codecs.names() if name != "kivi"),
        # Groups that a few tokens fill.
        *(codecs["kivi"](bits=bits, group=4, residual_tokens=8) for bits in (2, 4)),
    ]
)


def sometimes(registry: Registry[Any], **settings: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *(registry[name](**settings.get(name, {})) for name in registry.names())])


def evictor(name: str) -> Any:
    return evictors[name](window_tokens=8) if name == "corm" else evictors[name]()


def can_run(layer: LayerPolicy) -> bool:
    """Whether the rules allow it and the codecs can store heads of this width."""
    try:
        layout(layer, SPEC.layers[0], torch.float64)
    except MethodError:
        return False
    return not list(layer_problems({0: layer}))


own = st.builds(
    LayerPolicy,
    slots=slots,
    sink_tokens=st.integers(0, 3),
    recent_tokens=st.integers(1, 5),
    min_slots=st.integers(20, 24),
    evictor=st.sampled_from(evictors.names()).map(evictor),
    head_split=sometimes(head_splits),
    merger=sometimes(mergers),
    channels=sometimes(channel_selectors, think={"recent": 8}),
    key_codec=codec,
    value_codec=codec,
).filter(can_run)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    layers = [draw(own) for _ in range(SPEC.num_layers)]
    if draw(st.booleans()):
        reader = draw(st.integers(1, SPEC.num_layers - 1))
        layers[reader] = LayerPolicy(shares=draw(st.integers(0, reader - 1)))
    return Policy(layers=tuple(layers))


# Shrinking a policy takes minutes and hides little of it.
@settings(
    max_examples=int(os.environ.get("KVPLAN_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(policy=policies(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_storage_is_the_plan_and_rows_are_their_own_runs(policy: Policy, lengths: list[int]) -> None:
    inputs = prompts(tuple(lengths))
    tokens = torch.randint(3, 96, (len(lengths), 8), generator=torch.Generator().manual_seed(0))

    def run(ids: torch.Tensor, mask: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        own_lengths = mask.sum(-1).tolist()
        with kvplan.attach(MODEL, policy) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            rows = [MODEL(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]]
            for step in range(new.shape[1]):
                planned = plan(policy, SPEC, own_lengths, step).total
                # An evictor without a fixed budget holds what it needs.
                elastic = any(layer.evictor.forgets_after for layer in policy.layers)
                assert cache.kv_bytes <= planned if elastic else cache.kv_bytes == planned
                assert sum(cache.row_bytes(row) for row in range(len(own_lengths))) == cache.kv_bytes
                at = positions[:, -1:] + 1 + step
                out = MODEL(new[:, step, None], position_ids=at, past_key_values=cache)
                rows.append(out.logits[:, -1])
            assert cache.report()["kv_bytes"] <= cache.peak_kv_bytes
        return torch.stack(rows, 1)

    together = run(inputs["input_ids"], inputs["attention_mask"], tokens)
    for row, n in enumerate(lengths):
        alone = run(inputs["input_ids"][row, None, -n:], inputs["attention_mask"][row, None, -n:], tokens[row, None])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-6, atol=1e-8)


def test_detaching_restores_the_model_bit_for_bit() -> None:
    inputs = prompts((12,))
    before_weights = {name: p.clone() for name, p in MODEL.state_dict().items()}
    before, implementation = MODEL(**inputs).logits, MODEL.config._attn_implementation
    policy = Policy(layers=(LayerPolicy(slots=Slots(tokens=24)),) * 3 + (LayerPolicy(shares=1),))
    with kvplan.attach(MODEL, policy) as runtime:
        MODEL.generate(**inputs, past_key_values=runtime.new_cache(), max_new_tokens=4, pad_token_id=0)
        # Forwards without a cache of ours are transformers' own, also while attached.
        assert MODEL.config._attn_implementation == "kvplan"
    assert MODEL.config._attn_implementation == implementation
    assert torch.equal(MODEL(**inputs).logits, before)
    assert all(torch.equal(p, before_weights[name]) for name, p in MODEL.state_dict().items())
