"""The exact bytes that a policy holds: what the runtime allocates, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvplan.errors import PolicyError
from kvplan.methods.evictors.base import POSITION_BYTES, SCORE_BYTES
from kvplan.model_spec import DTYPE_BYTES, LayerSpec, ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, stated_windows
from kvplan.units import BASIS_POINTS

MIN_GROWTH_TOKENS = 16


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer holds over all rows, by kind."""

    keys: int = 0
    values: int = 0
    positions: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        return self.keys + self.values + self.positions + self.scores

    def __add__(self, other: LayerBytes) -> LayerBytes:
        return LayerBytes(
            self.keys + other.keys,
            self.values + other.values,
            self.positions + other.positions,
            self.scores + other.scores,
        )


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


def capacity(layer: LayerPolicy, spec: LayerSpec, prompt_tokens: int) -> int | None:
    """Most slots that one row may ever hold, or None when nothing bounds it. Not for a sharing layer."""
    return layer.capacity(prompt_tokens) if spec.window is None else spec.window


def grown_tokens(prompt_tokens: int, appended_tokens: int) -> int:
    """Room for appended tokens in a row below its capacity: 1, 2, 4, ... up to a sixteenth of the prompt, then blocks.

    So a short answer holds hardly more than its tokens, and a long one is rarely copied.
    """
    block = max(MIN_GROWTH_TOKENS, prompt_tokens // 16)
    if appended_tokens <= block:
        return min(1 << (appended_tokens - 1).bit_length(), block) if appended_tokens else 0
    return -(-appended_tokens // block) * block


def allocated_slots(layer: LayerPolicy, spec: LayerSpec, prompt_tokens: int, appended_tokens: int) -> int:
    """Slots per KV head of one row after its prompt and `appended_tokens` forward tokens; 0 for a sharing layer."""
    if layer.shares is not None:
        return 0
    slots = prompt_tokens + grown_tokens(prompt_tokens, appended_tokens)
    most = capacity(layer, spec, prompt_tokens)
    return slots if most is None else min(slots, most)


def plan(policy: Policy, spec: ModelSpec, prompt_tokens: Sequence[int], appended_tokens: int = 0) -> BytesPlan:
    """Bytes held after the prompts (one length in tokens per row) and `appended_tokens` more tokens in every row.

    Raises:
        PolicyError: the policy and the model differ in their number of layers.
    """
    if len(policy.layers) != spec.num_layers:
        raise PolicyError(f"the policy has {len(policy.layers)} layers, the model {spec.num_layers}")
    pairs = list(zip(policy.layers, spec.layers, strict=True))
    slots = tuple(sum(allocated_slots(p, s, tokens, appended_tokens) for tokens in prompt_tokens) for p, s in pairs)
    return BytesPlan(
        layers=tuple(_layer_bytes(p, s, n, DTYPE_BYTES[spec.dtype]) for (p, s), n in zip(pairs, slots, strict=True)),
        slots=slots,
        full=spec.full_kv_bytes([tokens + appended_tokens for tokens in prompt_tokens]),
        min_slots_binds=tuple(i for i, layer in enumerate(policy.layers) if floor_binds(layer, prompt_tokens)),
    )


def _layer_bytes(layer: LayerPolicy, spec: LayerSpec, slots: int, dtype_bytes: int) -> LayerBytes:
    side_heads = 0
    if layer.evictor.keeps_scores and not layer.slots.is_full and spec.window is None:
        side_heads = 1 if layer.evictor.one_set_for_all_heads else spec.kv_heads
    return LayerBytes(
        keys=slots * spec.kv_heads * spec.key_dim * dtype_bytes,
        values=slots * spec.kv_heads * spec.value_dim * dtype_bytes,
        positions=slots * side_heads * POSITION_BYTES,
        scores=slots * side_heads * SCORE_BYTES,
    )


def floor_binds(layer: LayerPolicy, prompt_tokens: Sequence[int]) -> bool:
    """Whether `min_slots` raises the layer's percentage for at least one of these rows."""
    share = layer.slots.share
    if share is None or layer.shares is not None:
        return False
    return any(tokens * share // BASIS_POINTS < layer.min_slots for tokens in prompt_tokens)


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
