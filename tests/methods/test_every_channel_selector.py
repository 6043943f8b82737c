"""What holds for every registered channel selector."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kvplan.methods.channels import channel_selectors
from kvplan.methods.params import Choice, search_ranges, settings

B, HQ, HKV, T, W, D = 2, 4, 2, 40, 32, 8


def prompt(pad: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(B, h, n, D, generator=generator) for h, n in ((HQ, W), (HKV, T)))
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :pad] = False
    return queries.to(dtype), keys.to(dtype), valid


@pytest.mark.parametrize("name", channel_selectors.names())
class TestEveryChannelSelector:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_channels_are_distinct_ascending_and_as_many_as_promised(self, name: str, dtype: torch.dtype) -> None:
        selector = channel_selectors[name]()
        channels = selector.select(*prompt(dtype=dtype))
        assert channels.shape == (B, HKV, selector.num_kept(D))
        assert channels.dtype == torch.int64
        assert (channels.diff(dim=-1) > 0).all()
        assert (channels >= 0).all()
        assert (channels < D).all()

    def test_at_least_one_channel_is_kept(self, name: str) -> None:
        for selector in every_setting(name):
            for dim in (1, 2, 3, 8, 96, 128, 256):
                assert 1 <= selector.num_kept(dim) <= dim

    def test_windows_are_declared(self, name: str) -> None:
        selector = channel_selectors[name]()
        assert selector.recent_tokens >= 1
        assert selector.window_tokens_needed >= 0

    def test_the_choice_is_deterministic_and_leaves_its_inputs_alone(self, name: str) -> None:
        selector, inputs = channel_selectors[name](), prompt()
        first = selector.select(*inputs)
        assert torch.equal(first, selector.select(*inputs))
        assert all(torch.equal(mine, fresh) for mine, fresh in zip(inputs, prompt(), strict=True))

    @pytest.mark.parametrize("pad", [5, 20, 39])
    def test_padding_does_not_matter(self, name: str, pad: int) -> None:
        queries, keys, valid = prompt(pad)
        keys[1, :, :pad] = 1e4
        queries[1, :, : max(0, pad - (T - W))] = 1e4
        selector = channel_selectors[name]()
        width = min(W, T - pad)
        alone = selector.select(queries[1:, :, -width:], keys[1:, :, pad:], valid[1:, pad:])
        assert torch.equal(selector.select(queries, keys, valid)[1:], alone)

    def test_a_row_of_padding_alone_still_has_channels(self, name: str) -> None:
        queries, keys, valid = prompt(pad=T)
        channels = channel_selectors[name]().select(queries, keys, valid)
        assert (channels.diff(dim=-1) > 0).all()

    def test_permuting_rows_and_heads_permutes_channels(self, name: str) -> None:
        queries, keys, valid = prompt()
        selector = channel_selectors[name]()
        whole = selector.select(queries, keys, valid)
        assert torch.equal(selector.select(queries.flip(0), keys.flip(0), valid.flip(0)), whole.flip(0))
        assert torch.equal(selector.select(queries.flip(1), keys.flip(1), valid), whole.flip(1))

    def test_parameters_survive_settings(self, name: str) -> None:
        selector = channel_selectors[name]()
        assert settings(selector) == {}
        for field, allowed in search_ranges(type(selector)).items():
            assert isinstance(allowed, Choice)
            assert getattr(selector, field) in allowed.values
        for other in every_setting(name):
            assert type(other)(**settings(other)) == other
            assert other.name == name

    def test_parameters_are_frozen(self, name: str) -> None:
        selector = channel_selectors[name]()
        with pytest.raises(dataclasses.FrozenInstanceError):
            selector.name = "other"  # type: ignore[misc]


def every_setting(name: str) -> list:
    """The default, and each choice of each tunable parameter."""
    cls = channel_selectors[name]
    found = [cls()]
    for field, allowed in search_ranges(cls).items():
        assert isinstance(allowed, Choice)
        found += [cls(**{field: value}) for value in allowed.values]
    return found
