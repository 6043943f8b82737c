"""Baselines: one method in every layer and the slots split by an allocator, at a share of the full cache's bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.calibrate.facts import LayerFacts
from kvplan.calibrate.precision import Precision, storable
from kvplan.errors import MethodError, ProfileError, TargetError
from kvplan.methods.evictors import evictors
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import FULL, LayerPolicy, Policy, Target
from kvplan.search.allocators import allocators
from kvplan.search.budget import Budget, Protection
from kvplan.search.method import joined, named
from kvplan.search.project import project
from kvplan.units import BASIS_POINTS, format_share, parse_share

EXAMPLE = "uniform:snapkv@40%"
_SPELLING = re.compile(r"(?P<allocator>\w+):(?P<evictor>\w+)(\+(?P<codec>[\w/]+))?@(?P<share>[^@]+)")


@dataclass(frozen=True)
class Baseline:
    """`ALLOCATOR:EVICTOR@SHARE`, or `ALLOCATOR:EVICTOR+CODEC@SHARE`.

    Args:
        allocator: How the slots are split over the layers.
        method: The evictor, with the codecs of keys and values behind a `+`.
        share: Of the full cache's bytes after the prompt, in basis points.
    """

    allocator: str
    method: str
    share: int

    @classmethod
    def parse(cls, text: str) -> Baseline:
        """Raises: MethodError or TargetError: what is wrong with it."""
        match = _SPELLING.fullmatch(text.strip())
        if not match:
            raise MethodError(
                f"'{text}' is not a baseline; write ALLOCATOR:EVICTOR@SHARE, for example {EXAMPLE}, or with a codec "
                "uniform:streaming+int8@40% (keys and values apart: int8/turboquant2)"
            )
        evictor, codec = match["evictor"], match["codec"]
        allocators[match["allocator"]]  # raises where there is none
        if evictors[evictor]().forgets_after is not None:
            raise MethodError(
                f"baseline '{text}': {evictor} holds what it likes, so it has no share of its own; write a policy"
            )
        try:
            method = joined(evictor, Precision.parse(codec)) if codec else evictor
        except MethodError as error:
            raise MethodError(f"baseline '{text}': {error}; other codecs need a policy file") from error
        return cls(match["allocator"], method, parse_share(match["share"]))

    @property
    def name(self) -> str:
        return f"{self.allocator}:{self.method}@{format_share(self.share)}"

    def policy(self, spec: ModelSpec, context_tokens: int, facts: Sequence[LayerFacts] | None = None) -> Policy:
        """The policy at the share's bytes, side arrays and scales included.

        A codec that stores the whole prompt in fewer bytes than the share is `full`, and holds less.

        Args:
            context_tokens: The prompt length that the least slots of a layer are counted at.
            facts: Of each layer, from a profile; for allocators that read them.

        Raises:
            ProfileError: the allocator goes by what is not there.
            TargetError: the least slots cost more than the share.
            MethodError: the codec cannot store this model's heads in fewer bytes.
        """
        allocator = allocators[self.allocator]()
        if allocator.reads and facts is None:
            raise ProfileError(
                f"baseline '{self.name}': {self.allocator} splits by the layers' {allocator.reads.replace('_', ' ')}; "
                "give the --profile that kvplan calibrate wrote"
            )
        method, protection = named(self.method), Protection()
        if not storable(method.precision, spec):
            raise MethodError(
                f"baseline '{self.name}': {method.precision} cannot store this model's heads in fewer bytes"
            )
        target = Target(share=self.share)
        budget = Budget(spec=spec, target=target, context_tokens=context_tokens, protection=protection)
        layers, known = budget.layers, facts or [LayerFacts(importance=1.0)] * spec.num_layers
        told = [known[i] for i in layers]
        if not allocator.usable(told):
            raise ProfileError(
                f"baseline '{self.name}': the profile lacks what {self.allocator} splits by; an earlier build made it, "
                "calibrate again"
            )
        raw = allocator.split(told, self.share / BASIS_POINTS)
        try:
            units = project(
                raw,
                [budget.cost(i, method) for i in layers],
                budget.total,
                [budget.floor(i, method) for i in layers],
                [budget.cap(i, method) for i in layers],
            )
        except TargetError as error:
            raise TargetError(
                f"baseline '{self.name}': {protection.min_slots} slots in each of {len(layers)} layers are more than "
                f"{format_share(self.share)} of {context_tokens} prompt tokens; ask for a larger share, or give longer "
                "prompts"
            ) from error
        plans = {
            i: method.layer(budget.slots(u, i, method), min_slots=protection.min_slots)
            for i, u in zip(layers, units, strict=True)
        }
        return Policy(
            layers=tuple(plans.get(i, LayerPolicy(slots=FULL)) for i in range(spec.num_layers)),
            model=spec.policy_block(),
            target=target,
            provenance={"baseline": self.name},
        )
