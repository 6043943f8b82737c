"""What `kvplan check` says: a verdict line and a table, the same as markdown, JUnit XML and plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from rich.table import Table

from kvplan.check.adaptive import Outcome
from kvplan.check.gate import BYTES, NATS, RATIO, SHARE, Finding, State, worst
from kvplan.check.results import PolicyResult, Results
from kvplan.report.tables import nats, number_table
from kvplan.units import format_bytes

HEADERS = ("criterion", "n", "found", "interval", "at most", "verdict")
FORMAT_VERSION = 1
MOST_NAMES = 3  # in a verdict line
MEANINGS = (
    ("KL rise", "KL from the full cache, above the baseline's; nats a token."),
    ("score loss", "score below the baseline's."),
    ("KL", "from the full cache; nats a token."),
    ("recovery loss", "1 - score / the full cache's score."),
    ("aware", "of the prompts that held the question when they were compressed; agnostic: of the others."),
    ("unchanged", "the same plan, and on every prompt the baseline's numbers; no interval is needed."),
    ("slowdown", "seconds a token, of transformers' full cache's."),
)


def verdict(outcome: Outcome) -> str:
    """One line: the verdict, on how many prompts, and why."""
    seen = f"{outcome.prompts} of {outcome.available} prompts"
    return f"{outcome.policy}: {outcome.state} after {seen}: {_reason(outcome)}"


def _reason(outcome: Outcome) -> str:
    if outcome.broken:
        return outcome.broken
    decisive = [f for f in outcome.findings if f.state is outcome.state]
    if outcome.state is State.PASS:
        why = "the baseline's numbers again" if outcome.reproduced else "all within the limits"
        harmed = worst_part(outcome)
        return why if harmed is None or outcome.reproduced else f"{why}; worst of the parts is {_told(harmed)}"
    if any(unanswered(f) for f in decisive):
        return (
            "no score to judge: the prompts ask nothing, or nothing that the full cache answers; "
            "give --max-kl X --min-recovery 0, or --baseline"
        )
    first, *others = decisive
    more = f"; also {', '.join(f.name for f in others[:MOST_NAMES])}" if others else ""
    more += f" and {len(others) - MOST_NAMES} more" if len(others) > MOST_NAMES else ""
    if outcome.state is State.INCONCLUSIVE:
        more += "; more prompts would tell"
    return f"{_told(first)}{more}"


def unanswered(finding: Finding) -> bool:
    """Of a score, where no prompt had one: more prompts of the kind would not tell either."""
    return finding.state is State.INCONCLUSIVE and finding.unit == SHARE and not finding.prompts


def worst_part(outcome: Outcome) -> Finding | None:
    """The task or way of asking that is nearest to its limit, or furthest beyond it."""
    parts = [f for f in outcome.findings if f.part is not None]
    return max(parts, key=lambda f: f.value / f.limit if f.limit else math.inf * f.value, default=None)


def _told(finding: Finding) -> str:
    value, limit = number(finding.value, finding.unit), number(finding.limit, finding.unit)
    if finding.full is not None:
        value += f" ({finding.value / finding.full:.1%} of full)"
        limit += f" ({finding.limit / finding.full:.1%})"
    interval = _interval(finding)
    return f"{finding.name} {value}{f' {interval}' if interval else ''}, at most {limit}"


def table(outcome: Outcome) -> Table:
    """Fits 80 columns unless the names of tasks are long."""
    return number_table(HEADERS, map(cells, outcome.findings), outcome.policy)


def cells(finding: Finding) -> tuple[str, ...]:
    return (
        finding.name,
        str(finding.prompts) if finding.prompts else "-",
        _short(finding.value, finding.unit),
        _interval(finding) or ("exact" if finding.full is None else f"{finding.value / finding.full:.2%} of full"),
        _short(finding.limit, finding.unit) if finding.full is None else f"{finding.limit / finding.full:.2%}",
        finding.state.value,
    )


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What the shown criteria mean, a line each."""
    names = [finding.name for outcome in outcomes for finding in outcome.findings]
    shown = {word for name in names for word in name.split(": ")}
    if any(finding.unchanged for outcome in outcomes for finding in outcome.findings):
        shown.add("unchanged")
    told = [f"{name}: {meaning}" for name, meaning in MEANINGS if name in shown]
    for outcome in outcomes:
        if outcome.state is not State.PASS and outcome.harmed:
            prompts = ", ".join(f"{name} {number(loss, NATS)}" for name, loss in outcome.harmed)
            told.append(f"most harmed in {outcome.policy}, by KL: {prompts}")
    return told


