"""Several tokens at once: who sees whom, told by filling slots one by one; and the last forward of a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvplan.errors import RuntimeLimitError
from kvplan.methods.evictors import evictors
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.runtime.attach import attach
from kvplan.runtime.extend import RowState, ring_slot, ring_visibility
from kvplan.runtime.replay import forward, positions_of, prefill


@st.composite
def states(draw: Any) -> RowState:
    sinks = draw(st.integers(0, 4))
    capacity = draw(st.none() | st.integers(sinks + 1, 20))
    held = draw(st.integers(1, 20 if capacity is None else capacity))
    return RowState(held, capacity, sinks, draw(st.integers(0, 50)) if held == capacity else 0)


def seen_one_by_one(state: RowState, num_old: int, num_new: int) -> list[list[bool]]:
    """[T][num_old + T]: after each new token, which columns lie in the row's slots."""
    occupants = {slot: slot for slot in range(state.held)}
    rows = []
    for step in range(num_new):
        occupants[ring_slot(state, step)] = num_old + step
        rows.append([column in occupants.values() for column in range(num_old + num_new)])
    return rows


@given(st.lists(states(), min_size=1, max_size=4), st.integers(1, 40))
def test_visibility_is_that_of_slots_filled_one_by_one(rows: list[RowState], num_new: int) -> None:
    num_old = max(row.held for row in rows)
    expected = torch.tensor([seen_one_by_one(row, num_old, num_new) for row in rows])
    assert torch.equal(ring_visibility(rows, num_old, num_new, torch.device("cpu"))[:, 0], expected)


@pytest.mark.parametrize("name", ["full", "streaming", "snapkv", "h2o", "tova"])
def test_a_last_forward_gives_the_same_and_stores_nothing(tiny_llama: Any, name: str) -> None:
    kept = {"slots": Slots(12), "evictor": evictors[name]()} if name != "full" else {}
    policy = Policy(layers=(LayerPolicy(sink_tokens=2, recent_tokens=4, **kept),) * 4)
    ids = torch.randint(4, 128, (3, 37), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(30) >= torch.tensor([0, 5, 11])[:, None]
    at = positions_of(valid)[:, -1:] + torch.arange(1, 8)
    with attach(tiny_llama, policy) as runtime, torch.no_grad():
        caches = runtime.new_cache(), runtime.new_cache()
        for cache in caches:
            prefill(runtime, cache, ids[:, :30], valid)
        stored, last = caches
        held = last.kv_bytes
        last.stop_storing()
        found = [forward(runtime, cache, ids[:, 30:], at, None) for cache in caches]
        assert torch.equal(*found)
        assert last.kv_bytes == held and last.appended == 0 and stored.appended == 7
        with pytest.raises(RuntimeLimitError, match="its last forward had come"):
            forward(runtime, last, ids[:, :1], at[:, -1:] + 1, None)
