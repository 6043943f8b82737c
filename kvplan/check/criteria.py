"""What a policy is held to: rows of results -> criteria and exact findings for the gate. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvplan.check.gate import BYTES, NATS, SHARE, Criterion, Finding, State
from kvplan.check.results import DataIdentity, ModelIdentity, PolicyResult, PromptRow, Results
from kvplan.errors import NotComparableError, ResultsError
from kvplan.units import BASIS_POINTS

# A task has few prompts, so it may lose more before that counts; still, no average hides a lost skill.
TASK_FACTOR = 8
# Nats a token on a prompt whose context is gone; the bundled model loses 0.4 on plain text and 1.2 on retrieval.
LOST_KL = 0.5
LOST_SCORE = 1.0
# The same plan gives the same numbers, up to rounding that differs between processors. With fewer prompts, harm to one
# in thirty would too often pass unseen.
REPRODUCED_PROMPTS = 96
REPRODUCED_SHARE = 0.1

Pair = tuple[PromptRow, PromptRow]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a policy may lose and hold; None: not asked.

    Attributes:
        max_kl_rise: Of the mean KL above the baseline's, nats.
        max_score_loss: Of the mean score below the baseline's; 0.05 is 5 points.
        max_kl: Of the mean KL from the full cache, nats.
        min_recovery: Score as a share of the full cache's.
        max_bytes: Held after the prompts, of a full cache's, in basis points.
    """

    max_kl_rise: float | None = None
    max_score_loss: float | None = None
    max_kl: float | None = None
    min_recovery: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """One number a prompt that should be low. `of` leaves out prompts that it says nothing about."""

    name: str
    of: Callable[[Sequence[Pair]], list[float]]
    limit: float
    lost: float
    unit: str
    relative: bool = False

    def over(self, pairs: Sequence[Pair], part: str | None = None, parts: int = 1) -> Criterion:
        """The criterion over all prompts, or over one of several parts of them."""
        return Criterion(
            name=self.name if part is None else f"{part}: {self.name}",
            losses=tuple(self.of(pairs)),
            limit=self.limit * (1 if part is None else TASK_FACTOR),
            lost=self.lost,
            share=1 / parts,
            unit=self.unit,
            part=part,
            relative=self.relative,
        )


def criteria(rows: Sequence[PromptRow], base: Sequence[PromptRow] | None, limits: Limits) -> list[Criterion]:
    """Mean losses over all prompts, then one floor for each task and each way of asking, where there are several.

    Args:
        base: The baseline's rows of the same prompts in the same order.
    """
    pairs: list[Pair] = list(zip(rows, rows if base is None else base, strict=True))
    losses = _losses(limits, base is not None)
    parts = {**_parts(pairs, lambda row: row.task), **_parts(pairs, _way)}
    floors = [(name, loss, part) for name, part in parts.items() if (loss := _floor(losses, part)) is not None]
    return [
        *(loss.over(pairs) for loss in losses),
        *(loss.over(part, name, len(floors)) for name, loss, part in floors),
    ]


def _losses(limits: Limits, has_base: bool) -> list[_Loss]:
    made = []
    if has_base and limits.max_kl_rise is not None:
        made.append(
            _Loss(
                name="KL rise",
                of=lambda pairs: [row.kl - base.kl for row, base in pairs],
                limit=limits.max_kl_rise,
                lost=LOST_KL,
                unit=NATS,
                relative=True,
            )
        )
    if has_base and limits.max_score_loss is not None:
        made.append(
            _Loss(
                name="score loss",
                of=_score_losses,
                limit=limits.max_score_loss,
                lost=LOST_SCORE,
                unit=SHARE,
                relative=True,
            )
        )
    if limits.max_kl is not None:
        made.append(
            _Loss(
                name="KL", of=lambda pairs: [row.kl for row, _ in pairs], limit=limits.max_kl, lost=LOST_KL, unit=NATS
            )
        )
    if limits.min_recovery is not None:
        allowed = 1 - limits.min_recovery
        made.append(
            _Loss(
                name="recovery loss",
                of=lambda pairs: _recovery_losses(pairs, allowed),
                limit=allowed,
                lost=LOST_SCORE,
                unit=SHARE,
            )
        )
    return made


def _score_losses(pairs: Sequence[Pair]) -> list[float]:
    return [base.score - row.score for row, base in pairs if row.score is not None and base.score is not None]


