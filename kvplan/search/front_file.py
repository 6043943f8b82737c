"""The front that `kvplan search --pareto` keeps beside its policy: a plan for each of many memories, whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from kvplan.errors import KVPlanError, TargetError
from kvplan.files import read_text
from kvplan.policy.schema import Policy
from kvplan.policy.serialize import parse_policy
from kvplan.units import BASIS_POINTS, format_share

KEY = "kvplan_front"
FORMAT = 1
MAX_BYTES = 2**62  # more is damage, and no number that can be divided


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan that no other one beats in both bytes and KL.

    Attributes:
        bytes, full_bytes: At the front's prompt; what is held, and what a full cache holds.
        kl: On the confirmation prompts, nats.
        policy: As YAML.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")

    bytes: int = Field(ge=0, le=MAX_BYTES)
    full_bytes: int = Field(ge=1, le=MAX_BYTES)
    kl: FiniteFloat
    policy: str = Field(min_length=1)

    @property
    def share(self) -> float:
        return self.bytes / self.full_bytes


_POINTS = TypeAdapter(list[Point])


def load_front(path: Path) -> list[Point]:
    """The points, the fewest bytes first.

    Raises:
        KVPlanError: the file cannot be read, or is no front.
    """
    text = read_text(path, "front")
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KVPlanError(f"{path}: not JSON ({error})") from error
    version = data.get(KEY) if isinstance(data, dict) else None
    if version is None:
        raise KVPlanError(f"{path}: not a front (no '{KEY}' in it); kvplan search --pareto writes one")
    if version != FORMAT or isinstance(version, bool):
        raise KVPlanError(f"{path}: a front of format {version!r}, this kvplan reads format {FORMAT}; search again")
    try:
        points = _POINTS.validate_json(json.dumps(data.get("points")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise KVPlanError(f"{path}: points.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not points:
        raise KVPlanError(f"{path}: the front has no points")
    return sorted(points, key=lambda point: point.bytes)


def choose(points: Sequence[Point], share: int, where: str) -> tuple[Point, Policy]:
    """The best plan that holds at most a share of the full cache.

    Args:
        share: Basis points.
        where: The file, for errors.

    Raises:
        TargetError: all hold more.
        PolicyError: the plan cannot be read.
    """
    fitting = [point for point in points if point.bytes * BASIS_POINTS <= share * point.full_bytes]
    if not fitting:
        raise TargetError(
            f"{where}: its smallest plan holds {points[0].share:.2%} of the full cache, more than "
            f"{format_share(share)}; raise --mem, or search for it"
        )
    best = min(fitting, key=lambda point: (point.kl, point.bytes))
    return best, parse_policy(best.policy, where)
