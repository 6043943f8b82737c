"""What holds for every registered head split."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from kvplan.methods.head_splits import head_splits
from kvplan.methods.params import Choice, search_ranges, settings
from kvplan.methods.softmax import masked_softmax


def random_scores(heads: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(heads, 1, generator=generator) * 8
    logits = sharpness * torch.randn(heads, tokens, generator=generator)
    return masked_softmax(logits, None, None).to(dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    heads, tokens = draw(st.integers(1, 8)), draw(st.integers(1, 60))
    total = draw(st.integers(0, heads * tokens))
    least = draw(st.integers(0, total // heads))
    scores = random_scores(heads, tokens, draw(st.integers(0, 99)))
    if draw(st.booleans()):  # many ties
        scores = (scores * tokens).round()
    return scores, total, least


@pytest.mark.parametrize("name", head_splits.names())
class TestEveryHeadSplit:
    @given(problem=problems())
    @examples(max_examples=60, deadline=None)
    def test_all_slots_are_given_out_within_bounds(self, name: str, problem: tuple[torch.Tensor, int, int]) -> None:
        scores, total, least = problem
        for split in every_setting(name):
            shares = split.split(scores, total, least)
            assert all(type(share) is int for share in shares)
            assert len(shares) == len(scores)
            assert sum(shares) == total
            assert all(least <= share <= scores.shape[1] for share in shares)

    @given(seed=st.integers(0, 99), total=st.integers(0, 200), least=st.integers(0, 8))
    @examples(max_examples=30, deadline=None)
    def test_permuting_heads_permutes_the_split(self, name: str, seed: int, total: int, least: int) -> None:
        scores, total = random_scores(5, 40, seed), max(total, 5 * least)
        whole, flipped = (head_splits[name]().split(s, total, least) for s in (scores, scores.flip(0)))
        # A head that loses a tie may hold one slot less.
        assert all(abs(a - b) <= 1 for a, b in zip(whole, reversed(flipped), strict=True))

    def test_alike_heads_get_alike_slots(self, name: str) -> None:
        scores = random_scores(1, 40, 3).expand(4, 40)
        shares = head_splits[name]().split(scores, 42, 0)
        assert max(shares) - min(shares) <= 1

    def test_the_split_is_deterministic_and_leaves_the_scores_alone(self, name: str) -> None:
        scores = random_scores(4, 40, 1)
        before = scores.clone()
        assert head_splits[name]().split(scores, 50, 2) == head_splits[name]().split(scores, 50, 2)
        assert torch.equal(scores, before)

    def test_nothing_and_everything_can_be_given_out(self, name: str) -> None:
        scores = random_scores(3, 10, 0)
        assert head_splits[name]().split(scores, 0, 0) == [0, 0, 0]
        assert head_splits[name]().split(scores, 30, 10) == [10, 10, 10]

    def test_parameters_survive_settings(self, name: str) -> None:
        split = head_splits[name]()
        assert settings(split) == {}
        for field, allowed in search_ranges(type(split)).items():
            assert isinstance(allowed, Choice)
            assert getattr(split, field) in allowed.values
        for other in every_setting(name):
            assert type(other)(**settings(other)) == other
            assert other.name == name

    def test_parameters_are_frozen(self, name: str) -> None:
        split = head_splits[name]()
        with pytest.raises(dataclasses.FrozenInstanceError):
            split.name = "other"  # type: ignore[misc]


def every_setting(name: str) -> list:
    """The default, and each choice of each tunable parameter."""
    cls = head_splits[name]
    found = [cls()]
    for field, allowed in search_ranges(cls).items():
        assert isinstance(allowed, Choice)
        found += [cls(**{field: value}) for value in allowed.values]
    return found
