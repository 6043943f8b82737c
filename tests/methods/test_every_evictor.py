"""What holds for every registered evictor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvplan.methods.evictors import Evictor, PromptView, Signal, evictors
from kvplan.methods.params import Choice, IntRange, search_ranges, settings
from kvplan.methods.rotation import Rotation
from kvplan.policy.schema import LayerPolicy, Slots
from kvplan.runtime.kernels.choose import column_sums
from kvplan.runtime.kernels.dense import AttentionArgs
from kvplan.runtime.prompt import slot_order

B, HQ, HKV, T, D = 2, 4, 2, 40, 8
# Small enough to matter on a short prompt.
PARAMETERS = {"lagkv": {"lag_tokens": 5}, "scissorhands": {"history_tokens": 7}}
ROTATION = Rotation(torch.arange(3), torch.arange(3, 6), torch.tensor([1.0, 0.3, 0.01]))


def small(name: str) -> Evictor:
    return evictors[name](**PARAMETERS.get(name, {}))


def view(dtype: torch.dtype = torch.float32, pad: int = 0) -> PromptView:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, T, D, generator=generator).to(dtype) for h in (HQ, HKV, HKV))
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :pad] = False
    return PromptView(
        keys=k, values=v, valid=valid, scaling=D**-0.5, queries=q, sink_tokens=3, rotation=ROTATION,
        column_sums=column_sums(q, k, valid, AttentionArgs(D**-0.5)),
    )  # fmt: skip


@pytest.mark.parametrize("name", evictors.names())
class TestEveryEvictor:
    def test_scores_have_the_promised_shape_and_dtype(self, name: str) -> None:
        evictor = small(name)
        for dtype in (torch.float32, torch.bfloat16):
            scores = evictor.score(view(dtype))
            assert scores.shape == (B, 1 if evictor.one_set_for_all_heads else HKV, T)
            assert scores.dtype == torch.float32
            assert scores.isfinite().all()

    def test_scores_are_deterministic(self, name: str) -> None:
        assert torch.equal(small(name).score(view()), small(name).score(view()))

    def test_padding_does_not_change_what_real_tokens_score(self, name: str) -> None:
        padded, pad = view(pad=13), 13
        valid = torch.ones(1, T - pad, dtype=torch.bool)
        queries, keys = padded.queries[1:, :, pad:], padded.keys[1:, :, pad:]
        alone = dataclasses.replace(
            padded, keys=keys, values=padded.values[1:, :, pad:], valid=valid, queries=queries,
            column_sums=column_sums(queries, keys, valid, AttentionArgs(D**-0.5)),
        )  # fmt: skip
        evictor = small(name)
        mine, own = evictor.score(padded)[1, :, pad:], evictor.score(alone)[0]
        if name in ("streaming", "sliding"):  # positions: only their order matters
            mine, own = mine.argsort(-1), own.argsort(-1)
        torch.testing.assert_close(mine, own)

    def test_permuting_rows_permutes_scores(self, name: str) -> None:
        whole = view()
        swapped = dataclasses.replace(
            whole,
            **{f: getattr(whole, f).flip(0) for f in ("keys", "values", "valid", "queries", "column_sums")},
        )
        evictor = small(name)
        torch.testing.assert_close(evictor.score(swapped), evictor.score(whole).flip(0))

    @pytest.mark.parametrize("capacity", [8, 17, 39])
    def test_exactly_the_capacity_is_kept_and_protected_tokens_are_in_it(self, name: str, capacity: int) -> None:
        evictor = evictors[name]()
        policy = LayerPolicy(slots=Slots(tokens=capacity), sink_tokens=2, recent_tokens=5, evictor=evictor)
        hostile = torch.full((1 if evictor.one_set_for_all_heads else HKV, T), 1e9)
        hostile[:, :2] = hostile[:, -5:] = -1e9
        order = slot_order(hostile, policy, capacity)
        assert order.shape[-1] == capacity
        for head in order.tolist():
            assert len(set(head)) == capacity
            assert set(range(T - 5, T)) <= set(head)
            assert not evictor.keeps_sinks or {0, 1} <= set(head)

    def test_defaults_lie_in_their_search_ranges(self, name: str) -> None:
        evictor = evictors[name]()
        assert settings(evictor) == {}
        for field, allowed in search_ranges(type(evictor)).items():
            value = getattr(evictor, field)
            if isinstance(allowed, IntRange):
                assert allowed.low <= value <= allowed.high
            else:
                assert isinstance(allowed, Choice)
                assert value in allowed.values

    def test_side_bytes_are_declared(self, name: str) -> None:
        evictor = evictors[name]()
        expected = 0 if not evictor.keeps_scores else 8 * (1 if evictor.one_set_for_all_heads else HKV)
        assert evictor.side_bytes_per_slot(HKV) == expected
        assert isinstance(evictor.needs, Signal)
