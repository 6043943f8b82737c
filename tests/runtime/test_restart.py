"""A forward that starts at a later layer is the whole one, or is known not to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, model
from torch import nn

from kvplan.runtime.attach import spec_of
from kvplan.runtime.restart import Output, can_start_at, decoder_layers, recorded, started_at

IDS = torch.arange(3, 11)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_can_start_at_a_later_layer(family: str) -> None:
    made = model(family)
    layers = decoder_layers(made, spec_of(made).num_layers)
    assert layers is not None and len(layers) == 4
    for first in (1, 3):
        assert can_start_at(made, layers, first, IDS)


def test_layers_are_as_they_were_afterwards() -> None:
    made = model("llama")
    layers = decoder_layers(made, 4)
    assert layers is not None
    own: Any = lambda *args, **kwargs: torch.zeros(1, 8, 32)  # noqa: E731
    layers[0].__dict__["forward"] = own
    with torch.no_grad(), started_at(layers, 2, Output(((torch.ones(1, 8, 32), IDS.device),), False)):
        assert torch.equal(layers[0](None), torch.ones(1, 8, 32))
    assert layers[0].__dict__["forward"] is own
    assert all("forward" not in layer.__dict__ for layer in layers[1:])
    assert not any(layer._forward_hooks for layer in layers)


class Memo(nn.Module):
    """A layer that reads what the one before it left beside the output."""

    def __init__(self, index: int, memo: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer_idx, self.memo = index, memo

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, self.memo["left"] = self.memo.get("left", torch.zeros_like(x)), x
        return x * 2 + left


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[str, torch.Tensor] = {}
        self.layers = nn.ModuleList(Memo(i, self.memo) for i in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.memo.clear()
        x = input_ids.float()
        for layer in self.layers:
            x = layer(x)
        return type("Out", (), {"logits": x})


def test_a_layer_that_needs_more_than_the_output_before_it_is_found_out() -> None:
    odd = Odd()
    layers = decoder_layers(odd, 3)
    assert layers is not None
    assert not can_start_at(odd, layers, 2, IDS)


def test_layers_that_are_not_in_one_list_are_not_found() -> None:
    assert decoder_layers(nn.ModuleList([Odd().layers, Odd().layers]), 3) is None
    assert decoder_layers(Odd(), 4) is None
    with recorded(None, lambda x: x) as found:
        assert found == {}
