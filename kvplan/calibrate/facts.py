"""LayerFacts: what a profile tells of one layer to those who split a budget over layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer, as means over the profile's prompts; None where a profile of an earlier build lacks a statistic.

    Attributes:
        importance: 1 - cosine between the residual stream before and after the attention block.
        head_change: 1 - cosine between a token's value and what attention makes of it, mean over heads.
        mass_curve: (attention mass, share of the prompt's tokens that hold it), ascending; of single queries.
        prefix_curve: The same of the attention that all queries pay together.
        norm_curve: (part of the L2 norm of a query's attention, share of the tokens that keep it), ascending.
    """

    importance: float
    head_change: float | None = None
    mass_curve: Curve | None = None
    prefix_curve: Curve | None = None
    norm_curve: Curve | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerFacts:
        """The inverse of `dataclasses.asdict`, after JSON has made lists of the curves' points."""
        found: dict[str, Any] = {
            name: tuple((x, y) for x, y in value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**found)
