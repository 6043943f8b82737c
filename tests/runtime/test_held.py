"""Which tokens a layer says it holds, against the keys that really lie in its slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvplan
from kvplan.errors import RuntimeLimitError
from kvplan.methods.codecs.kivi import KIVI
from kvplan.methods.evictors import evictors
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.cache import build_layer
from kvplan.runtime.held import cache_with_positions, held_positions
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.layers.base import PolicyLayer

HQ, HKV, D, PROMPT, NEW = 4, 2, 8, 40, 9
ARGS = AttentionArgs(scaling=D**-0.5)
SPEC = ModelSpec((LayerSpec(HKV, D, D),), query_heads=HQ, dtype="float32")


def filled(layer: LayerPolicy, *, with_positions: bool) -> tuple[PolicyLayer, Tensor]:
    """A layer after a prompt and a few tokens, and all keys that it was given, [Hkv, T, D]."""
    torch.manual_seed(0)
    q, keys, values = (torch.randn(1, h, PROMPT + NEW, D) for h in (HQ, HKV, HKV))
    built = build_layer(Policy(layers=(layer,)), SPEC, 0, with_positions=with_positions)
    valid = torch.ones(1, PROMPT, dtype=torch.bool)
    built.store_prompt(q[:, :, :PROMPT], keys[:, :, :PROMPT], values[:, :, :PROMPT], valid, ARGS)
    for t in range(PROMPT, PROMPT + NEW):
        now = slice(t, t + 1)
        built.append(q[:, :, now], keys[:, :, now], values[:, :, now], ARGS)
    return built, keys[0]


def looked_up(layer: PolicyLayer, keys: Tensor, head: int) -> list[int]:
    """Positions whose key lies in a slot of the head."""
    (pool,) = layer.storage
    row = pool.row(head).columns if layer.heads_as_rows else pool.row(0).columns
    stored = row["keys.x"][0, 0 if layer.heads_as_rows else head]
    return [t for t in range(keys.shape[1]) if bool((stored == keys[head, t]).all(-1).any())]


@pytest.mark.parametrize("name", [name for name in evictors.names() if name != "corm"])
@pytest.mark.parametrize("slots", [Slots(tokens=20), Slots(heads=(Slots(tokens=12), Slots(tokens=25)))], ids=str)
def test_the_positions_are_those_of_the_keys_that_are_stored(name: str, slots: Slots) -> None:
    layer = LayerPolicy(slots=slots, sink_tokens=2, recent_tokens=4, evictor=evictors[name]())
    plain, keys = filled(layer, with_positions=False)
    told = filled(layer, with_positions=True)[0].held_positions(0)
    assert [positions.tolist() for positions in told] == [looked_up(plain, keys, head) for head in range(HKV)]


def test_heads_that_share_out_their_slots_hold_different_tokens() -> None:
    layer = LayerPolicy(slots=Slots(tokens=20), recent_tokens=4, evictor=evictors["knorm"](), head_split=AdaKV())
    plain, keys = filled(layer, with_positions=False)
    told = [positions.tolist() for positions in filled(layer, with_positions=True)[0].held_positions(0)]
    assert told == [looked_up(plain, keys, head) for head in range(HKV)]
    assert told[0] != told[1]


def test_an_evictor_without_a_budget_tells_what_is_left() -> None:
    layer = LayerPolicy(slots=Slots(tokens=30), recent_tokens=4, evictor=evictors["corm"](window_tokens=8))
    built, _ = filled(layer, with_positions=True)
    told = built.held_positions(0)
    assert sum(len(positions) for positions in told) == sum(built.held_by_head(0))  # type: ignore[attr-defined]
    assert all(set(range(PROMPT + NEW - 4, PROMPT + NEW)) <= set(positions.tolist()) for positions in told)


@pytest.mark.parametrize("slots", [Slots(), Slots(tokens=28)], ids=str)
def test_encoded_units_and_the_recent_ring_add_up(slots: Slots) -> None:
    kivi = KIVI(bits=4, group=4, residual_tokens=8)
    layer = LayerPolicy(slots=slots, sink_tokens=0, recent_tokens=4, key_codec=kivi, value_codec=kivi)
    built, _ = filled(layer, with_positions=True)
    for positions in built.held_positions(0):
        assert len(positions) == built.held(0)
        assert len(set(positions.tolist())) == len(positions)
        assert positions[-8:].tolist() == list(range(PROMPT + NEW - 8, PROMPT + NEW))


def test_a_ring_without_positions_says_so() -> None:
    built, _ = filled(LayerPolicy(slots=Slots(tokens=20)), with_positions=False)
    with pytest.raises(RuntimeLimitError, match="stores no positions"):
        built.held_positions(0)


def test_a_cache_with_positions_evicts_as_the_policy_says(tiny_llama) -> None:  # type: ignore[no-untyped-def]
    layers = (LayerPolicy(), LayerPolicy(slots=Slots(tokens=24), evictor=evictors["snapkv"](window_tokens=8)))
    policy = Policy(layers=(*layers, LayerPolicy(shares=1), LayerPolicy(slots=Slots(tokens=24))))
    ids = torch.randint(3, 96, (1, 50), generator=torch.Generator().manual_seed(1))
    with kvplan.attach(tiny_llama, policy) as runtime, torch.no_grad():
        plain, told = runtime.new_cache(), cache_with_positions(runtime)
        outputs = [tiny_llama(ids, past_key_values=cache).logits for cache in (plain, told)]
        outputs += [tiny_llama(ids[:, :1], past_key_values=cache).logits for cache in (plain, told)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    held = [[p.tolist() for p in held_positions(told, i)] for i in range(4)]
    assert held[0] == [list(range(51))] * 2
    assert held[2] == held[1] and len(held[1][0]) == 24
    assert held[3] == [[0, 1, 2, 3, *range(31, 51)]] * 2
