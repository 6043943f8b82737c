"""A profile without a model, and a score that is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

from kvplan.calibrate.facts import LayerFacts
from kvplan.calibrate.precision import CODECS, Precision
from kvplan.methods.codecs import Codec
from kvplan.model_spec import LayerSpec, ModelSpec
from kvplan.policy.schema import Policy
from kvplan.stats import PromptScores

WEIGHTS = (8.0, 1.0, 0.5, 6.0, 0.02, 0.03, 0.02, 1.5)
STRENGTH = {"streaming": 1.0, "snapkv": 0.4, "h2o": 0.5}
SHARES = (1000, 2000, 4000, 7000)


def spec_of(num_layers: int = 8, windows: Sequence[int] = ()) -> ModelSpec:
    layers = tuple(LayerSpec(2, 16, 16, 32 if i in windows else None) for i in range(num_layers))
    return ModelSpec(layers, query_heads=4, dtype="bfloat16", model_type="fake", fingerprint="sha256:fake")


def layer_kl(layer: int, evictor: str, share: float) -> float:
    """Damage of one layer that keeps `share` of the prompt, 0 to 1. Odd layers prefer streaming."""
    strength = STRENGTH[evictor] if layer % 2 == 0 or evictor != "snapkv" else 1.3
    return WEIGHTS[layer] * strength * (1 - share) ** 3


@dataclass
class FakeProfile:
    """What the search reads of a profile."""

    spec: ModelSpec = field(default_factory=spec_of)
    importance: list[float] = field(default_factory=lambda: [w / 10 for w in WEIGHTS])
    evictors: tuple[str, ...] = ("h2o", "snapkv", "streaming")
    mean_tokens: int = 1000
    pair_distances: list[tuple[int, int, float]] = field(
        default_factory=lambda: [(i, j, i * 0.3 + (i * j) % 5) for i in range(8) for j in range(i)]
    )

    data_fingerprint: str = "sha256:data"
    prompt_hashes: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()

    @property
    def facts(self) -> list[LayerFacts]:
        return [facts_of(x) for x in self.importance]

    @property
    def statistics(self) -> Any:
        return SimpleNamespace(num_tokens=10 * self.mean_tokens, num_prompts=10, prompt_hashes=self.prompt_hashes)

    @property
    def sensitivity(self) -> dict[str, dict[int, list[float]]]:
        layers = range(self.spec.num_layers)
        return {e: {s: [layer_kl(i, e, s / 10_000) for i in layers] for s in SHARES} for e in self.evictors}

    @property
    def codec_sensitivity(self) -> dict[str, list[float]]:
        return {
            label: [precision_kl(i, Precision.parse(label)) for i in range(self.spec.num_layers)]
            for label in self.codecs
        }


def facts_of(importance: float) -> LayerFacts:
    """A layer that is in all respects as important as told: its attention is spread the wider."""
    spread = importance / (1 + importance)  # 0 to 1

    def curve(*levels: float) -> tuple[tuple[float, float], ...]:
        return tuple((level, max(0.001, level ** (1 + 4 * (1 - spread)))) for level in levels)

    return LayerFacts(
        importance=importance,
        head_change=importance,
        mass_curve=curve(0.5, 0.8, 0.9, 0.99),
        prefix_curve=curve(0.1, 0.5, 0.9),
        norm_curve=curve(0.5, 0.9, 0.99),
    )


def precision_kl(layer: int, precision: Precision) -> float:
    """Damage of one layer that is stored like that; keys suffer most."""
    harm = {"dense": 0.0, "int8": 0.001, "turboquant4": 0.02, "turboquant2": 0.2}
    return (harm[precision.keys] * 0.8 + harm[precision.values] * 0.2) * WEIGHTS[layer]


class FakeScore:
    """Sum of the layers' damage times a factor per prompt; sharing costs a constant. Counts its calls.

    Args:
        fail_at: The call, counted from 1, at which to raise `KeyboardInterrupt`.
        fail_at_prepare: The same for the calls of `prepare`.
        nan_at: Calls that score nan.
        exhausted_at: Calls at which memory runs out, by what is raised then.
    """

    def __init__(
        self,
        fail_at: int | None = None,
        nan_at: Sequence[int] = (),
        fail_at_prepare: int | None = None,
        exhausted_at: Mapping[int, Exception] = MappingProxyType({}),
    ) -> None:
        self.calls: list[tuple[Policy, list[int]]] = []
        self.prepared: list[list[int]] = []
        self.fail_at, self.nan_at, self.fail_at_prepare = fail_at, nan_at, fail_at_prepare
        self.exhausted_at = exhausted_at

    def prepare(self, prompts: Sequence[int], progress: Callable[[int, int], None]) -> None:
        self.prepared.append(list(prompts))
        if len(self.prepared) == self.fail_at_prepare:
            raise KeyboardInterrupt
        progress(len(prompts), len(prompts))

    def __call__(self, policy: Policy, prompts: Sequence[int]) -> PromptScores:
        self.calls.append((policy, list(prompts)))
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        if len(self.calls) in self.exhausted_at:
            raise self.exhausted_at[len(self.calls)]
        kl = total_kl(policy) if len(self.calls) not in self.nan_at else float("nan")
        n = len(prompts)
        return PromptScores(
            kl=tuple(kl * (1 + (p % 3) / 10) for p in prompts),
            top1=(0.9,) * n,
            task=((1.0, float("nan")) * n)[:n],
            nll=(1.0,) * n,
        )


def total_kl(policy: Policy) -> float:
    total = 0.0
    for i, layer in enumerate(policy.layers):
        if layer.shares is not None:
            total += 0.4
            continue
        total += precision_kl(i, Precision(*map(_label, (layer.key_codec, layer.value_codec))))
        if layer.slots.share is not None:
            total += layer_kl(i, layer.evictor.name, layer.slots.share / 10_000)
    return total


def _label(codec: Codec) -> str:
    return next((label for label, known in CODECS.items() if known == codec), "dense")
