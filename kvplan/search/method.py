"""Method: an evictor and a codec, what the search chooses for a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvplan.calibrate.sensitivity import CODECS
from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.evictors import Evictor, evictors
from kvplan.model_spec import LayerSpec
from kvplan.policy.layout import layout
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
    """Which tokens stay and how they are stored; keys and values alike.

    Only codecs whose slots stand alone: their bytes grow evenly with the slots.
    """

    evictor: Evictor
    codec: Codec = field(default_factory=Dense)

    @property
    def name(self) -> str:
        """For messages."""
        stored = "" if isinstance(self.codec, Dense) else f" and {self.codec.name}"
        return f"{self.evictor.name}{stored}"

    def layer(
        self,
        slots: Slots,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        recent_tokens: int = DEFAULT_RECENT_TOKENS,
        min_slots: int = DEFAULT_MIN_SLOTS,
    ) -> LayerPolicy:
        """The layer policy with that many slots."""
        if slots.is_full:
            return LayerPolicy(key_codec=self.codec, value_codec=self.codec)
        return LayerPolicy(
            slots=slots,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            min_slots=min_slots,
            evictor=self.evictor,
            key_codec=self.codec,
            value_codec=self.codec,
        )

    def slot_bytes(self, spec: LayerSpec, dtype: str, full: bool) -> int:
        """Bytes of one slot of all KV heads; a full layer keeps nothing beside keys and values."""
        stored = layout(self.layer(FULL if full else Slots(tokens=1)), spec, getattr(torch, dtype))
        return sum(column.bytes(1) for column in stored.body)


def named(name: str) -> Method:
    """`snapkv`, or `snapkv+int8` with a codec of `calibrate.sensitivity.CODECS`."""
    evictor, _, codec = name.partition(JOINT)
    return Method(evictors[evictor](), CODECS[codec]) if codec else Method(evictors[evictor]())


def joined(evictor: str, codec: str) -> str:
    return f"{evictor}{JOINT}{codec}"
