"""What calibration measures: statistics over prompts, as sums that can be added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplan.model_spec import LayerSpec

SHARING_TOKENS = 64
MASS_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
PREFIX_LEVELS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NORM_LEVELS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, sum and sum of squares over prompts of an array of values: enough for mean and spread, and to merge.

    Values are rounded to multiples of 2^-32 before they are added, so that the float64 sums are exact (up to 2^21) and
    do not depend on the order of the prompts or on how they were split into shards.
    """

    count: int
    sum: Array
    squares: Array

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Moments:
        """Of no prompts."""
        return cls(0, np.zeros(shape), np.zeros(shape))

    @classmethod
    def of(cls, values: Array) -> Moments:
        """From one value per prompt: `values` is [prompts, ...]."""
        exact = _round(values)
        return cls(len(values), exact.sum(0), _round(exact**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.squares + other.squares)

    @property
    def mean(self) -> Array:
        return self.sum / max(self.count, 1)

    @property
    def std(self) -> Array:
        """Spread over prompts, with n - 1; 0 for a single prompt."""
        if self.count < 2:
            return np.zeros_like(self.sum)
        variance = (self.squares - self.sum * self.mean) / (self.count - 1)
        return np.sqrt(np.maximum(variance, 0.0))

    @property
    def se(self) -> Array:
        """Standard error of the mean."""
        return self.std / np.sqrt(max(self.count, 1))


def _round(values: Array) -> Array:
    return np.round(np.asarray(values, dtype=np.float64) * 2.0**32) * 2.0**-32


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """One layer's statistics over prompts; Hkv KV heads, M mass levels (`MASS_LEVELS`).

    Attributes:
        cosine: [] cosine between the residual stream before and after the attention block.
        sink_mass: [Hkv] attention mass on the first tokens.
        recent_mass: [Hkv] attention mass on the last tokens, the current one included.
        entropy: [Hkv] entropy in nats of a query group's mean attention.
        effective_tokens: [Hkv, M] how many of a query group's tokens hold that mass.
        key_norm: [Hkv] mean L2 norm of keys.
        value_norm: [Hkv] mean L2 norm of values.
        head_agreement: [Hkv] mean pairwise cosine of the attention of a group's query heads; 1 for a group of one.
        head_cosine: [Hkv] cosine between a token's value and a query head's output there, behind the first tokens.
        prefix_tokens: [P] how many tokens hold that part (`PREFIX_LEVELS`) of the attention of all heads and queries.
        norm_tokens: [N] how many tokens per head keep that part (`NORM_LEVELS`) of the L2 norm of a query's attention,
            mean over heads.
        key_sum: [Hkv, 64, Dk] float32 sum over prompts of the first keys, for the distances of KVSharer.
        value_sum: [Hkv, 64, Dv] the same of values.
    """

    cosine: Moments
    sink_mass: Moments
    recent_mass: Moments
    entropy: Moments
    effective_tokens: Moments
    key_norm: Moments
    value_norm: Moments
    head_agreement: Moments
    head_cosine: Moments
    prefix_tokens: Moments
    norm_tokens: Moments
    key_sum: npt.NDArray[np.float32]
    value_sum: npt.NDArray[np.float32]


MOMENT_NAMES = tuple(f.name for f in fields(LayerProfile) if not f.name.endswith("_sum"))
LATER_NAMES = ("head_cosine", "prefix_tokens", "norm_tokens")  # not in profiles of earlier builds: a count of 0


def moment_shape(name: str, layer: LayerSpec) -> tuple[int, ...]:
    """Shape of a statistic of one layer."""
    shapes = {
        "cosine": (),
        "effective_tokens": (layer.kv_heads, len(MASS_LEVELS)),
        "prefix_tokens": (len(PREFIX_LEVELS),),
        "norm_tokens": (len(NORM_LEVELS),),
    }
    return shapes.get(name, (layer.kv_heads,))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one instrumented pass measured.

    Attributes:
        layers: A `LayerProfile` per decoder layer.
        prompt_hashes: A hash per prompt, sorted.
        num_tokens: Tokens of all prompts.
        sharing_prompts: Prompts long enough for the sums of keys and values.
        settings: What must be equal for two passes to be merged.
        seconds: Where the time went, by phase.
    """

    layers: tuple[LayerProfile, ...]
    prompt_hashes: tuple[str, ...]
    num_tokens: int
    sharing_prompts: int
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_hashes)


@dataclass(frozen=True, eq=False)
class SensitivitySums:
    """KL to the full cache when one layer alone is cut.

    Attributes:
        moments: evictor -> basis points of the prompt kept -> [L] moments over prompts; 0 at layers that cannot be cut.
        settings: What must be equal for two of them to be merged.
        seconds: How long it took.
        codecs: Codecs of keys/values (`int8/dense`) -> [L] moments of the KL when one layer alone is stored so.
    """

    moments: Mapping[str, Mapping[int, Moments]]
    settings: Mapping[str, Any]
    seconds: float = 0.0
    codecs: Mapping[str, Moments] = field(default_factory=dict)


def token_l2(
    keys: Sequence[npt.NDArray[Any]], values: Sequence[npt.NDArray[Any]], layers: Sequence[LayerSpec] | None = None
) -> list[tuple[int, int, float]]:
    """KVSharer's distance of every pair i > j, descending: mean L2 over heads and tokens, mean of keys and values.

    Yang et al. 2024, arXiv:2410.18517, as in the authors' code (the paper flattens heads and tokens into one vector).
    Unlike them we leave out pairs of unequal shape or window, which cannot share.

    Args:
        keys: Per layer, the mean over texts of the keys, [Hkv, T, Dk].
        values: The same for values.
        layers: The layers' shapes, or None when all are equal.
    """
    pairs = [(i, j) for i in range(len(keys)) for j in range(i) if layers is None or layers[i] == layers[j]]
    ranked = [
        (i, j, float(sum(np.linalg.norm(x[i] - x[j], axis=-1).mean() for x in (keys, values)) / 2)) for i, j in pairs
    ]
    return sorted(ranked, key=lambda pair: (-pair[2], pair[0], pair[1]))