def number(value: float, unit: str) -> str:
    """A criterion's number as text."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if unit == BYTES:
        return f"{value:,.0f}"
    if unit == RATIO:
        return f"{value:.2f}x"
    if unit == NATS:
        return nats(value)
    return f"{value:.1%}"


def _short(value: float, unit: str) -> str:
    return format_bytes(value) if unit == BYTES else number(value, unit)


def _interval(finding: Finding) -> str:
    if finding.unit == BYTES:
        return ""
    if finding.unchanged:
        return "unchanged"
    low, high = finding.low, finding.high
    if finding.unit == SHARE:  # no score is lost more than whole
        low, high = max(low, -1.0), min(high, 1.0)
    return f"[{number(low, finding.unit)}, {number(high, finding.unit)}]"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """For the summary of a job: the verdicts, then each table."""
    blocks = [f"### kvplan check: {worst(o.state for o in outcomes)}\n"]
    blocks += [f"- **{_escaped(verdict(outcome))}**" for outcome in outcomes]
    for outcome in outcomes:
        rows = [HEADERS, ("---", *["---:"] * (len(HEADERS) - 1)), *map(cells, outcome.findings)]
        lines = "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in rows)
        blocks.append(f"\n<details><summary>{_escaped(outcome.policy)}</summary>\n\n{lines}\n\n</details>")
    return "\n".join([*blocks, "", *(_escaped(line) + "  " for line in notes(outcomes))]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def junit(outcomes: Sequence[Outcome]) -> str:
    """A suite a policy, a case a criterion: a regression is a failure, what is open an error."""
    top = ElementTree.Element("testsuites", name="kvplan check")
    for outcome in outcomes:
        states = [f.state for f in outcome.findings] or [outcome.state]
        suite = ElementTree.SubElement(
            top,
            "testsuite",
            name=outcome.policy,
            tests=str(len(states)),
            failures=str(states.count(State.REGRESSION)),
            errors=str(states.count(State.INCONCLUSIVE)),
            skipped="0",
        )
        for finding in outcome.findings:
            _case(suite, outcome, finding.name, finding.state, _told(finding))
        if not outcome.findings:
            _case(suite, outcome, "bytes held", outcome.state, outcome.broken)
    ElementTree.indent(top)
    return ElementTree.tostring(top, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, outcome: Outcome, name: str, state: State, told: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"kvplan.{outcome.policy}", name=name)
    if state is not State.PASS:
        kind = "failure" if state is State.REGRESSION else "error"
        ElementTree.SubElement(case, kind, type=state.value, message=told).text = verdict(outcome)


def as_data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """As JSON can hold it: a bound that is not finite is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "kvplan_check": FORMAT_VERSION,
        "verdict": worst(o.state for o in outcomes),
        "policies": [plain(asdict(o)) | {"told": verdict(o)} for o in outcomes],
    }


def change_table(now: Results, before: Results | None) -> Table:
    """What a new baseline says, with the old one's numbers where there were any."""
    rows = []
    for policy in now.policies:
        old = next((p for p in before.policies if p.name == policy.name), None) if before else None
        cells = [f"{_mean(policy, of)}{'' if old is None else f' (was {_mean(old, of)})'}" for of in ("kl", "score")]
        rows.append((policy.name, *cells, f"{policy.kv_bytes:,}{'' if old is None else f' (was {old.kv_bytes:,})'}"))
    return number_table(("policy", "KL", "score", "bytes"), rows, f"{now.data.prompts} prompts")


def change_data(now: Results, before: Results | None) -> dict[str, Any]:
    """The same for --json; `was` is None for a policy that the old baseline did not hold."""
    old = {policy.name: policy for policy in before.policies} if before else {}
    return {
        "kvplan_check": FORMAT_VERSION,
        "prompts": now.data.prompts,
        "policies": [
            {"policy": p.name, **_means(p), "was": _means(old[p.name]) if p.name in old else None} for p in now.policies
        ],
    }


def _means(policy: PolicyResult) -> dict[str, float | int | None]:
    return {"kl": _mean_of(policy, "kl"), "score": _mean_of(policy, "score"), "kv_bytes": policy.kv_bytes}


def _mean(policy: PolicyResult, field: str) -> str:
    found = _mean_of(policy, field)
    return "-" if found is None else number(found, NATS)


def _mean_of(policy: PolicyResult, field: str) -> float | None:
    values = [value for row in policy.rows if (value := getattr(row, field)) is not None]
    return sum(values) / len(values) if values else None
