"""Means and paired 95 % intervals over the rows of a results file. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvplan.check.results import PromptRow, Results
from kvplan.stats import Interval, bootstrap, bootstrap_ratio

AGNOSTIC, AWARE, UNASKED = "question-agnostic", "question-aware", "nothing asked"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One policy on some prompts, all of them asked in the same way.

    Attributes:
        prompts, scored: How many, and how many of them have a score.
        kl, top1: Means over prompts.
        perplexity: Over all tokens of the continuations.
        score: Mean over the scored prompts, or None where there is none.
        score_change: Paired difference in score from the full cache.
        recovery: Score as a share of the full cache's, or None where that is 0.
        planned_bytes, kv_bytes, full_bytes: After the prompts, summed over them.
    """

    policy: str
    prompts: int
    scored: int
    kl: Interval
    top1: Interval
    perplexity: float
    score: Interval | None
    score_change: Interval | None
    recovery: Interval | None
    planned_bytes: int
    kv_bytes: int
    full_bytes: int

    @property
    def share(self) -> float:
        """Held, of the full cache's bytes."""
        return self.kv_bytes / self.full_bytes

    def to_json(self) -> dict[str, Any]:
        """Intervals as mean, low and high; the last two are None where there are too few prompts."""
        told = {**asdict(self), "share": self.share}
        for name, found in vars(self).items():
            if isinstance(found, Interval):
                few = self.scored if name in ("score", "score_change", "recovery") else self.prompts
                told[name] = dict(zip(("mean", "low", "high"), found.stated(few), strict=True))
        return told


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one policy differs from a reference policy, prompt by prompt; above 0: more KL, or a higher score."""

    policy: str
    reference: str
    kl: Interval
    score: Interval | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts that belong together, as indices of the rows of every policy."""

    name: str
    rows: tuple[int, ...]


def summarise(policy: str, rows: Sequence[PromptRow], *, seed: int = 0) -> Summary:
    """The rows of one policy.

    Raises:
        AssertionError: ways of asking are mixed; they are never averaged together.
    """
    assert len(set(map(way, rows))) == 1, "one way of asking at a time"
    scored = [(row.score, row.full_score) for row in rows if row.score is not None and row.full_score is not None]
    scores, full = [s for s, _ in scored], [f for _, f in scored]
    tokens = sum(row.tokens for row in rows)
    return Summary(
        policy=policy,
        prompts=len(rows),
        scored=len(scored),
        kl=bootstrap([row.kl for row in rows], seed=seed),
        top1=bootstrap([row.top1 for row in rows], seed=seed),
        perplexity=_exp(sum(row.nll * row.tokens for row in rows) / tokens),
        score=bootstrap(scores, seed=seed) if scored else None,
        score_change=bootstrap([s - f for s, f in scored], seed=seed) if scored else None,
        recovery=bootstrap_ratio(scores, full, seed=seed) if scored else None,
        planned_bytes=sum(row.planned_bytes for row in rows),
        kv_bytes=sum(row.kv_bytes for row in rows),
        full_bytes=sum(row.full_bytes for row in rows),
    )


def difference(
    policy: str, rows: Sequence[PromptRow], reference: str, base: Sequence[PromptRow], *, seed: int = 0
) -> Difference:
    """Paired over prompts; `rows` and `base` are of the same prompts in the same order."""
    pairs = list(zip(rows, base, strict=True))
    scores = [a.score - b.score for a, b in pairs if a.score is not None and b.score is not None]
    return Difference(
        policy=policy,
        reference=reference,
        kl=bootstrap([a.kl - b.kl for a, b in pairs], seed=seed),
        score=bootstrap(scores, seed=seed) if scores else None,
    )


def way(row: PromptRow) -> str:
    """How a prompt asks."""
    if not row.questions:
        return UNASKED
    return AWARE if row.question_aware else AGNOSTIC


def by_question(results: Results) -> list[Group]:
    """Question-agnostic prompts, question-aware ones and texts that only go on; a kind without prompts is left out."""
    found = _grouped((way(row), i) for i, row in enumerate(results.policies[0].rows))
    return sorted(found, key=lambda group: (AGNOSTIC, AWARE, UNASKED).index(group.name))


def by_task(results: Results, group: Group) -> list[Group]:
    return _grouped((results.policies[0].rows[i].task, i) for i in group.rows)


def by_context(results: Results, group: Group) -> list[Group]:
    """By context length, to the next power of two: `<=4k` holds 2049 to 4096 tokens."""
    tokens = {i: results.policies[0].rows[i].context_tokens for i in group.rows}
    ordered = sorted(group.rows, key=lambda i: tokens[i])
    return _grouped(((length_label(tokens[i]), i) for i in ordered), keep_order=True)


def length_label(tokens: int) -> str:
    """749 -> '<=1k'."""
    top = 1 << max(tokens - 1, 1).bit_length()
    return f"<={top // 1024}k" if top >= 1024 else f"<={top}"


def select(rows: Sequence[PromptRow], group: Group) -> list[PromptRow]:
    return [rows[i] for i in group.rows]


def summaries(results: Results, group: Group) -> list[Summary]:
    """Every policy on the group's prompts, in the file's order."""
    return [summarise(p.name, select(p.rows, group), seed=results.seed) for p in results.policies]


def _grouped(named: Iterable[tuple[str, int]], *, keep_order: bool = False) -> list[Group]:
    found: dict[str, list[int]] = {}
    for name, index in named:
        found.setdefault(name, []).append(index)
    names = list(found) if keep_order else sorted(found)
    return [Group(name=name, rows=tuple(found[name])) for name in names]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
