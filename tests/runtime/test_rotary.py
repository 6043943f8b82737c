"""How layers rotate their queries is found out by what they do, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, model, prompts
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvplan.errors import ModelError
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.probe import switched
from kvplan.runtime.attach import attach, spec_of
from kvplan.runtime.rotary import Rotaries, find_rotaries

UNROTATED = ("opt", "biogpt", "gpt2", "gpt_bigcode")
SOME_UNROTATED = ("cohere2", "exaone4", "smollm3")


def first_layer_queries(made: Any, positions: list[int]) -> torch.Tensor:
    """[Hq, T, D] of one token many times over, at the given positions."""
    seen = []

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q[0])
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("queries_alone", attention)
    AttentionMaskInterface.register("queries_alone", sdpa_mask)
    with switched(made, "queries_alone"), torch.no_grad():
        made(torch.full((1, len(positions)), 17), position_ids=torch.tensor([positions]), use_cache=False)
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_move_between_positions_as_the_model_moves_them(family: str) -> None:
    made = model(family)
    found = find_rotaries(made, spec_of(made))
    assert not found.unknown
    if family in UNROTATED:
        assert set(found.layers) == {None}
        return
    assert None not in found.layers or family in SOME_UNROTATED
    positions = [0, 1, 7, 30, 200]
    queries = first_layer_queries(made, positions)[None].double()
    rotation = found.rotation(0)
    assert rotation is not None
    moved = rotation.moved(queries[:, :, :1].expand_as(queries), torch.tensor([positions]))
    torch.testing.assert_close(moved, queries, rtol=1e-3, atol=1e-4)


def test_layers_without_rotation_are_told_from_those_with_it() -> None:
    made = model("cohere2")  # only its window layers rotate
    spec = spec_of(made)
    found = find_rotaries(made, spec)
    assert [rotary is not None for rotary in found.layers] == [layer.window is not None for layer in spec.layers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_does_not_matter(dtype: torch.dtype) -> None:
    made = model("qwen3", dtype)
    found = find_rotaries(made, spec_of(made))
    assert not found.unknown and None not in found.layers


def test_frequencies_are_those_of_the_prompt_at_hand() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    made = model("llama", max_position_embeddings=64, rope_parameters=scaled)
    found = find_rotaries(made, spec_of(made))
    before = found.rotation(0).frequencies.clone()
    first_layer_queries(made, list(range(200)))
    assert not torch.equal(found.rotation(0).frequencies, before)


def test_an_evictor_that_must_know_refuses_what_could_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("llama")
    monkeypatch.setattr(
        made, "_kvplan_rotary", (spec_of(made), Rotaries((None,) * 4, frozenset({1, 2}))), raising=False
    )
    policy = Policy(layers=(LayerPolicy(slots=Slots(tokens=24), evictor=evictors["expected"]()),) * 4)
    with pytest.raises(
        ModelError, match="layers 1-2: how llama rotates its queries is not known, and evictor expected"
    ):
        attach(made, policy).__enter__()
    other = Policy(layers=(LayerPolicy(slots=Slots(tokens=24), evictor=evictors["keydiff"]()),) * 4)
    with attach(made, other) as runtime:
        made(**prompts((30,)), past_key_values=runtime.new_cache())
