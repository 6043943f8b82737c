"""Warnings about prompts: used twice, their scores flatter what was fitted to them; few of them say little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvplan.cli.console import warn

MIN_CONFIRMED = 10  # prompts; an interval over fewer is far off

if TYPE_CHECKING:
    from kvplan.calibrate.examples import Example
    from kvplan.policy.schema import Policy


def warn_of_calibration(examples: Sequence[Example], hashes: Iterable[str]) -> None:
    """Prompts of a search that calibrated its profile too.

    Args:
        hashes: The profile's.
    """
    from kvplan.calibrate.collect import prompt_hash

    known = set(hashes)
    if count := sum(prompt_hash(example) in known for example in examples):
        warn(
            f"{count} of {len(examples)} prompts calibrated the profile too, so the search fits them twice and its "
            "scores flatter it; give other prompts with --data"
        )


def warn_of_twins(examples: Sequence[Example], searched: Sequence[int], confirmed: Sequence[int]) -> None:
    """Prompts to confirm on that equal one to search on; their ids differ."""
    seen = {(examples[i].prompt_ids, examples[i].continuation_ids) for i in searched}
    if count := sum((examples[i].prompt_ids, examples[i].continuation_ids) in seen for i in confirmed):
        warn(
            f"{count} of {len(confirmed)} prompts to confirm on equal a prompt to search on, under another id, so the "
            "confirmed scores flatter; give each prompt once"
        )


def warn_of_found_on(examples: Sequence[Example], policies: Mapping[str, Policy]) -> None:
    """Prompts to judge policies on that these were calibrated or searched on."""
    from kvplan.calibrate.collect import prompt_hash
    from kvplan.calibrate.prompts import data_fingerprint
    from kvplan.search.seen import num_seen

    hashes, data = [prompt_hash(example) for example in examples], data_fingerprint(examples)
    for name, policy in policies.items():
        if count := num_seen(hashes, data, policy.provenance):
            warn(
                f"at least {count} of {len(examples)} prompts are among those that {name} was found on, so its scores "
                "flatter it; give others with --data"
            )


def warn_of_few(confirmed: int, max_prompts: int | None) -> None:
    """Of the prompts that the winner is chosen on.

    Args:
        max_prompts: The search's --max-prompts.
    """
    enough = 3 * MIN_CONFIRMED
    if confirmed < MIN_CONFIRMED:
        capped = max_prompts is not None and max_prompts < enough
        remedy = f"search with --max-prompts {enough}" if capped else f"give {enough} prompts or more with --data"
        warn(
            f"only {confirmed} prompts to confirm on (a third of all), so the winner's numbers and intervals mean "
            f"little; {remedy}"
        )
