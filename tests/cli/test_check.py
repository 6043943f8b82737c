from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvplan.check.results import load_results
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.policy.schema import LayerPolicy, Policy
from kvplan.policy.serialize import save_policy


@pytest.fixture
def here(byte_home: Path) -> Path:
    """With the 70 prompts of p.jsonl."""
    records = [
        {
            "id": f"{i}",
            "task": "copy" if i % 2 else "ask",
            "prompt": f"{'word ' * (10 + i % 7)}{i} is",
            "answer": f"{i}",
        }
        for i in range(70)
    ]
    (byte_home / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    return byte_home


def kvplan_check(*argv: object) -> int:
    return run_app(app, ["-q", "check", *map(str, argv)])


A = ("--policy", "a.yaml", "--data", "p.jsonl")
BOTH = ("--policy", "b.yaml", *A, "--baseline", "base.json")


def test_an_unchanged_policy_passes_and_every_report_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_check(*BOTH, "--update") == 0
    assert "70 prompts" in capsys.readouterr().out
    assert [policy.name for policy in load_results(here / "base.json").policies] == ["full cache", "b", "a"]
    (here / "job.md").write_text("before\n")
    assert kvplan_check(*BOTH, "--junit", "out.xml", "--summary", "job.md") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    rows = [line.split() for line in lines if line.startswith(" KL rise")]
    assert [row[4:] for row in rows] == [["unchanged", "0.0200", "pass"]] * 2
    assert lines[-1] == "a: pass after 70 of 70 prompts: the baseline's numbers again"
    suites = ElementTree.parse(here / "out.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["b", "a"]
    assert {suite.get("failures") for suite in suites} == {suite.get("errors") for suite in suites} == {"0"}
    assert {case.get("name") for case in suites[0]} >= {"bytes held", "bytes planned", "KL rise", "ask: score loss"}
    told = (here / "job.md").read_text()
    assert told.startswith("before\n### kvplan check: pass") and "| KL rise | 70 |" in told


def test_update_as_json_is_json_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--policy", "a.yaml", "--data", "p.jsonl", "--max-prompts", 4, "--baseline", "base.json")
    for was in (False, True):
        assert kvplan_check(*few, "--update", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["prompts"] == 4 and [p["policy"] for p in told["policies"]] == ["full cache", "a"]
        (_, a) = told["policies"]
        assert a["was"] == ({name: a[name] for name in ("kl", "score", "kv_bytes")} if was else None)


def test_prompts_without_answers_are_told_as_such(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.txt").write_text("some words that go on and on " * 20)
    given = ("--policy", "a.yaml", "--data", "t.txt", "--max-tokens", 90, "--max-prompts", 4)
    assert kvplan_check(*given) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert "the prompts ask nothing" in last and "more prompts" not in last
    assert kvplan_check(*given, "--max-kl", 10, "--min-recovery", 0) == 0


def test_another_policy_under_the_same_name_is_red(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvplan_check(*A, "--baseline", "base.json", "--update")
    save_policy(Policy(layers=(LayerPolicy(), LayerPolicy())), here / "a.yaml")
    assert kvplan_check(*A, "--baseline", "base.json", "--junit", "out.xml") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("a: regression after 24 of 70 prompts: bytes planned ")
    (failure,) = ElementTree.parse(here / "out.xml").getroot().iter("failure")
    assert failure.get("type") == "regression" and "at most" in str(failure.get("message"))


def test_the_same_seed_gives_the_same_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for _ in range(2):
        assert kvplan_check(*A, "--max-kl", 1, "--min-recovery", 0, "--seed", 3, "--json") == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] and told[0]["verdict"] == "pass"
    assert told[0]["policies"][0]["told"].startswith("a: pass after")


def test_too_few_prompts_are_inconclusive(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_check(*A, "--max-kl", 0.01, "--max-prompts", 4, "--junit", "out.xml") == 3
    assert "inconclusive after 4 of 4 prompts" in capsys.readouterr().out
    assert list(ElementTree.parse(here / "out.xml").getroot().iter("error"))


def test_results_of_eval_are_a_baseline(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--policy", "a.yaml", "--data", "p.jsonl", "--speed-tokens", "0", "-o", "r.json")
    assert run_app(app, ["-q", "eval", *given]) == 0
    capsys.readouterr()
    assert kvplan_check(*A, "--baseline", "r.json") == 0


def test_a_share_of_the_bytes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = ("--max-kl", 10, "--min-recovery", 0)
    assert kvplan_check(*A, *loose, "--max-bytes", "90%") == 0
    assert kvplan_check(*A, *loose, "--max-bytes", "20%") == 1
    assert "bytes of full cache's" in capsys.readouterr().out


def test_speed_is_judged_where_it_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = ("--max-kl", 10, "--min-recovery", 0, "--json")
    assert kvplan_check(*A, *loose, "--max-slowdown", 1000) == 0
    assert kvplan_check(*A, *loose, "--max-slowdown", 0.001) == 1
    told = [json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\n\n{").split("\n\n")]
    (slow,) = [f for f in told[1]["policies"][0]["findings"] if f["state"] == "regression"]
    assert slow["name"] == "slowdown" and slow["low"] <= slow["value"] <= slow["high"]


def test_what_cannot_be_compared_exits_with_4(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvplan_check(*A, "--baseline", "base.json", "--max-prompts", 4, "--update")
    assert kvplan_check(*A, "--baseline", "base.json", "--max-prompts", 5) == 4
    assert kvplan_check(*A, "--baseline", "base.json", "--dtype", "bfloat16") == 4
    data = json.loads((here / "base.json").read_text())
    (here / "base.json").write_text(json.dumps(data | {"kvplan_results": 9}))
    assert kvplan_check(*A, "--baseline", "base.json") == 4
    first, second, third = capsys.readouterr().err.splitlines()
    assert "not comparable: prompts 4 sha256:" in first and "dtype float32 there, bfloat16 here" in second
    assert "results of format 9" in third


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no policy": ((), "nothing to check; give --policy FILE"),
    "an update of nothing": ((*A, "--update"), "--update writes the --baseline; name its file"),
    "no such baseline": ((*A, "--baseline", "x.json"), "x.json: no such baseline; write it with --update"),
    "no share": ((*A, "--max-bytes", "40x"), "'40x' is not a share"),
    "one policy twice": ((*A, "--policy", "a.yaml"), "a.yaml is given twice"),
    "a report over a policy": ((*A, "--junit", "a.yaml"), "a.yaml: this command reads that file"),
    "a length without a task": ((*A, "--context", "4k"), "--context is the length of generated prompts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    argv, told = REFUSED[name]
    assert kvplan_check(*argv) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1
