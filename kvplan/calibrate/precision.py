"""Precision: how keys and values of a layer are stored, by the labels that profiles and searches use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvplan.errors import MethodError
from kvplan.methods.codecs import Codec
from kvplan.methods.codecs.dense import Dense
from kvplan.methods.codecs.int8 import Int8
from kvplan.methods.codecs.turboquant import TurboQuant
from kvplan.model_spec import DTYPE_BYTES, ModelSpec

DENSE = "dense"
# Codecs whose slots stand alone, so that they go with every evictor.
CODECS: Mapping[str, Codec] = {
    "int8": Int8(),
    "turboquant4": TurboQuant(bits=4),
    "turboquant3": TurboQuant(bits=3),
    "turboquant2": TurboQuant(bits=2),
}


@dataclass(frozen=True)
class Precision:
    """The codecs of a layer's keys and values.

    Args:
        keys, values: Labels of `CODECS`, or `dense`.
    """

    keys: str = DENSE
    values: str = DENSE

    def __post_init__(self) -> None:
        for label in (self.keys, self.values):
            if label not in (DENSE, *CODECS):
                raise MethodError(f"unknown codec '{label}'; choose among: {', '.join([DENSE, *CODECS])}")

    @classmethod
    def parse(cls, text: str) -> Precision:
        """From `int8` (keys and values alike) or `int8/turboquant2` (keys, values).

        Raises:
            MethodError: an unknown label.
        """
        keys, apart, values = text.partition("/")
        return cls(keys, values if apart else keys)

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    @property
    def key_codec(self) -> Codec:
        return _codec(self.keys)

    @property
    def value_codec(self) -> Codec:
        return _codec(self.values)


WHOLE = Precision()  # slots as they are
# Keys and values apart: what rounding both costs is close to the sum.
MEASURED: tuple[Precision, ...] = (
    *(Precision(keys=label) for label in CODECS),
    *(Precision(values=label) for label in CODECS),
)


def storable(precision: Precision, spec: ModelSpec) -> bool:
    """Whether every layer's vectors can be stored like that, and each encoded one in fewer bytes than as it is."""
    wide, dtype = DTYPE_BYTES[spec.dtype], getattr(torch, spec.dtype)
    roles = ((precision.keys, {x.key_dim for x in spec.layers}), (precision.values, {x.value_dim for x in spec.layers}))
    try:
        return all(
            _codec(label).unit_bytes(dim, dtype) < dim * wide for label, dims in roles if label != DENSE for dim in dims
        )
    except MethodError:
        return False


def _codec(label: str) -> Codec:
    return Dense() if label == DENSE else CODECS[label]
