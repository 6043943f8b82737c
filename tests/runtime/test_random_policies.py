"""Over random policies: storage is the plan at every step, rows are their own runs, detaching restores the model."""

from __future__ import annotations

import torch
from families import model, prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvplan
from kvplan.methods.evictors import evictors
from kvplan.policy.memory import plan
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots
from kvplan.runtime.attach import spec_of

MODEL = model("llama", torch.float64)
SPEC = spec_of(MODEL)

slots = st.one_of(
    st.just(FULL),
    st.integers(9, 60).map(lambda n: Slots(tokens=n)),
    st.integers(500, 10_000).map(lambda n: Slots(share=n)),
)
own = st.builds(
    LayerPolicy,
    slots=slots,
    sink_tokens=st.integers(0, 3),
    recent_tokens=st.integers(1, 5),
    min_slots=st.integers(9, 24),
    evictor=st.sampled_from(evictors.names()).map(lambda name: evictors[name]()),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    layers = [draw(own) for _ in range(SPEC.num_layers)]
    if draw(st.booleans()):
        reader = draw(st.integers(1, SPEC.num_layers - 1))
        layers[reader] = LayerPolicy(shares=draw(st.integers(0, reader - 1)))
    return Policy(layers=tuple(layers))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
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
                assert cache.kv_bytes == plan(policy, SPEC, own_lengths, step).total
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
