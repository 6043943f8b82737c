"""The policy as data: what each layer of a model keeps, and how."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvplan.methods.evictors import Evictor
from kvplan.methods.evictors.streaming import Streaming
from kvplan.model_spec import layers_in
from kvplan.units import BASIS_POINTS, format_share

FORMAT_VERSION = 1
DEFAULT_SINK_TOKENS = 4
DEFAULT_RECENT_TOKENS = 16
DEFAULT_MIN_SLOTS = 64


@dataclass(frozen=True)
class Slots:
    """How many tokens a layer holds per KV head. Exactly one of the two is set, or neither: `full`.

    Args:
        tokens: A fixed number of tokens.
        share: Basis points (1/100 of a percent) of each row's own prompt tokens, fixed at the end of prefill.
    """

    tokens: int | None = None
    share: int | None = None

    @property
    def is_full(self) -> bool:
        return self.tokens is None and self.share is None

    def resolve(self, prompt_tokens: int, min_slots: int) -> int | None:
        """The row's capacity in tokens, or None for `full`. `min_slots` is the floor of a percentage."""
        if self.tokens is not None:
            return self.tokens
        if self.share is not None:
            return max(prompt_tokens * self.share // BASIS_POINTS, min_slots)
        return None

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        return "full" if self.share is None else format_share(self.share)


FULL = Slots()


@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """The decisions for one layer.

    Args:
        slots: Tokens held per KV head. A layer of `n` slots attends over at most `n` tokens, the current one included.
        sink_tokens: First tokens of the sequence that are never evicted.
        recent_tokens: Last tokens that are never evicted, the current one included.
        min_slots: Floor, in tokens, of a percentage, so that short prompts are kept whole instead of ruined.
        evictor: Which tokens stay.
        shares: Index of the earlier layer whose cache this layer reads, or None. A sharing layer stores nothing,
            and its other fields are not used.
    """

    slots: Slots = FULL
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    min_slots: int = DEFAULT_MIN_SLOTS
    evictor: Evictor = field(default_factory=Streaming)
    shares: int | None = None

    @property
    def protected_sinks(self) -> int:
        return self.sink_tokens if self.evictor.keeps_sinks else 0

    def capacity(self, prompt_tokens: int) -> int | None:
        """Slots of a row whose prompt has that many tokens, or None when nothing is ever evicted."""
        return self.slots.resolve(prompt_tokens, self.min_slots)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the plan was made for: `share` of the full cache in basis points, or `bytes` at a context and batch."""

    share: int | None = None
    bytes: int | None = None
    context_tokens: int | None = None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One layer policy per layer of a model, in order.

    Args:
        layers: A `LayerPolicy` per decoder layer.
        model: The `model:` block: layers, kv_heads, head_dim, dtype and, when known, `name` and `fingerprint`; `window`
            and `window_layers` where the model has sliding windows of its own.
        target: What the plan was made for, or None for a hand-written policy.
        provenance: Where it came from; not part of what it does.
    """

    layers: tuple[LayerPolicy, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def source(self, layer: int) -> int:
        """The layer whose cache `layer` reads: itself, unless it shares."""
        shares = self.layers[layer].shares
        return layer if shares is None else shares


def stated_windows(model: Mapping[str, Any]) -> frozenset[int]:
    """The layers to which a `model:` block gives a sliding window."""
    ranges = model.get("window_layers")
    return frozenset() if ranges is None else frozenset(itertools.chain.from_iterable(layers_in(str(ranges))))
