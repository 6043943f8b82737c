"""The policy as data: what each layer of a model keeps, and how."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvplan.methods.channels import ChannelSelector
from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.evictors import Evictor
from kvplan.methods.evictors.streaming import Streaming
from kvplan.methods.head_splits import HeadSplit
from kvplan.methods.mergers import Merger
from kvplan.model_spec import layers_in
from kvplan.units import BASIS_POINTS, format_share

FORMAT_VERSION = 1
DEFAULT_SINK_TOKENS = 4
DEFAULT_RECENT_TOKENS = 16
DEFAULT_MIN_SLOTS = 64


@dataclass(frozen=True)
class Slots:
    """How many tokens a layer holds per KV head. At most one of the three is set; none of them: `full`.

    Args:
        tokens: A fixed number of tokens.
        share: Basis points (1/100 of a percent) of each row's own prompt tokens, fixed at the end of prefill.
        heads: One `Slots` per KV head, each of a number or a share.
    """

    tokens: int | None = None
    share: int | None = None
    heads: tuple[Slots, ...] = ()

    @property
    def is_full(self) -> bool:
        return self.tokens is None and self.share is None and not self.heads

    def of_head(self, head: int) -> Slots:
        """What one KV head holds."""
        return self.heads[head] if self.heads else self

    def resolve(self, prompt_tokens: int, min_slots: int) -> int | None:
        """The row's capacity in tokens, or None for `full`. `min_slots` is the floor of a percentage.

        Not for slots that differ between heads: ask `of_head` first.
        """
        assert not self.heads, "resolve one head at a time"
        if self.tokens is not None:
            return self.tokens
        if self.share is not None:
            return max(prompt_tokens * self.share // BASIS_POINTS, min_slots)
        return None

    def __str__(self) -> str:
        if self.heads:
            return f"[{', '.join(map(str, self.heads))}]"
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
        head_split: How the layer's slots are divided among its KV heads at the end of the prompt, or None: evenly (or
            as `slots` says per head).
        merger: What evicted tokens leave behind, or None.
        channels: Which key channels are stored, or None: all.
        key_codec, value_codec: How slots are stored.
        shares: Index of the earlier layer whose cache this layer reads, or None. A sharing layer stores nothing,
            and its other fields are not used.
    """

    slots: Slots = FULL
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    min_slots: int = DEFAULT_MIN_SLOTS
    evictor: Evictor = field(default_factory=Streaming)
    head_split: HeadSplit | None = None
    merger: Merger | None = None
    channels: ChannelSelector | None = None
    key_codec: Codec = field(default_factory=Dense)
    value_codec: Codec = field(default_factory=Dense)
    shares: int | None = None

    @property
    def protected_sinks(self) -> int:
        return self.sink_tokens if self.evictor.keeps_sinks else 0

    @property
    def stored_whole(self) -> tuple[int, int]:
        """(tokens of an encoded unit, most recent tokens that are stored as they are); (1, 0) for plain slots."""
        keys, values = self.key_codec.for_keys(), self.value_codec.for_values()
        pruned = 0 if self.channels is None else self.channels.recent_tokens
        return max(keys.group_tokens, values.group_tokens), max(keys.residual_tokens, values.residual_tokens, pruned)

    def capacity(self, prompt_tokens: int, head: int = 0) -> int | None:
        """Slots of a row whose prompt has that many tokens, or None when nothing is ever evicted.

        Units of several tokens make it a little smaller: the part behind the recent tokens is whole units.
        """
        slots = self.slots.of_head(head).resolve(prompt_tokens, self.min_slots)
        unit, recent = self.stored_whole
        return slots if slots is None or unit == 1 else recent + max(0, slots - recent) // unit * unit


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
        prefill_chunk_tokens: Prompt tokens per forward, each chunk evicting before the next; None: the whole prompt at
            once.
        provenance: Where it came from; not part of what it does.
    """

    layers: tuple[LayerPolicy, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    prefill_chunk_tokens: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def source(self, layer: int) -> int:
        """The layer whose cache `layer` reads: itself, unless it shares."""
        shares = self.layers[layer].shares
        return layer if shares is None else shares

    @property
    def chunked(self) -> bool:
        return self.prefill_chunk_tokens is not None


def stated_windows(model: Mapping[str, Any]) -> frozenset[int]:
    """The layers to which a `model:` block gives a sliding window."""
    ranges = model.get("window_layers")
    return frozenset() if ranges is None else frozenset(itertools.chain.from_iterable(layers_in(str(ranges))))
