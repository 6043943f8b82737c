"""What holds for every registered merger."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from kvplan.methods.mergers import Merged, mergers
from kvplan.methods.params import Choice, search_ranges, settings

HKV, D = 2, 8
PROMPT_MERGERS = [name for name in mergers if mergers[name].merges_prompt]
STEP_MERGERS = [name for name in mergers if mergers[name].merges_steps]


def prompt(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that wander slowly, so that neighbours are alike; scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(HKV, tokens, D, generator=generator) * torch.rand(HKV, tokens, 1, generator=generator)
    values = torch.randn(HKV, tokens, D, generator=generator)
    scores = (torch.rand(HKV, tokens, generator=generator) * 16).round() / 16
    return steps.cumsum(1).to(dtype), values.to(dtype), scores


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Tokens, slots, sinks, recent tokens, seed."""
    tokens = draw(st.integers(2, 60))
    slots = draw(st.integers(1, tokens - 1))
    sinks = draw(st.integers(0, min(slots, 6)))
    return tokens, slots, sinks, draw(st.integers(0, slots - sinks)), draw(st.integers(0, 99))


def same(one: Merged, other: Merged) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Merged))


@pytest.mark.parametrize("name", mergers.names())
class TestEveryMerger:
    def test_it_merges_at_some_moment(self, name: str) -> None:
        assert mergers[name].merges_prompt or mergers[name].merges_steps

    def test_parameters_survive_settings(self, name: str) -> None:
        merger = mergers[name]()
        assert settings(merger) == {}
        for field, allowed in search_ranges(type(merger)).items():
            assert isinstance(allowed, Choice)
            assert getattr(merger, field) in allowed.values
        for other in every_setting(name):
            assert type(other)(**settings(other)) == other
            assert other.name == name

    def test_parameters_are_frozen(self, name: str) -> None:
        merger = mergers[name]()
        with pytest.raises(dataclasses.FrozenInstanceError):
            merger.name = "other"  # type: ignore[misc]

    def test_a_moment_that_it_does_not_use_says_so(self, name: str) -> None:
        merger, nothing = mergers[name](), torch.empty(0)
        if not merger.merges_prompt:
            with pytest.raises(NotImplementedError, match="does not merge prompts"):
                merger.merge_prompt(nothing, nothing, nothing, 0, 0, 0)
        if not merger.merges_steps:
            with pytest.raises(NotImplementedError, match="does not merge while decoding"):
                merger.merge_step(nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("name", PROMPT_MERGERS)
class TestEveryPromptMerger:
    @given(problem=problems())
    @examples(max_examples=60, deadline=None)
    def test_exactly_the_slots_come_out(self, name: str, problem: tuple[int, int, int, int, int]) -> None:
        tokens, slots, sinks, recent, seed = problem
        keys, values, scores = prompt(tokens, seed)
        for merger in every_setting(name):
            merged = merger.merge_prompt(keys, values, scores, slots, sinks, recent)
            assert merged.keys.shape == merged.values.shape == (HKV, slots, D)
            for tensor, dtype in (
                (merged.positions, torch.int64), (merged.scores, torch.float32), (merged.counts, torch.int32),
            ):  # fmt: skip
                assert tensor.shape == (HKV, slots)
                assert tensor.dtype == dtype
            assert merged.keys.isfinite().all()
            assert merged.values.isfinite().all()
            assert (merged.positions.diff(dim=-1) > 0).all()
            assert (merged.counts >= 1).all()
            assert (merged.counts.sum(-1) <= tokens).all()

    @given(problem=problems())
    @examples(max_examples=30, deadline=None)
    def test_protected_tokens_stay_as_they_are(self, name: str, problem: tuple[int, int, int, int, int]) -> None:
        tokens, slots, sinks, recent, seed = problem
        keys, values, scores = prompt(tokens, seed)
        scores[:, :sinks] = scores[:, tokens - recent :] = -1e9
        merged = mergers[name]().merge_prompt(keys, values, scores, slots, sinks, recent)
        for mine, all_of_them in ((merged.keys, keys), (merged.values, values)):
            assert torch.equal(mine[:, :sinks], all_of_them[:, :sinks])
            assert torch.equal(mine[:, slots - recent :], all_of_them[:, tokens - recent :])
        protected = [*range(sinks), *range(slots - recent, slots)]
        assert (merged.counts[:, protected] == 1).all()
        at = torch.tensor([*range(sinks), *range(tokens - recent, tokens)], dtype=torch.int64)
        assert torch.equal(merged.positions[:, protected], at.expand(HKV, -1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_dtype_stays_and_the_inputs_do(self, name: str, dtype: torch.dtype) -> None:
        inputs = prompt(40, 1, dtype)
        merged = mergers[name]().merge_prompt(*inputs, 20, 2, 5)
        assert merged.keys.dtype == merged.values.dtype == dtype
        assert all(torch.equal(mine, fresh) for mine, fresh in zip(inputs, prompt(40, 1, dtype), strict=True))
        assert same(merged, mergers[name]().merge_prompt(*inputs, 20, 2, 5))

    def test_permuting_heads_permutes_slots(self, name: str) -> None:
        keys, values, scores = prompt(50, 2)
        merged = mergers[name]().merge_prompt(keys, values, scores, 20, 2, 5)
        swapped = mergers[name]().merge_prompt(keys.flip(0), values.flip(0), scores.flip(0), 20, 2, 5)
        assert same(merged, Merged(**{f.name: getattr(swapped, f.name).flip(0) for f in dataclasses.fields(Merged)}))

    def test_keys_and_values_may_differ_in_width(self, name: str) -> None:
        keys, values, scores = prompt(30, 3)
        merged = mergers[name]().merge_prompt(keys, values[..., :4], scores, 12, 2, 4)
        assert merged.values.shape == (HKV, 12, 4)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Full rows of a ring: the victim, and all slots after it up to where the ring closes."""
    rows, slots, followers = draw(st.integers(1, 3)), draw(st.integers(2, 40)), draw(st.integers(0, 39))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(rows, HKV, slots, D, generator=generator)
    probs = (torch.randn(rows, HKV, slots, generator=generator) * draw(st.sampled_from([0.1, 1.0, 9.0]))).softmax(-1)
    order = torch.stack([torch.randperm(slots, generator=generator) for _ in range(rows)])
    return values, probs, order[:, 0], order[:, 1 : 1 + min(followers, slots - 1)]


@pytest.mark.parametrize("name", STEP_MERGERS)
class TestEveryStepMerger:
    @given(step=steps())
    @examples(max_examples=60, deadline=None)
    def test_only_followers_change(self, name: str, step: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        values, probs, victim, followers = step
        before = values.clone()
        for merger in every_setting(name):
            after = merger.merge_step(values, probs, victim, followers)
            assert after.shape == values.shape
            assert after.isfinite().all()
            assert torch.equal(values, before)
            for row in range(len(values)):
                others = sorted(set(range(values.shape[2])) - set(followers[row].tolist()))
                assert torch.equal(after[row, :, others], values[row, :, others])

    @given(step=steps())
    @examples(max_examples=30, deadline=None)
    def test_rows_and_heads_are_independent(self, name: str, step: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        values, probs, victim, followers = step
        merger = mergers[name]()
        whole = merger.merge_step(values, probs, victim, followers)
        assert torch.equal(whole, merger.merge_step(values, probs, victim, followers))
        rows = merger.merge_step(*(x.flip(0) for x in step))
        assert torch.equal(rows.flip(0), whole)
        heads = merger.merge_step(values.flip(1), probs.flip(1), victim, followers)
        assert torch.equal(heads.flip(1), whole)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_dtype_stays(self, name: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, HKV, 12, D, generator=generator).to(dtype)
        probs = torch.full((1, HKV, 12), 1 / 12)
        after = mergers[name]().merge_step(values, probs, torch.tensor([2]), torch.arange(3, 12)[None])
        assert after.dtype == dtype
        assert not torch.equal(after, values)


def every_setting(name: str) -> list:
    """The default, and each choice of each tunable parameter."""
    cls = mergers[name]
    found = [cls()]
    for field, allowed in search_ranges(cls).items():
        assert isinstance(allowed, Choice)
        found += [cls(**{field: value}) for value in allowed.values]
    return found
