"""Definition: all that a worker has to know of a study, as plain data that is stored with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvplan.calibrate.facts import LayerFacts
from kvplan.errors import ProfileError, StudyError
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import Target
from kvplan.search.budget import Protection
from kvplan.search.compile import Compiler, budget_for
from kvplan.search.decisions import Decisions
from kvplan.search.layer_groups import Groups
from kvplan.search.objective import Objective
from kvplan.search.seen import packed
from kvplan.search.space import SearchSpace, space_for

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile


@dataclass(frozen=True)
class MeasuredProfile:
    """What a search reads of a profile, without the sums that make profiles large."""

    facts: list[LayerFacts]
    sensitivity: dict[str, dict[int, list[float]]]
    codec_sensitivity: dict[str, list[float]]
    pair_distances: list[tuple[int, int, float]]
    num_tokens: int
    num_prompts: int
    data_fingerprint: str
    prompt_hashes: str = ""  # packed

    @classmethod
    def of(cls, profile: Profile | MeasuredProfile) -> MeasuredProfile:
        if isinstance(profile, cls):
            return profile
        try:
            pairs = list(profile.pair_distances)
        except ProfileError:  # no prompt was long enough to measure them
            pairs = []
        return cls(
            facts=list(profile.facts),
            sensitivity=profile.sensitivity,
            codec_sensitivity=profile.codec_sensitivity,
            pair_distances=pairs,
            num_tokens=profile.statistics.num_tokens,
            num_prompts=profile.statistics.num_prompts,
            data_fingerprint=profile.data_fingerprint,
            prompt_hashes=packed(profile.statistics.prompt_hashes),
        )

    @property
    def spec(self) -> Any:
        return SimpleNamespace(num_layers=len(self.facts))

    @property
    def statistics(self) -> Any:
        return SimpleNamespace(num_tokens=self.num_tokens, num_prompts=self.num_prompts)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MeasuredProfile:
        curves = {
            name: {int(share): values for share, values in by_share.items()}
            for name, by_share in data["sensitivity"].items()
        }
        pairs = [(int(i), int(j), float(x)) for i, j, x in data["pair_distances"]]
        facts = [LayerFacts.from_json(one) for one in data["facts"]]
        return cls(**{**data, "facts": facts, "sensitivity": curves, "pair_distances": pairs})


@dataclass(frozen=True)
class Definition:
    """A study as it was created.

    Args:
        profile: What was measured of the model.
        target: What the policies may hold.
        protection: What every layer keeps.
        evictors: Names to choose from; all measured when empty.
        codecs: Likewise; None: all measured.
        groups: Layers that are decided together, or how many groups.
        decisions: What is searched.
        objective: What is minimised.
        sampler: Its name.
        search_prompts: Indices of the prompts that trials are scored on.
        seed: Of the sampler.
        stale_after: Seconds without a sign of life after which a trial is tried again.
        shares: Memory targets in basis points of a search over several, the target's own the last; else empty.
        inputs: How the search was told to load model and prompts; not the search's business.
    """

    profile: MeasuredProfile
    target: Target
    protection: Protection
    evictors: tuple[str, ...]
    codecs: tuple[str, ...] | None
    groups: Groups
    decisions: Decisions
    objective: Objective
    sampler: str
    search_prompts: tuple[int, ...]
    seed: int
    stale_after: float
    shares: tuple[int, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_objectives(self) -> int:
        """The loss, and with several memory targets the bytes."""
        return 2 if self.shares else 1

    def space(self, spec: ModelSpec) -> tuple[Compiler, SearchSpace]:
        """Raises: TargetError, ProfileError: as `Compiler`."""
        profile: Any = self.profile
        budget = budget_for(profile, spec, self.target, self.protection)
        return space_for(profile, budget, self.decisions, self.evictors, self.groups, self.codecs, self.shares)

    def identity(self, spec: ModelSpec, compiler: Compiler, space: SearchSpace) -> dict[str, Any]:
        """What makes two studies the same one, as far as the search knows: seed and patience do not count."""
        return {
            "model": spec.fingerprint,
            "target": [self.target.share, self.target.bytes, self.target.context_tokens, self.target.batch],
            "context": compiler.budget.context_tokens,
            "protection": [self.protection.sink_tokens, self.protection.recent_tokens, self.protection.min_slots],
            "prompts": list(self.search_prompts),
            "profile": _digest([self.profile.sensitivity, [asdict(facts) for facts in self.profile.facts]]),
            "space": space.describe(),
            "objective": self.objective.describe(),
            "sampler": self.sampler,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Definition:
        """Raises: StudyError: not what `to_json` wrote."""
        try:
            codecs, groups = data["codecs"], data["groups"]
            return cls(
                profile=MeasuredProfile.from_json(data["profile"]),
                target=Target(**data["target"]),
                protection=Protection(**data["protection"]),
                evictors=tuple(data["evictors"]),
                codecs=None if codecs is None else tuple(codecs),
                groups=tuple(map(tuple, groups)) if isinstance(groups, list) else groups,
                decisions=Decisions(tuple(data["decisions"]["kinds"]), data["decisions"]["halves"]),
                objective=Objective(**data["objective"]),
                sampler=data["sampler"],
                search_prompts=tuple(data["search_prompts"]),
                seed=data["seed"],
                stale_after=data["stale_after"],
                shares=tuple(data["shares"]),
                inputs=data["inputs"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudyError("its definition was not written by this version of kvplan") from error


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two identities."""
    plain = json.loads(json.dumps(mine))
    return sorted(key for key in {*plain, *theirs} if plain.get(key) != theirs.get(key))


def study_name(identity: Mapping[str, Any]) -> str:
    """The name of a study that nobody named: the same for the same inputs."""
    text = json.dumps(identity, sort_keys=True)
    return "kvplan-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]
