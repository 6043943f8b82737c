from __future__ import annotations

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from kvplan.check.adaptive import Outcome
from kvplan.check.gate import BYTES, NATS, RATIO, SHARE, Finding, State
from kvplan.check.slowdown import judge_slowdown
from kvplan.report.check import as_data, cells, junit, markdown, notes, number, verdict, worst_part
from kvplan.report.tables import nats


def finding(name: str = "KL rise", state: State = State.PASS, value: float = 0.01, **changes: object) -> Finding:
    given = {"prompts": 250, "low": value - 0.01, "high": value + 0.01, "limit": 0.02, "unit": NATS, **changes}
    return Finding(name=name, state=state, value=value, **given)  # type: ignore[arg-type]


def outcome(*findings: Finding, state: State = State.PASS, **changes: object) -> Outcome:
    given = {"policy": "p", "prompts": 96, "available": 250, "looks": 3, **changes}
    return Outcome(state=state, findings=findings, **given)  # type: ignore[arg-type]


RED = finding(state=State.REGRESSION, value=0.3)


def test_the_verdict_says_why() -> None:
    assert (
        verdict(outcome(finding(), reproduced=True)) == "p: pass after 96 of 250 prompts: the baseline's numbers again"
    )
    told = verdict(outcome(finding("x"), RED, replace(RED, name="t: KL rise"), state=State.REGRESSION))
    assert told == (
        "p: regression after 96 of 250 prompts: KL rise 0.3000 [0.2900, 0.3100], at most 0.0200; also t: KL rise"
    )
    many = [replace(RED, name=f"t{i}") for i in range(6)]
    assert verdict(outcome(*many, state=State.REGRESSION)).endswith("also t1, t2, t3 and 2 more")
    unclear = outcome(finding(state=State.INCONCLUSIVE), state=State.INCONCLUSIVE)
    assert verdict(unclear).endswith("at most 0.0200; more prompts would tell")


def test_prompts_that_ask_nothing_want_another_criterion() -> None:
    nothing = finding("recovery loss", State.INCONCLUSIVE, math.nan, prompts=0, unit=SHARE)
    told = verdict(outcome(finding(state=State.INCONCLUSIVE), nothing, state=State.INCONCLUSIVE))
    assert "the prompts ask nothing" in told and "--baseline" in told and "more prompts" not in told


def test_a_pass_names_the_worst_task() -> None:
    tasks = [
        finding("a: score loss", part="a", value=0.01, limit=0.24, unit=SHARE),
        finding("b: KL rise", part="b", limit=0.16),
    ]
    passed = outcome(finding(), *tasks)
    assert worst_part(passed) is tasks[1]
    assert "all within the limits; worst of the parts is b: KL rise" in verdict(passed)


def test_bytes_are_told_to_the_byte() -> None:
    over = finding("bytes planned", State.REGRESSION, 1_000_001, limit=1_000_000, unit=BYTES)
    assert verdict(outcome(over, state=State.REGRESSION)).endswith("bytes planned 1,000,001, at most 1,000,000")


def test_a_share_of_the_bytes_is_told_with_the_bytes() -> None:
    held = finding("bytes of full cache's", State.REGRESSION, 410, prompts=0, limit=400, unit=BYTES, full=1000)
    assert verdict(outcome(held, state=State.REGRESSION)).endswith(
        "bytes of full cache's 410 (41.0% of full), at most 400 (40.0%)"
    )
    assert cells(held) == ("bytes of full cache's", "-", "410 B", "41.00% of full", "40.00%", "regression")


def test_what_is_unchanged_has_no_interval_that_says_otherwise() -> None:
    same = finding("score loss", value=0.0, low=-1.0, high=1.0, unit=SHARE, unchanged=True)
    assert cells(same) == ("score loss", "250", "0.0%", "unchanged", "2.0%", "pass")
    assert "[" not in markdown([outcome(same, reproduced=True)])
    assert any(line.startswith("unchanged: ") for line in notes([outcome(same)]))
    assert not any(line.startswith("unchanged: ") for line in notes([outcome(finding())]))


def test_kl_has_one_format() -> None:
    assert [nats(x) for x in (0.0, 2e-8, -2e-8, 9e-5, 0.0312, 1.4, 12.3456, -0.5)] == [
        "0.0000", "0.0000", "0.0000", "0.0001", "0.0312", "1.4000", "12.346", "-0.5000",
    ]  # fmt: skip


def test_numbers_go_by_their_unit() -> None:
    told = [number(0.0123, NATS), number(1.4, NATS), number(0.034, SHARE), number(1.5, RATIO), number(math.inf, NATS)]
    assert told == ["0.0123", "1.4000", "3.4%", "1.50x", "inf"]


def test_a_cache_above_its_plan_is_a_failed_case() -> None:
    broken = outcome(state=State.REGRESSION, broken="p.yaml: a cache holds 41 bytes")
    assert verdict(broken) == "p: regression after 96 of 250 prompts: p.yaml: a cache holds 41 bytes"
    (suite,) = ElementTree.fromstring(junit([broken]))
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    (case,) = suite
    assert case.get("name") == "bytes held" and case[0].get("message") == "p.yaml: a cache holds 41 bytes"


def test_markdown_survives_odd_names() -> None:
    text = markdown([outcome(replace(RED, name="a|b <c>: KL rise"), state=State.REGRESSION)])
    assert text.startswith("### kvplan check: regression\n") and "| a\\|b &lt;c>: KL rise | 250 |" in text


def test_json_has_no_infinities() -> None:
    data = as_data([outcome(finding(low=-math.inf, high=math.inf))])
    (found,) = json.loads(json.dumps(data, allow_nan=False))["policies"][0]["findings"]
    assert found["low"] is found["high"] is None and found["state"] == "pass"


@pytest.mark.parametrize(("ratios", "state"), [
    ([1.0] * 11, State.PASS), ([2.0] * 11, State.REGRESSION), ([1.0, 2.0] * 5 + [1.0], State.INCONCLUSIVE),
    ([1.0] * 9 + [9.0] * 2, State.PASS),
])  # fmt: skip
def test_a_slowdown_is_the_median_of_rounds(ratios: list[float], state: State) -> None:
    found = judge_slowdown(ratios, 1.5)
    assert found.state is state and found.low <= found.value <= found.high
