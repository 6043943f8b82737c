"""What a search found: the finalists, the winner against the best recipe, and the same as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from kvplan.report.tables import few_note, interval
from kvplan.search.answer import Answer
from kvplan.search.compile import KNAPSACK, Params
from kvplan.search.confirm import NO_TRIAL, SEARCHED, Finalist, SearchResult, TrialRow
from kvplan.stats import MIN_PROMPTS, bootstrap
from kvplan.units import format_bytes

WIDTH = 80
LIVE_ROWS = 5
_LABEL = 27
_SHORT = 3  # letters of an evictor's name where the whole name does not fit


def summary(result: SearchResult) -> Text:
    """A line per finalist on the confirmation prompts, then what was gained and what is held."""
    text = Text(no_wrap=True)
    text.append(
        f"{'policy':{_LABEL}}{'trial':>5}{'KL search':>10}{'KL confirm':>11}  {'95 %':17}{'top-1':>7}\n", "bold"
    )
    for finalist in result.finalists:
        text.append(_line(finalist), "green" if finalist is result.winner else "")
    for told in _captions(result):
        text.append(textwrap.fill(told, WIDTH, subsequent_indent="  ") + "\n", "dim")
    recipe, gain, held = result.recipe, result.gain, result.bytes
    notes = []
    if recipe is not None and recipe is result.winner:
        notes.append(f"a recipe won: {recipe.trial.label}")
    elif recipe is not None and gain is not None:
        count = len(result.winner.scores)
        unsure = gain.low <= 0 and count >= MIN_PROMPTS
        sure = "; the interval holds 0, so more prompts may say otherwise" if unsure else ""
        span = f"{gain.mean:.4f} {interval(gain, count)}"
        notes.append(f"KL below the best recipe ({recipe.trial.label}) by {span}{sure}")
    size = f"{format_bytes(held.total)} of {format_bytes(held.full)} ({held.ratio:.2%})"
    task = result.winner.scores.mean_task
    exact = "" if task is None else f"; {task:.1%} of the answers exact"
    notes.append(f"{size} for a prompt of {result.context_tokens} tokens{exact}")
    text.append("".join("\n" + textwrap.fill(told, WIDTH, subsequent_indent="  ") for told in notes))
    lacked = result.num_out_of_memory
    for count, what in ((result.num_failed - lacked, "scored nan"), (lacked, "ran out of memory")):
        if count:
            text.append(f"\nnote: {count} of {len(result.trials)} trials {what} and were not used", "yellow")
    return text


def distance(found: Answer) -> str:
    """How far off an answer without trials may be."""
    kl = found.result.winner.kl
    if found.roomier is None or found.gap is None:
        told = f"No plan of the study holds more bytes, so a search of its own could gain up to the whole KL, {kl:.4f}."
    else:
        gap = found.gap
        told = (
            f"Not searched at this target: a search of its own should gain at most {max(gap.mean, 0.0):.4f} "
            f"{interval(gap, len(found.roomier.scores))} in KL, which is what the study's best plan with more bytes "
            f"({name(found.roomier.trial)}, KL {found.roomier.kl:.4f}) is better by."
        )
    return textwrap.fill(told, WIDTH, subsequent_indent="  ")


def trial_line(row: TrialRow, held: float, is_best: bool) -> str:
    """One trial for the log: its number, score, share of the full cache (0 to 1) and what was tried."""
    nothing = "out of memory, skipped" if row.out_of_memory else "no score"
    score = f"KL {row.kl:.4f}" if row.is_valid else nothing
    task = None if row.scores is None else row.scores.mean_task
    exact = "" if task is None else f", {task:.0%} exact"
    best = " (best so far)" if is_best else ""
    return f"trial {row.number:>3}: {score}{exact}, {held:.1%} of full, {_whole_name(row)}{best}"


def live_table(rows: Sequence[TrialRow], held: Callable[[TrialRow], float], seed: int = 0) -> Table:
    """The best trials so far on the search prompts, with bytes and interval, for a terminal.

    Args:
        held: Share of the full cache that a trial's policy holds, 0 to 1.
        seed: Of the bootstrap.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("best so far", "trial", "KL", "95 %", "of full"):
        table.add_column(heading, justify="left" if heading in ("best so far", "95 %") else "right")
    for row in sorted((row for row in rows if row.is_valid), key=lambda row: row.rank)[:LIVE_ROWS]:
        assert row.scores is not None
        span = bootstrap(row.scores.kl, seed=seed, resamples=200)
        bounds = interval(span, len(row.scores))
        table.add_row(name(row), str(row.number), f"{row.kl:.4f}", bounds, f"{held(row):.1%}")
    return table


