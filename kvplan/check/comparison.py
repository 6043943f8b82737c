"""Policies side by side with the full cache, on the same prompts and, for the recipes, at the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvplan.check.scoring import Measured, Scorer
from kvplan.policy.schema import Policy
from kvplan.stats import Interval, PromptScores, bootstrap


@dataclass(frozen=True)
class Row:
    """One policy's result.

    Attributes:
        kv_bytes: Storage bytes that the caches held after the prompts, summed over prompts.
        full_kv_bytes: What full caches hold for the same prompts.
        worse_by: Paired difference in KL to the reference row (positive: worse), or None for the full cache and the
            reference itself.
    """

    name: str
    kv_bytes: int
    full_kv_bytes: int
    scores: PromptScores
    worse_by: Interval | None

    @property
    def share(self) -> float:
        return self.kv_bytes / self.full_kv_bytes


def compare(
    scorer: Scorer,
    policies: Mapping[str, Policy],
    reference: str,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score every policy; `reference` names the one that the others are compared with, prompt by prompt."""
    measured: dict[str, Measured] = {}
    for name, policy in policies.items():
        measured[name] = scorer.measure(policy)
        if progress is not None:
            progress(name)
    base = measured[reference].scores.kl
    rows = []
    for name, found in measured.items():
        is_full = all(layer.slots.is_full and layer.shares is None for layer in policies[name].layers)
        differences = [a - b for a, b in zip(found.scores.kl, base, strict=True)]
        worse = None if is_full or name == reference else bootstrap(differences, seed=seed)
        rows.append(Row(name, found.kv_bytes, found.full_kv_bytes, found.scores, worse))
    return rows
