"""What `kvplan eval` prints: each way of asking apart, then what the policies cost. 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from kvplan.check.results import FULL_CACHE, PolicyResult, Results
from kvplan.check.scorers import meaning
from kvplan.check.summary import (
    AGNOSTIC,
    AWARE,
    UNASKED,
    Group,
    Summary,
    by_context,
    by_question,
    by_task,
    difference,
    select,
    summaries,
    summarise,
)
from kvplan.report.tables import nats, number_table
from kvplan.stats import MIN_PROMPTS, Interval
from kvplan.units import format_bytes

WIDTH = 80
CELL_WIDTH = 8  # of a policy's column in a breakdown, the gap included
QUALITY = ("policy", "bytes", "KL", "top-1", "ppl", "score", "recovery [95%]")
AGAINST_FULL = ("policy", "KL [95%]", "score - full [95%]")
COST = ("policy", "planned", "held", "peak", "full", "tok/s", "speed")
OWN_POOL = "kvplan, full"  # as kvplan bench calls it; a full cache that is faster than "full cache" confuses
LOW_SCORE = 0.2  # of the full cache; below, what is lost of it is hardly measured
WAYS = {
    AGNOSTIC: "question-agnostic: the cache is cut before the question is known.",
    AWARE: "question-aware: the question is in what is cut.",
    UNASKED: "nothing asked: a text goes on (a score: beside what the full cache writes).",
}


def tables(results: Results) -> list[Table]:
    """Every table, in the order in which they are read."""
    made: list[Table] = []
    names = _names(results)
    for group in by_question(results):
        found = summaries(results, group)
        scored = any(row.score is not None for row in found)
        title = f"{group.name}, {_count(group)}"
        made.append(_table(QUALITY, map(_quality, names, found), title, scored))
        if len(found) > 1:
            rows = map(_against_full, names[1:], found[1:])
            made.append(_table(AGAINST_FULL, rows, "paired with the full cache", scored))
        if len(found) > 2:
            made.append(_against_first(results, group, scored))
        for what, parts in (("task", by_task(results, group)), ("context", by_context(results, group))):
            if len(parts) > 1:
                made += breakdown(results, parts, what, group.name)
    if any(policy.cost for policy in results.policies):
        made.append(cost(results))
    return made


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], title: str, scored: bool) -> Table:
    """Without the columns of scores where nothing is scored; they are the last."""
    shown = [i for i, header in enumerate(headers) if scored or not header.startswith(("score", "recovery"))]
    return number_table([headers[i] for i in shown], [[row[i] for i in shown] for row in rows], title, width=WIDTH)


def _count(group: Group) -> str:
    return f"{len(group.rows)} prompt{'s' if len(group.rows) > 1 else ''}"


def _quality(name: str, row: Summary) -> tuple[str, ...]:
    full = row.policy == FULL_CACHE
    return (
        name,
        f"{row.share:.1%}",
        "-" if full else nats(row.kl.mean),
        f"{row.top1.mean:.3f}",
        _perplexity(row.perplexity),
        "-" if row.score is None else f"{row.score.mean:.3f}",
        "-" if full or row.recovery is None else _percent(row.recovery, row.scored),
    )


def _perplexity(value: float) -> str:
    if value >= 1e4:
        return f"{value:.0e}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _against_full(name: str, row: Summary) -> tuple[str, ...]:
    return (
        name,
        _spread(nats, row.kl, row.prompts),
        "-" if row.score_change is None else _spread(_plus, row.score_change, row.scored),
    )


def _against_first(results: Results, group: Group, scored: bool) -> Table:
    """Every other policy against the first one that is not the full cache."""
    _, first, *others = results.policies
    base = select(first.rows, group)
    found = [
        difference(policy.name, select(policy.rows, group), first.name, base, seed=results.seed) for policy in others
    ]
    headers = ("policy", "KL - (1) [95%]", "score - (1) [95%]")
    rows = [
        (
            name,
            _spread(_plus_nats, one.kl, len(group.rows)),
            "-" if one.score is None else _spread(_plus, one.score, _scored(first, group)),
        )
        for name, one in zip(_names(results)[2:], found, strict=True)
    ]
    return _table(headers, rows, f"paired with {_names(results)[1]}", scored)


def breakdown(results: Results, parts: Sequence[Group], what: str, group: str) -> list[Table]:
    """A table of KL and, where something is scored, one of scores: a line a part, a column a policy."""
    rows = [(part, summaries(results, part)) for part in parts]
    width = max(len(part.name) for part in parts)
    per_table = max(1, (WIDTH - max(width, len(what)) - 7) // CELL_WIDTH)
    numbers = range(len(results.policies))
    made = []
    cells: list[tuple[str, Callable[[Summary], str]]] = [("KL", lambda s: nats(s.kl.mean))]
    if any(one.score is not None for _, found in rows for one in found):
        cells.insert(0, ("score", lambda s: "-" if s.score is None else f"{s.score.mean:.3f}"))
    for title, cell in cells:
        shown = [i for i in numbers if title != "KL" or results.policies[i].name != FULL_CACHE]
        for start in range(0, len(shown), per_table):
            columns = shown[start : start + per_table]
            lines = [(part.name, str(len(part.rows)), *(cell(found[i]) for i in columns)) for part, found in rows]
            headers = (what, "n", *(_key(i) for i in columns))
            made.append(number_table(headers, lines, f"{title} by {what}, {group}"))
    return made


def _key(index: int) -> str:
    return f"({index})" if index else "full"


def _names(results: Results) -> list[str]:
    """`full cache`, then `(1) name`: the number stands for the policy in the breakdowns."""
    return [f"{_key(i)} {p.name}" if i else p.name for i, p in enumerate(results.policies)]


def cost(results: Results) -> Table:
    rows, tokens = [], 0
    for name, policy in zip(_names(results), results.policies, strict=True):
        one = policy.cost
        if one is None:
            continue
        tokens = one.context_tokens
        rows.append(
            (
                OWN_POOL if policy.name == FULL_CACHE else name,
                *(_size(n) for n in (one.planned_bytes, one.kv_bytes, one.peak_bytes)),
                f"{one.kv_bytes / one.full_bytes:.1%}",
                "-" if one.tokens_per_second is None else f"{one.tokens_per_second[0]:.1f}",
                "-" if one.speedup is None else f"{one.speedup[0]:.2f}x",
            )
        )
    return number_table(COST, rows, f"the KV cache of the longest prompt, {tokens} tokens", width=WIDTH)


def notes(results: Results) -> list[str]:
    """What the columns mean, in lines of at most 80 columns; only those that are shown."""
    rows, groups = results.full.rows, by_question(results)
    told = [
        "KL: nats from the full cache's next tokens, teacher-forced. ppl: perplexity.",
        "bytes: held after the prompts, of the full cache's. [..]: 95% bootstrap, paired.",
        *(WAYS[group.name] for group in groups),
        *(
            [f"[-]: fewer than {MIN_PROMPTS} prompts, too few for an interval."]
            if any(_few(results, group) for group in groups)
            else []
        ),
    ]
    judges = sorted({row.scorer for row in rows if row.scorer is not None})
    if judges:
        told.append("recovery: score, 0 to 1, as a share of the full cache's score. Scores:")
        told += [f"  {judge}: {meaning(judge)}" for judge in judges]
    for group in groups:
        score = summarise(FULL_CACHE, select(rows, group)).score
        if score is not None and score.mean < LOW_SCORE:
            told.append(f"The full cache scores {score.mean:.3f} ({group.name}): recovery says little there.")
    if any(policy.cost and policy.cost.speedup for policy in results.policies):
        told += [
            "speed: decoding beside transformers' full cache (1x), medians.",
            f"{OWN_POOL}: every token, in kvplan's own pool instead of transformers' cache.",
        ]
    return told


def _few(results: Results, group: Group) -> bool:
    """Whether some interval of the group is left out."""
    counts = len(group.rows), _scored(results.full, group)
    return any(0 < count < MIN_PROMPTS for count in counts)


def as_data(results: Results) -> dict[str, Any]:
    """The summaries as plain data: what the tables say, without the rows of each prompt."""

    def of(group: Group) -> list[dict[str, Any]]:
        return [summary.to_json() for summary in summaries(results, group)]

    told = results.to_json()
    return {
        **{name: told[name] for name in ("tool", "model", "data", "seed", "device", "settings")},
        "policies": [
            {"name": p.name, "source": p.source, "fingerprint": p.fingerprint, "cost": data["cost"]}
            for p, data in zip(results.policies, told["policies"], strict=True)
        ],
        "groups": [
            {
                "question": group.name,
                "prompts": len(group.rows),
                "policies": of(group),
                "tasks": {part.name: of(part) for part in by_task(results, group)},
                "contexts": {part.name: of(part) for part in by_context(results, group)},
            }
            for group in by_question(results)
        ],
    }


def _size(count: int) -> str:
    """Three digits or four: `981KiB`, `1.53MiB`."""
    number, unit = format_bytes(count).split()
    return f"{float(number):.{0 if float(number) >= 100 else 1 if float(number) >= 10 else 2}f}{unit}"


def _scored(policy: PolicyResult, group: Group) -> int:
    return sum(row.score is not None for row in select(policy.rows, group))


def _plus(value: float) -> str:
    return f"{value:+.3f}"


def _plus_nats(value: float) -> str:
    told = nats(value)
    return told if told.startswith("-") else f"+{told}"


def _spread(told: Callable[[float], str], found: Interval, prompts: int) -> str:
    """A mean with its interval, or with a dash where so few prompts have none that says anything."""
    bounds = "-" if prompts < MIN_PROMPTS else f"{told(found.low)}, {told(found.high)}"
    return f"{told(found.mean)} [{bounds}]"


def _percent(found: Interval, prompts: int) -> str:
    bounds = "-" if prompts < MIN_PROMPTS else f"{found.low * 100:.0f}, {found.high * 100:.0f}"
    return f"{found.mean:.0%} [{bounds}]"
