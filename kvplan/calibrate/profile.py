"""Profile: what was measured of a model on a set of prompts, as one JSON file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kvplan.calibrate.facts import Curve, LayerFacts
from kvplan.calibrate.statistics import (
    LATER_NAMES,
    MASS_LEVELS,
    MOMENT_NAMES,
    NORM_LEVELS,
    PREFIX_LEVELS,
    SHARING_TOKENS,
    LayerProfile,
    Moments,
    SensitivitySums,
    Statistics,
    token_l2,
)
from kvplan.errors import KVPlanError, ProfileError
from kvplan.files import read_text, write_text
from kvplan.model_spec import ModelSpec
from kvplan.units import format_share

SCHEMA_VERSION = 1
KIND = "kvplan profile"


@dataclass(frozen=True, eq=False)
class Profile:
    """Statistics of one model on one set of prompts, and how they came about.

    Args:
        spec: The model; `spec.fingerprint` says which one.
        statistics: Of the instrumented pass.
        sensitivity: Of the replays, or None when not measured.
        seeds: Every seed used.
        versions: Of kvplan, Python, torch and transformers.
    """

    spec: ModelSpec
    statistics: Statistics
    sensitivity_sums: SensitivitySums | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_fingerprint(self) -> str:
        """Of the set of prompts, whatever their order and the shards that they were measured in."""
        return "sha256:" + hashlib.sha256("\n".join(self.statistics.prompt_hashes).encode()).hexdigest()[:32]

    @property
    def cosine(self) -> tuple[list[float], list[float], list[float]]:
        """Mean, spread and standard error over prompts, a value per layer each."""
        moments = [layer.cosine for layer in self.statistics.layers]
        return [float(m.mean) for m in moments], [float(m.std) for m in moments], [float(m.se) for m in moments]

    @property
    def importance(self) -> list[float]:
        """1 - mean cosine per layer: how much the attention block changes the residual stream (SqueezeAttention)."""
        return [1.0 - c for c in self.cosine[0]]

    @property
    def facts(self) -> list[LayerFacts]:
        """What allocators read, per layer."""
        return [self._facts(layer) for layer in self.statistics.layers]

    def _facts(self, layer: LayerProfile) -> LayerFacts:
        tokens = self.statistics.num_tokens / self.statistics.num_prompts

        def curve(levels: tuple[float, ...], counts: Any) -> Curve:
            return tuple((level, float(count) / tokens) for level, count in zip(levels, counts, strict=True))

        mass = curve(MASS_LEVELS, layer.effective_tokens.mean.mean(0))
        importance = 1.0 - float(layer.cosine.mean)
        if not all(getattr(layer, name).count for name in LATER_NAMES):
            return LayerFacts(importance=importance, mass_curve=mass)
        return LayerFacts(
            importance=importance,
            head_change=1.0 - float(layer.head_cosine.mean.mean()),
            mass_curve=mass,
            prefix_curve=curve(PREFIX_LEVELS, layer.prefix_tokens.mean),
            norm_curve=curve(NORM_LEVELS, layer.norm_tokens.mean),
        )

    @property
    def pair_distances(self) -> list[tuple[int, int, float]]:
        """(i, j, distance) with i > j, the most dissimilar first; only layers whose caches have one shape and window.

        Raises:
            ProfileError: no prompt had 64 tokens.
        """
        count = self.statistics.sharing_prompts
        if count == 0:
            raise ProfileError(f"no prompt has {SHARING_TOKENS} tokens; KVSharer's distances need longer prompts")
        keys = [layer.key_sum.astype(np.float64) / count for layer in self.statistics.layers]
        values = [layer.value_sum.astype(np.float64) / count for layer in self.statistics.layers]
        return token_l2(keys, values, self.spec.layers)

    @property
    def sensitivity(self) -> dict[str, dict[int, list[float]]]:
        """evictor -> basis points kept -> mean KL in nats per layer cut alone; {} when not measured."""
        return self._sensitivity(lambda m: m.mean)

    @property
    def sensitivity_se(self) -> dict[str, dict[int, list[float]]]:
        """Standard errors of `sensitivity`."""
        return self._sensitivity(lambda m: m.se)

    @property
    def codec_sensitivity(self) -> dict[str, list[float]]:
        """Codecs of keys/values (`int8/dense`) -> mean KL in nats per layer stored so alone; {} if not measured."""
        codecs = self.sensitivity_sums.codecs if self.sensitivity_sums else {}
        return {label: moments.mean.tolist() for label, moments in codecs.items()}

    def _sensitivity(self, of: Any) -> dict[str, dict[int, list[float]]]:
        sums = self.sensitivity_sums.moments if self.sensitivity_sums else {}
        return {name: {share: of(m).tolist() for share, m in by_share.items()} for name, by_share in sums.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went, by phase."""
        extra = {"sensitivity": self.sensitivity_sums.seconds} if self.sensitivity_sums else {}
        return {**self.statistics.seconds, **extra}

    def summary(self) -> dict[str, Any]:
        """The numbers that people read, without the raw sums."""
        mean, std, se = self.cosine
        stats = self.statistics
        layers = [
            {
                "layer": i,
                "importance": self.importance[i],
                "cosine": {"mean": mean[i], "std": std[i], "se": se[i]},
                **{name: m.mean.tolist() for name, m in _measured(layer).items() if name != "cosine"},
            }
            for i, layer in enumerate(stats.layers)
        ]
        return {
            "kind": KIND,
            "model": self.spec.policy_block(),
            "data": {"fingerprint": self.data_fingerprint, "prompts": stats.num_prompts, "tokens": stats.num_tokens},
            "settings": dict(stats.settings),
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "mass_levels": list(MASS_LEVELS),
            "prefix_levels": list(PREFIX_LEVELS),
            "norm_levels": list(NORM_LEVELS),
            "layers": layers,
            "pair_distances": self.pair_distances if stats.sharing_prompts else [],
            "sensitivity": self.sensitivity,
            "sensitivity_se": self.sensitivity_se,
            "codec_sensitivity": self.codec_sensitivity,
        }

    def to_json(self) -> dict[str, Any]:
        stats, sums = self.statistics, self.sensitivity_sums
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "versions": dict(self.versions),
            "seeds": dict(self.seeds),
            "spec": {**self.spec.to_json(), "layers": [asdict(layer) for layer in self.spec.layers]},
            "data": {
                "fingerprint": self.data_fingerprint,
                "prompts": stats.num_prompts,
                "tokens": stats.num_tokens,
                "prompt_hashes": list(stats.prompt_hashes),
            },
            "settings": dict(stats.settings),
            "seconds": dict(stats.seconds),
            "sharing_prompts": stats.sharing_prompts,
            "layers": [
                {
                    **{name: _dump_moments(m) for name, m in _measured(layer).items()},
                    "key_sum": base64.b64encode(layer.key_sum.astype("<f4").tobytes()).decode(),
                    "value_sum": base64.b64encode(layer.value_sum.astype("<f4").tobytes()).decode(),
                }
                for layer in stats.layers
            ],
            "sensitivity": sums
            and {
                "settings": dict(sums.settings),
                "seconds": sums.seconds,
                "moments": {
                    name: {str(share): _dump_moments(m) for share, m in by_share.items()}
                    for name, by_share in sums.moments.items()
                },
                "codecs": {label: _dump_moments(m) for label, m in sums.codecs.items()},
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Profile:
        """Raises: ProfileError: not a profile, of a newer schema, or with missing or impossible values."""
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise ProfileError("not a kvplan profile")
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            hint = "; it was made by a newer kvplan, update this one" if newer else ""
            raise ProfileError(f"schema version {repr(version)[:20]} is not {SCHEMA_VERSION}{hint}")
        from kvplan.calibrate.profile_file import parse

        return parse(data)

    def save(self, path: Path) -> None:
        """Raises: KVPlanError: the file cannot be written."""
        write_text(path, json.dumps(self.to_json(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises: ProfileError: the file cannot be read, or is not a profile that this version understands."""
        try:
            return cls.from_json(json.loads(read_text(path, "profile")))
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error
        except KVPlanError as error:
            raise ProfileError(str(error)) from error
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "a number or a nesting out of range"
            raise ProfileError(f"{path}: not JSON ({reason})") from error


def merge(first: Profile, second: Profile) -> Profile:
    """The profile of both sets of prompts: sums add up exactly.

    Raises:
        ProfileError: another model or other settings, or a prompt is in both.
    """
    a, b = first.statistics, second.statistics
    if first.spec.fingerprint != second.spec.fingerprint or first.spec != second.spec:
        if first.spec.fingerprint == second.spec.fingerprint and first.spec.dtype != second.spec.dtype:
            raise ProfileError(f"measured in {first.spec.dtype} and {second.spec.dtype}; calibrate with one --dtype")
        raise ProfileError(f"made for different models ({_name(first.spec)} and {_name(second.spec)})")
    _same("settings", a.settings, b.settings)
    sums, other = first.sensitivity_sums, second.sensitivity_sums
    if (sums is None) != (other is None):
        raise ProfileError(
            "one has sensitivity and the other has not; calibrate both with or both without --no-sensitivity"
        )
    if overlap := set(a.prompt_hashes) & set(b.prompt_hashes):
        raise ProfileError(f"{len(overlap)} prompts are in both; a prompt counts once, so shards may not overlap")
    layers = tuple(
        LayerProfile(**{f.name: getattr(x, f.name) + getattr(y, f.name) for f in fields(LayerProfile)})
        for x, y in zip(a.layers, b.layers, strict=True)
    )
    seconds = {name: a.seconds.get(name, 0.0) + b.seconds.get(name, 0.0) for name in {**a.seconds, **b.seconds}}
    merged = None
    if sums is not None and other is not None:
        _same("sensitivity settings", sums.settings, other.settings)
        moments = {
            name: {share: moments + other.moments[name][share] for share, moments in by_share.items()}
            for name, by_share in sums.moments.items()
        }
        if set(sums.codecs) != set(other.codecs):
            raise ProfileError("their sensitivities are of different codecs; calibrate both with one kvplan")
        codecs = {label: m + other.codecs[label] for label, m in sums.codecs.items()}
        merged = SensitivitySums(moments, sums.settings, sums.seconds + other.seconds, codecs)
    return Profile(
        spec=first.spec,
        statistics=Statistics(
            layers=layers,
            prompt_hashes=tuple(sorted(a.prompt_hashes + b.prompt_hashes)),
            num_tokens=a.num_tokens + b.num_tokens,
            sharing_prompts=a.sharing_prompts + b.sharing_prompts,
            settings=a.settings,
            seconds=seconds,
        ),
        sensitivity_sums=merged,
        seeds={**second.seeds, **first.seeds},
        versions=_join(first.versions, second.versions),
    )


def describe(profile: Profile) -> str:
    """One line: model, data and sensitivity grid."""
    stats, sums = profile.statistics, profile.sensitivity_sums
    model = f"{profile.spec.model_type}, {profile.spec.num_layers} layers"
    text = f"{model}; {stats.num_prompts} prompts, {stats.num_tokens} tokens"
    if sums is None:
        return text
    shares = ", ".join(format_share(int(s)) for s in next(iter(sums.moments.values()), {}))
    codecs = f", and of {', '.join(sums.codecs)}" if sums.codecs else ""
    return f"{text}; sensitivity of {', '.join(sums.moments)} at {shares}{codecs}"


def _same(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            raise ProfileError(f"{what} differ: {name} is {a.get(name)} and {b.get(name)}")


def _join(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Versions of both; every one is kept where they differ."""
    return {k: ", ".join(sorted({*a.get(k, "?").split(", "), *b.get(k, "?").split(", ")})) for k in {**a, **b}}


def _measured(layer: LayerProfile) -> dict[str, Moments]:
    """Without what a profile of an earlier build lacks."""
    return {name: m for name in MOMENT_NAMES if (m := getattr(layer, name)).count or name not in LATER_NAMES}


def _name(spec: ModelSpec) -> str:
    return f"{spec.model_type} {spec.fingerprint or 'without fingerprint'}"


def _dump_moments(moments: Moments) -> dict[str, Any]:
    return {"count": moments.count, "sum": moments.sum.ravel().tolist(), "squares": moments.squares.ravel().tolist()}