def _recovery_losses(pairs: Sequence[Pair], allowed: float) -> list[float]:
    """Their mean is 1 - recovery, and it is above `allowed` exactly when the recovery is too low.

    The ratio of two means has no losses of its own; each prompt's share of mean(full - score - allowed * full) has.
    """
    scored = [(r.score, r.full_score) for r, _ in pairs if r.score is not None and r.full_score is not None]
    mean = sum(full for _, full in scored) / len(scored) if scored else 0.0
    if not mean:
        return []
    return [(full - score - allowed * full) / mean + allowed for score, full in scored]


def _parts(pairs: Sequence[Pair], key: Callable[[PromptRow], str | None]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if (name := key(pair[0])) is not None:
            found.setdefault(name, []).append(pair)
    return found if len(found) > 1 else {}


def _way(row: PromptRow) -> str | None:
    if not row.questions:
        return None
    return "aware" if row.question_aware else "agnostic"


def _floor(losses: Sequence[_Loss], pairs: Sequence[Pair]) -> _Loss | None:
    """What a part is held to: its score where it has one, else its KL."""
    scores = [loss for loss in losses if loss.unit == SHARE and loss.of(pairs)]
    others = [loss for loss in losses if loss.unit != SHARE]
    return next(iter([*scores, *others]), None)


def without_scores(limits: Limits, base: Sequence[PromptRow] | None) -> Limits:
    """Where the baseline's prompts ask nothing, its score says nothing."""
    asked = base is None or any(row.score is not None for row in base)
    return limits if asked else replace(limits, max_score_loss=None)


def exact(rows: Sequence[PromptRow], base: Sequence[PromptRow] | None, limits: Limits) -> list[Finding]:
    """Bytes: integers, so above the limit by one is above it."""
    held, planned = sum(row.kv_bytes for row in rows), sum(row.planned_bytes for row in rows)
    full = sum(row.full_bytes for row in rows)
    made = [_bytes("bytes held", held, planned, any(row.kv_bytes > row.planned_bytes for row in rows))]
    if base is not None:
        before = sum(row.planned_bytes for row in base)
        made.append(_bytes("bytes planned", planned, before, planned > before))
    if limits.max_bytes is not None:
        most = limits.max_bytes * full
        above = held * BASIS_POINTS > most
        made.append(replace(_bytes("bytes of full cache's", held, most // BASIS_POINTS, above), full=full))
    return made


def _bytes(name: str, value: int, limit: int, above: bool) -> Finding:
    state = State.REGRESSION if above else State.PASS
    return Finding(name=name, state=state, prompts=0, value=value, low=value, high=value, limit=limit, unit=BYTES)


def reproduced(rows: Sequence[PromptRow], base: Sequence[PromptRow], limits: Limits, available: int) -> bool:
    """Whether every prompt got the baseline's numbers, but for rounding, and enough were asked.

    Args:
        available: Prompts that there are; where these are few, all of them are enough.
    """
    if limits.max_kl_rise is None or len(rows) < min(REPRODUCED_PROMPTS, available):
        return False
    near = limits.max_kl_rise * REPRODUCED_SHARE
    return all(a.score == b.score and abs(a.kl - b.kl) <= near for a, b in zip(rows, base, strict=True))


def baseline_policy(baseline: Results, name: str) -> PolicyResult:
    """The baseline's results of a policy: those of its name, or the only ones that there are.

    Raises:
        ResultsError: there are several, and none of that name.
    """
    others = [policy for policy in baseline.policies if policy is not baseline.full]
    named = [policy for policy in others if policy.name == name] or (others if len(others) == 1 else [])
    if not named:
        known = ", ".join(policy.name for policy in others) or "none"
        raise ResultsError(f"the baseline has no results of a policy '{name}' (there are: {known}); --update adds them")
    return named[0]


def check_comparable(model: ModelIdentity, data: DataIdentity, baseline: Results, where: str) -> None:
    """Raises: NotComparableError: the baseline is of another model, dtype or other prompts; it says which."""
    then, before = baseline.model, baseline.data
    compared = [
        ("model", (then.type, then.layers, then.fingerprint), (model.type, model.layers, model.fingerprint)),
        ("dtype", then.dtype, model.dtype),
        ("prompts", (before.prompts, before.fingerprint), (data.prompts, data.fingerprint)),
    ]
    problems = [f"{what} {_told(old)} there, {_told(new)} here" for what, old, new in compared if old != new]
    if problems:
        raise NotComparableError(f"{where}: not comparable: {'; '.join(problems)}; measure it anew with --update")


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
