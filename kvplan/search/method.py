"""Method: which tokens of a layer stay and how they are stored, what the search chooses for a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvplan.calibrate.precision import WHOLE, Precision
from kvplan.errors import MethodError
from kvplan.methods.channels import ChannelSelector
from kvplan.methods.evictors import Evictor, evictors
from kvplan.methods.head_splits import HeadSplit
from kvplan.model_spec import LayerSpec
from kvplan.policy.compositions import composition_problems
from kvplan.policy.layout import Layout, layout
from kvplan.policy.schema import (
    DEFAULT_MIN_SLOTS,
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    FULL,
    LayerPolicy,
    Slots,
)

JOINT = "+"


@dataclass(frozen=True)
class Method:
    """Everything about a layer but its number of slots.

    Args:
        evictor: Which tokens stay.
        precision: How keys and values are stored.
        head_split: How the slots are divided among the KV heads, or None: evenly. A full layer has none.
        channels: Which key channels are stored, or None: all.
    """

    evictor: Evictor
    precision: Precision = WHOLE
    head_split: HeadSplit | None = None
    channels: ChannelSelector | None = None

    @property
    def name(self) -> str:
        """For messages."""
        stored = "" if self.precision == WHOLE else f" and {self.precision}"
        return f"{self.evictor.name}{stored}"

    def runs(self, spec: LayerSpec, dtype: str) -> bool:
        """Whether a layer of that shape can have it, cut or full."""
        try:
            for full in (False, True):
                self._layout(spec, dtype, full)
        except MethodError:  # a codec cannot pack that many channels
            return False
        return not any(any(composition_problems(self.layer(slots))) for slots in (Slots(tokens=1), FULL))

    def with_legal(
        self, spec: LayerSpec, dtype: str, head_split: HeadSplit | None, channels: ChannelSelector | None
    ) -> Method:
        """This method with those decisions added, each only if a layer of that shape can have it."""
        split = replace(self, head_split=head_split)
        method = split if split.runs(spec, dtype) else self
        pruned = replace(method, channels=channels)
        return pruned if pruned.runs(spec, dtype) else method

    def tuned(self, params: Mapping[str, Any]) -> Method:
        """With other parameters of the evictor."""
        if not params:
            return self
        evictor: Any = self.evictor  # a dataclass, as every registered method is
        return replace(self, evictor=replace(evictor, **params))

    def layer(
        self,
        slots: Slots,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        recent_tokens: int = DEFAULT_RECENT_TOKENS,
        min_slots: int = DEFAULT_MIN_SLOTS,
    ) -> LayerPolicy:
        """The layer policy with that many slots."""
        stored = LayerPolicy(
            key_codec=self.precision.key_codec, value_codec=self.precision.value_codec, channels=self.channels
        )
        if slots.is_full:
            return stored
        return replace(
            stored,
            slots=slots,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            min_slots=min_slots,
            evictor=self.evictor,
            head_split=self.head_split,
        )

    def slot_bytes(self, spec: LayerSpec, dtype: str, full: bool) -> int:
        """Bytes of one slot of all KV heads; a full layer keeps nothing beside keys and values."""
        return sum(column.bytes(1) for column in self._layout(spec, dtype, full).body)

    def fixed_bytes(self, spec: LayerSpec, dtype: str, full: bool) -> int:
        """Bytes of a row beyond slots times `slot_bytes`, at most: recent slots stored whole, and what is per row."""
        stored = self._layout(spec, dtype, full)
        body = sum(column.bytes(stored.recent_tokens) for column in stored.body)
        recent = sum(column.bytes(stored.recent_tokens) for column in stored.recent)
        return max(0, recent - body) + sum(column.bytes(1) for column in stored.fixed)

    def _layout(self, spec: LayerSpec, dtype: str, full: bool) -> Layout:
        return layout(self.layer(FULL if full else Slots(tokens=1)), spec, getattr(torch, dtype))


def named(name: str) -> Method:
    """`snapkv`, or with codecs `snapkv+int8`, `snapkv+int8/turboquant2` (keys, values)."""
    evictor, _, stored = name.partition(JOINT)
    return Method(evictors[evictor](), Precision.parse(stored) if stored else WHOLE)


def joined(evictor: str, precision: Precision) -> str:
    return f"{evictor}{JOINT}{precision}"
