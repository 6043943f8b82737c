"""Samplers: who chooses the next trial."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvplan.errors import StudyError

if TYPE_CHECKING:
    import optuna

GP_TRIALS = 250  # a Gaussian process costs the cube of the trials; beyond, TPE
NAMES = ("auto", "gp", "tpe", "random")


def check_name(name: str) -> None:
    """Raises StudyError for an unknown name."""
    if name not in NAMES:
        raise StudyError(f"--sampler {name}: no such sampler; choose among: {', '.join(NAMES)}")


def make_sampler(
    name: str, trials: int, seed: int, started: int | str, objectives: int = 1
) -> optuna.samplers.BaseSampler:
    """A seeded sampler.

    Args:
        name: `gp`, `tpe`, `random`, or `auto`: `gp` as long as the trials are few and there is one objective.
        trials: Of the study in all.
        seed: Of the search.
        started: Trials already in the study (and who draws, where several do): a resumed study must not draw again what
            its first run drew.
        objectives: Of the study.

    Raises:
        StudyError: an unknown name.
    """
    import optuna

    check_name(name)
    own = int(hashlib.sha256(f"{seed}/{started}".encode()).hexdigest()[:8], 16)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=own)
    if name == "tpe" or (name == "auto" and (trials > GP_TRIALS or objectives > 1)):
        return optuna.samplers.TPESampler(seed=own)
    return optuna.samplers.GPSampler(seed=own, n_startup_trials=8, warn_independent_sampling=False)