def _line(finalist: Finalist) -> str:
    row, scores = finalist.trial, finalist.scores
    top1 = scores.mean_top1
    searched = f"{row.kl:.4f}" if row.is_valid else "-"
    span = interval(finalist.interval, len(scores))
    number = "-" if row.number == NO_TRIAL else row.number
    return f"{name(row):{_LABEL}}{number:>5}{searched:>10}{finalist.kl:>11.4f}  {span:17}{top1:>7.1%}\n"


def _whole_name(row: TrialRow) -> str:
    return row.label if row.label != SEARCHED else _described(row.params, row.params.evictors)


def name(row: TrialRow, width: int = _LABEL) -> str:
    """What the table calls a trial: a warm start's label, or 'knapsack tova/knorm': allocator and evictor per group."""
    if row.label != SEARCHED:
        return _clip(row.label, width)
    whole = _described(row.params, row.params.evictors)
    short = _described(row.params, [e[:_SHORT] for e in row.params.evictors])
    return whole if len(whole) <= width else _clip(short, width)


def _described(params: Params, evictors: Sequence[str]) -> str:
    """Groups that all have one evictor are told once."""
    chosen = evictors[:1] if len(set(params.evictors)) == 1 else evictors
    shared = f" +{params.shared_layers}" if params.shared_layers else ""
    return f"{params.split} {'/'.join(chosen)}{shared}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _captions(result: SearchResult) -> list[str]:
    """How the winner was chosen, and how to read the names."""
    count, told = len(result.winner.scores), []
    if len(result.finalists) > 1:
        told.append(f"winner: {result.goal} on the {count} confirmation prompts (first line){_marks(result)}")
    told += name_notes([finalist.trial for finalist in result.finalists])
    if any(finalist.trial.number == NO_TRIAL for finalist in result.finalists):
        told.append("trial -: made for this target; no trial of the study had it.")
    return told + [line.replace("-:", "95 % -:", 1) for line in few_note(count)]


def name_notes(rows: Sequence[TrialRow]) -> list[str]:
    """What the word is that most plans begin with."""
    if any(row.label.startswith(KNAPSACK) or row.params.split == KNAPSACK for row in rows):
        return [f"{KNAPSACK}: each layer's slots and methods as the profile predicts them best"]
    return []


def _marks(result: SearchResult) -> str:
    told = ""
    found = [f.trial.params for f in result.finalists if f.trial.label == SEARCHED]
    if any(len(set(params.evictors)) > 1 for params in found):
        told += "; a/b: evictors of the layer groups, from the least sensitive"
    if any(params.shared_layers for params in found):
        told += "; +n: n layers share a cache"
    return told


def as_data(result: SearchResult) -> dict[str, Any]:
    """For --json."""
    return {
        "winner": _finalist(result.winner),
        "finalists": [_finalist(finalist) for finalist in result.finalists],
        "recipe": _finalist(result.recipe) if result.recipe else None,
        "gain": result.gain.stated(len(result.winner.scores)) if result.gain else None,
        "bytes": {"prompt_tokens": result.context_tokens, "planned": result.bytes.total, "full": result.bytes.full},
        "trials": [
            {
                "trial": row.number,
                "label": row.label,
                "kl": row.kl if row.is_valid else None,
                "task": row.scores.mean_task if row.scores else None,
                "params": {
                    "split": row.params.split,
                    "scales": list(row.params.scales),
                    "evictors": list(row.params.evictors),
                    "shared_layers": row.params.shared_layers,
                },
            }
            for row in result.trials
        ],
        "resumed_trials": result.resumed,
        "failed_trials": result.num_failed,
        "out_of_memory_trials": result.num_out_of_memory,
    }


def _finalist(finalist: Finalist) -> dict[str, Any]:
    return {
        "trial": None if finalist.trial.number == NO_TRIAL else finalist.trial.number,
        "label": finalist.trial.label,
        "kl_search": finalist.trial.kl if finalist.trial.is_valid else None,
        "kl": finalist.kl,
        "kl_95": finalist.interval.bounds(len(finalist.scores)),
        "top1": finalist.scores.mean_top1,
        "task": finalist.scores.mean_task,
        "num_prompts": len(finalist.scores),
    }
