"""A layer that shares another's cache: the same as one whole forward pass with the map, at every token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from families import model, prompts
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvplan
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Slots

MAPS = ({1: 0}, {3: 1}, {2: 0, 3: 0}, {1: 0, 3: 2})


def oracle_logits(made, ids: torch.Tensor, shared: dict[int, int]) -> torch.Tensor:
    """One forward without any cache, in which shared layers attend over their source's keys and values."""
    kept = {}

    def attention(module, query, key, value, mask, **kwargs):
        index = module.layer_idx
        kept[index] = (key, value)
        key, value = kept[shared.get(index, index)]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("sharing_oracle", attention)
    AttentionMaskInterface.register("sharing_oracle", sdpa_mask)
    before = made.config._attn_implementation
    made.set_attn_implementation("sharing_oracle")
    try:
        with torch.no_grad():
            return made(ids, use_cache=False).logits
    finally:
        made.set_attn_implementation(before)


def policy_of(shared: dict[int, int], own: LayerPolicy) -> Policy:
    return Policy(layers=tuple(LayerPolicy(shares=shared[i]) if i in shared else own for i in range(4)))


@pytest.mark.parametrize("shared", MAPS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt_neox", "phi3"])
def test_decoding_equals_a_whole_forward_with_the_map(family: str, shared: dict[int, int]) -> None:
    made = model(family, torch.float64)
    ids = prompts((24,))["input_ids"]
    expected = oracle_logits(made, ids, shared)
    for own in (LayerPolicy(slots=FULL), LayerPolicy(slots=Slots(tokens=40), evictor=evictors["h2o"]())):
        with kvplan.attach(made, policy_of(shared, own)) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            parts = [made(ids[:, :15], past_key_values=cache).logits]
            for start, stop in ((15, 16), (16, 17), (17, 22), (22, 24)):
                at = torch.arange(start, stop)[None]
                parts.append(made(ids[:, start:stop], position_ids=at, past_key_values=cache).logits)
            # logits come back in float32
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-6, atol=1e-7)
            assert all(sum(cache.layers[i].bytes_by_kind().values()) == 0 for i in shared)


def test_the_map_matters_and_the_projections_come_back() -> None:
    made = model("llama", torch.float64)
    ids = prompts((24,))["input_ids"]
    with torch.no_grad():
        plain = made(ids).logits
    assert (oracle_logits(made, ids, {1: 0}) - plain).abs().max() > 1e-3
    with kvplan.attach(made, policy_of({1: 0}, LayerPolicy(slots=FULL))):
        assert not isinstance(made.model.layers[1].self_attn.k_proj, torch.nn.Linear)
    assert isinstance(made.model.layers[1].self_attn.k_proj, torch.nn.Linear)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, plain)


@pytest.mark.parametrize("name", evictors.names())
def test_steps_equal_blocks_when_a_shared_layer_reads_an_evicting_one(name: str) -> None:
    made = model("llama", torch.float64)
    ids = prompts((40,))["input_ids"]
    own = LayerPolicy(slots=Slots(tokens=14), sink_tokens=2, recent_tokens=4, evictor=evictors[name]())
    outputs = []
    for cuts in (list(range(25, 41)), [25, 31, 40]):
        with kvplan.attach(made, policy_of({1: 0, 3: 2}, own)) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            parts = [made(ids[:, :25], past_key_values=cache).logits]
            for start, stop in pairwise(cuts):
                at = torch.arange(start, stop)[None]
                parts.append(made(ids[:, start:stop], position_ids=at, past_key_values=cache).logits)
            outputs.append(torch.cat(parts, 1))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-7)
