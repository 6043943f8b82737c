"""Layout: which tensors a layer stores per slot. The plan counts them, the runtime allocates them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.model_spec import LayerSpec
from kvplan.policy.schema import LayerPolicy

KINDS = ("keys", "values", "scales", "positions", "scores", "counts", "channels")


@dataclass(frozen=True)
class Column:
    """One stored tensor.

    Attributes:
        name: Unique in a layer, for example `keys.codes`.
        kind: What its bytes are counted as; one of `KINDS`.
        heads: KV heads that have their own; 1 when all share one.
        width: Elements per unit and head.
        tokens: Slots of a unit.
    """

    name: str
    kind: str
    heads: int
    width: int
    dtype: torch.dtype
    tokens: int = 1

    def bytes(self, slots: int) -> int:
        return slots // self.tokens * self.heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a layer stores.

    Attributes:
        body: The columns of its slots.
        recent: The columns of the slots that hold the most recent tokens as they are; empty when all slots are alike.
        fixed: The columns of each row, whatever its slots.
        unit_tokens: Slots that `body` encodes together.
        recent_tokens: Slots of `recent`.
    """

    body: tuple[Column, ...]
    recent: tuple[Column, ...] = ()
    fixed: tuple[Column, ...] = ()
    unit_tokens: int = 1
    recent_tokens: int = 0

    def parts(self, slots: int) -> tuple[int, int]:
        """(slots of the body, slots of the recent part) of a row with room for that many tokens."""
        body = -(-max(0, slots - self.recent_tokens) // self.unit_tokens) * self.unit_tokens
        return body, min(self.recent_tokens, slots)


def evicts(policy: LayerPolicy, spec: LayerSpec) -> bool:
    """Whether an evictor is at work: not in a full layer, nor where the model has a window of its own."""
    return not policy.slots.is_full and spec.window is None


def side_heads(policy: LayerPolicy, spec: LayerSpec) -> int:
    return 1 if policy.evictor.one_set_for_all_heads else spec.kv_heads


@lru_cache(maxsize=1024)  # a search asks for the same ones thousands of times
def layout(policy: LayerPolicy, spec: LayerSpec, dtype: torch.dtype, chunked: bool = False) -> Layout:
    """The columns of a layer that stores its own cache.

    Args:
        chunked: The prompt comes in chunks, which needs every slot's position.

    Raises:
        MethodError: a codec cannot store vectors of this layer's width.
    """
    heads = spec.kv_heads
    unit, recent = policy.stored_whole
    kept = spec.key_dim if policy.channels is None else policy.channels.num_kept(spec.key_dim)
    side = tuple(_side_columns(policy, spec, chunked))
    body = (
        *_columns("keys", policy.key_codec.for_keys(), heads, kept, dtype),
        *_columns("values", policy.value_codec.for_values(), heads, spec.value_dim, dtype),
        *side,
    )
    if not recent:
        return Layout(body, unit_tokens=unit)
    whole = (
        *_columns("keys", Dense(), heads, spec.key_dim, dtype),
        *_columns("values", Dense(), heads, spec.value_dim, dtype),
        *side,
    )
    fixed = () if policy.channels is None else (Column("channels", "channels", heads, kept, torch.int16),)
    return Layout(body, whole, fixed, unit, recent)


def _columns(role: str, codec: Codec, heads: int, dim: int, dtype: torch.dtype) -> Iterator[Column]:
    for name, field in codec.fields(dim, dtype).items():
        kind = "scales" if field.is_scale else role
        yield Column(f"{role}.{name}", kind, heads, field.width, field.dtype, codec.group_tokens)


def _side_columns(policy: LayerPolicy, spec: LayerSpec, chunked: bool) -> Iterator[Column]:
    scored = evicts(policy, spec) and policy.evictor.keeps_scores
    heads = side_heads(policy, spec) if evicts(policy, spec) else 1
    if scored or chunked:
        yield Column("positions", "positions", heads, 1, torch.int32)
    if scored:
        yield Column("scores", "scores", heads, 1, torch.float32)
    if policy.merger is not None and policy.merger.keeps_counts and evicts(policy, spec):
        yield Column("counts", "counts", spec.kv_heads, 1, torch.int32)
