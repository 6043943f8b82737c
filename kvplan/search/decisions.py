"""Decisions: which kinds of decision a search makes, and which it leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplan.errors import StudyError

KINDS = ("budget", "evictor", "codec", "sharing", "heads", "channels", "params")
BASIC = ("budget", "evictor", "codec", "sharing")
# More dimensions pay off only with the trials to explore them.
PER_GROUP_FROM_TRIALS = 130
FROM_TRIALS = {"heads": 100, "channels": 100, "params": 150}


@dataclass(frozen=True)
class Decisions:
    """What a search decides.

    Args:
        kinds: Of `KINDS`. `budget`: slots per layer group; `evictor`: which evictor per group; `codec`: how keys and
            values are stored; `sharing`: how many layers share; `heads`: a split over KV heads; `channels`: dropped key
            channels; `params`: the evictors' own parameters.
        halves: Choose one method for the less sensitive half of the groups and one for the other, not one per group.
    """

    kinds: tuple[str, ...] = BASIC
    halves: bool = True

    def __contains__(self, kind: str) -> bool:
        return kind in self.kinds


def decisions(trials: int, only: Sequence[str] = (), without: Sequence[str] = ()) -> Decisions:
    """What `--only` and `--without` leave; by default what so many trials can explore.

    Raises:
        StudyError: an unknown kind, or nothing is left to decide.
    """
    for option, names in (("--only", only), ("--without", without)):
        if unknown := [name for name in names if name not in KINDS]:
            raise StudyError(f"{option} {unknown[0]}: no such decision; choose among: {', '.join(KINDS)}")
    chosen = only or [kind for kind in KINDS if kind in BASIC or trials >= FROM_TRIALS[kind]]
    kinds = tuple(kind for kind in KINDS if kind in chosen and kind not in without)
    if not kinds:
        raise StudyError("--only and --without leave nothing to decide")
    return Decisions(kinds, halves=trials < PER_GROUP_FROM_TRIALS)


def names(text: Sequence[str] | None) -> list[str]:
    """From options that may be repeated, each a comma-separated list."""
    return [name.strip() for part in text or () for name in part.split(",") if name.strip()]
