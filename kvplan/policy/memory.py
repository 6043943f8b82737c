"""The exact bytes that a policy holds: what the runtime allocates, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from kvplan.errors import PolicyError
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.layout import KINDS, Column, Layout, layout
from kvplan.policy.schema import LayerPolicy, Policy, stated_windows
from kvplan.units import BASIS_POINTS

MIN_GROWTH_TOKENS = 16


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer holds over all rows, by kind."""

    keys: int = 0
    values: int = 0
    scales: int = 0
    positions: int = 0
    scores: int = 0
    counts: int = 0
    channels: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def __add__(self, other: LayerBytes) -> LayerBytes:
        return LayerBytes(**{kind: getattr(self, kind) + getattr(other, kind) for kind in KINDS})


assert tuple(f.name for f in fields(LayerBytes)) == KINDS


@dataclass(frozen=True)
class BytesPlan:
    """What a batch of rows holds under a policy.

    Attributes:
        layers: Bytes per layer.
        slots: Allocated slots per layer, over all rows, per KV head.
        full: Bytes of a cache that evicts nothing, for the same tokens.
        min_slots_binds: Layers in which `min_slots` raised the percentage of at least one row.
    """

    layers: tuple[LayerBytes, ...]
    slots: tuple[int, ...]
    full: int
    min_slots_binds: tuple[int, ...]

    @property
    def by_kind(self) -> LayerBytes:
        """Bytes of all layers, by kind."""
        return sum(self.layers, LayerBytes())

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Held / full, 0 to 1; growth blocks and side arrays can lift a `full` policy a little above 1."""
        return self.total / self.full if self.full else 0.0


def capacity(layer: LayerPolicy, spec: LayerSpec, prompt_tokens: int, head: int = 0) -> int | None:
    """Most slots that one row may ever hold in one KV head, or None when nothing bounds it. Not for a sharing layer."""
    return layer.capacity(prompt_tokens, head) if spec.window is None else spec.window


def grown_tokens(prompt_tokens: int, appended_tokens: int) -> int:
    """Room for appended tokens in a row below its capacity: 1, 2, 4, ... up to a sixteenth of the prompt, then blocks.

    So a short answer holds hardly more than its tokens, and a long one is rarely copied.
    """
    block = max(MIN_GROWTH_TOKENS, prompt_tokens // 16)
    if appended_tokens <= block:
        return min(1 << (appended_tokens - 1).bit_length(), block) if appended_tokens else 0
    return -(-appended_tokens // block) * block


def allocated_slots(
    layer: LayerPolicy, spec: LayerSpec, prompt_tokens: int, appended_tokens: int, head: int = 0
) -> int:
    """Slots of one KV head of one row after its prompt and `appended_tokens` forward tokens; 0 for a sharing layer."""
    if layer.shares is not None:
        return 0
    slots = prompt_tokens + grown_tokens(prompt_tokens, appended_tokens)
    most = capacity(layer, spec, prompt_tokens, head)
    slots = slots if most is None else min(slots, most)
    unit, recent = layer.stored_whole
    # Encoded units are allocated whole.
    return slots if unit == 1 else -(-max(0, slots - recent) // unit) * unit + min(recent, slots)


def plan(policy: Policy, spec: ModelSpec, prompt_tokens: Sequence[int], appended_tokens: int = 0) -> BytesPlan:
    """Bytes held after the prompts (one length in tokens per row) and `appended_tokens` more tokens in every row.

    Raises:
        PolicyError: the policy and the model differ in their number of layers.
    """
    if len(policy.layers) != spec.num_layers:
        raise PolicyError(f"the policy has {len(policy.layers)} layers, the model {spec.num_layers}")
    dtype = getattr(torch, spec.dtype)
    held, slots = [], []
    for layer, shape in zip(policy.layers, spec.layers, strict=True):
        found, count = _layer_plan(layer, shape, dtype, policy.chunked, prompt_tokens, appended_tokens)
        held.append(found)
        slots.append(count)
    return BytesPlan(
        layers=tuple(held),
        slots=tuple(slots),
        full=spec.full_kv_bytes([tokens + appended_tokens for tokens in prompt_tokens]),
        min_slots_binds=tuple(i for i, layer in enumerate(policy.layers) if floor_binds(layer, prompt_tokens)),
    )


def _layer_plan(
    layer: LayerPolicy, spec: LayerSpec, dtype: torch.dtype, chunked: bool, prompt_tokens: Sequence[int], appended: int
) -> tuple[LayerBytes, int]:
    """Bytes of one layer over all rows, and its slots per KV head over all rows (a mean, where heads differ)."""
    if layer.shares is not None:
        return LayerBytes(), 0
    stored = layout(layer, spec, dtype, chunked)
    if not layer.slots.heads:
        rows = [allocated_slots(layer, spec, tokens, appended) for tokens in prompt_tokens]
        return sum((layout_bytes(stored, slots) for slots in rows), LayerBytes()), sum(rows)
    # Each KV head is stored as a row of its own.
    one = layout(layer, replace(spec, kv_heads=1), dtype, chunked)
    each = [
        allocated_slots(layer, spec, tokens, appended, head)
        for tokens in prompt_tokens
        for head in range(spec.kv_heads)
    ]
    return sum((layout_bytes(one, slots) for slots in each), LayerBytes()), sum(each) // spec.kv_heads


def layout_bytes(stored: Layout, slots: int) -> LayerBytes:
    """What one row of that many slots takes."""
    body, recent = stored.parts(slots)
    held = dict.fromkeys(KINDS, 0)

    def count(columns: Sequence[Column], slots: int) -> None:
        for column in columns:
            held[column.kind] += column.bytes(slots)

    count(stored.body, body)
    count(stored.recent, recent)
    count(stored.fixed, 1)
    return LayerBytes(**held)


def floor_binds(layer: LayerPolicy, prompt_tokens: Sequence[int]) -> bool:
    """Whether `min_slots` raises the layer's percentage for at least one of these rows."""
    if layer.shares is not None:
        return False
    shares = [s.share for s in (layer.slots.heads or (layer.slots,)) if s.share is not None]
    return any(tokens * share // BASIS_POINTS < layer.min_slots for tokens in prompt_tokens for share in shares)


def stated_spec(policy: Policy) -> ModelSpec:
    """The model as the policy's `model:` block describes it: values as wide as keys, full attention where it states no
    window.

    Raises:
        PolicyError: there is no block, or it describes layers of different shapes.
    """
    block = policy.model
    missing = [name for name in ("layers", "kv_heads", "head_dim", "dtype") if name not in block]
    if missing:
        raise PolicyError(f"the policy's model block lacks {', '.join(missing)}; bytes cannot be planned without them")
    for name in ("kv_heads", "head_dim", "window"):
        if not isinstance(block.get(name, 0), int):
            raise PolicyError(f"model.{name} differs between layers ({block[name]}); plan bytes with the model itself")
    layer = LayerSpec(kv_heads=block["kv_heads"], key_dim=block["head_dim"], value_dim=block["head_dim"])
    windowed = stated_windows(block)
    return ModelSpec(
        layers=tuple(
            replace(layer, window=block["window"]) if i in windowed else layer for i in range(block["layers"])
        ),
        query_heads=block["kv_heads"],
        dtype=block["dtype"],
        model_type=block.get("type", ""),
        fingerprint=block.get("fingerprint"),
    )
