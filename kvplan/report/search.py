"""What a search found: the finalists, the winner against the best recipe, and the same as plain data."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from kvplan.search.confirm import Finalist, SearchResult
from kvplan.units import format_bytes

_LABEL = 24


def summary(result: SearchResult) -> Text:
    """A line per finalist on the confirmation prompts, then what was gained and what is held."""
    text = Text(no_wrap=True)
    text.append(
        f"{'policy':{_LABEL}}{'trial':>6}{'KL search':>11}{'KL confirm':>12}  {'95 %':17}{'top-1':>7}\n", "bold"
    )
    for finalist in result.finalists:
        text.append(_line(finalist), "green" if finalist is result.winner else "")
    if result.gain is not None and result.recipe is not result.winner and result.recipe is not None:
        low, high = result.gain.low, result.gain.high
        sure = "" if low > 0 else "; the interval holds 0, so more prompts may say otherwise"
        label = result.recipe.trial.label
        text.append(f"\nKL below the best recipe ({label}) by {result.gain.mean:.4f} [{low:.4f}, {high:.4f}]{sure}")
    elif result.recipe is result.winner and result.recipe is not None:
        text.append(f"\na recipe won: {result.recipe.trial.label}")
    held = result.bytes
    text.append(
        f"\n{format_bytes(held.total)} of {format_bytes(held.full)} ({held.ratio:.2%}) "
        f"for a prompt of {result.context_tokens} tokens"
    )
    task = result.winner.scores.mean_task
    if task is not None:
        text.append(f"; {task:.1%} of the answers exact")
    if result.num_failed:
        text.append(
            f"\nnote: {result.num_failed} of {len(result.trials)} trials scored nan and were not used", "yellow"
        )
    return text


def _line(finalist: Finalist) -> str:
    row, interval = finalist.trial, finalist.interval
    label = row.label if len(row.label) < _LABEL else row.label[: _LABEL - 3] + ".."
    top1 = finalist.scores.mean_top1
    searched = f"{row.kl:.4f}" if row.is_valid else "-"
    span = f"[{interval.low:.4f}, {interval.high:.4f}]"
    return f"{label:{_LABEL}}{row.number:>6}{searched:>11}{finalist.kl:>12.4f}  {span:17}{top1:>7.1%}\n"


def as_data(result: SearchResult) -> dict[str, Any]:
    """For --json."""
    return {
        "winner": _finalist(result.winner),
        "finalists": [_finalist(finalist) for finalist in result.finalists],
        "recipe": _finalist(result.recipe) if result.recipe else None,
        "gain": [result.gain.mean, result.gain.low, result.gain.high] if result.gain else None,
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
    }


def _finalist(finalist: Finalist) -> dict[str, Any]:
    return {
        "trial": finalist.trial.number,
        "label": finalist.trial.label,
        "kl_search": finalist.trial.kl if finalist.trial.is_valid else None,
        "kl": finalist.kl,
        "kl_95": [finalist.interval.low, finalist.interval.high],
        "top1": finalist.scores.mean_top1,
        "task": finalist.scores.mean_task,
        "num_prompts": len(finalist.scores),
    }
