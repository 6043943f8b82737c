from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.policy.schema import LayerPolicy, Policy, Slots, Target
from kvplan.policy.serialize import dump_policy, load_policy


def policy(share: int) -> Policy:
    return Policy(layers=(LayerPolicy(slots=Slots(share=share)),) * 2, target=Target(share=share))


def write(path: Path, **changes: Any) -> None:
    points = [
        {"bytes": held, "full_bytes": 1000, "kl": kl, "policy": dump_policy(policy(10 * held)), "more": None}
        for held, kl in ((400, 0.01), (100, 0.5), (250, 0.1))
    ]
    path.write_text(json.dumps({"kvplan_front": 1, "points": points, **changes}))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("p.front.json"))


def from_front(*argv: str) -> int:
    return run_app(app, ["policy", "from-front", "p.front.json", *argv])


@pytest.mark.parametrize(("mem", "held"), [("25%", 250), ("0.399", 250), ("40%", 400), ("100%", 400), ("10%", 100)])
def test_the_best_plan_that_fits_becomes_a_policy(mem: str, held: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert from_front("--mem", mem, "-o", "small.yaml") == 0
    assert load_policy("small.yaml") == policy(10 * held)
    assert capsys.readouterr().err.startswith(f"wrote small.yaml: {held / 10:.2f}% of the full cache, KL 0.")


@pytest.mark.parametrize(
    ("changes", "argv", "told"),
    [
        ({}, ("--mem", "9%"), "its smallest plan holds 10.00% of the full cache, more than 9%; raise --mem"),
        ({}, ("--mem", "9"), "'9' is not a share above 0% and at most 100%; did you mean 9%?"),
        ({}, ("--mem", "9%", "-o", "p.front.json"), "p.front.json: this command reads that file"),
        ({}, ("--mem", "90%", "-o", "/dev/full"), "/dev/full: cannot write (No space left on device)"),
        ({"kvplan_front": None}, ("--mem", "9%"), "p.front.json: not a front (no 'kvplan_front' in it)"),
        ({"kvplan_front": 2}, ("--mem", "9%"), "p.front.json: a front of format 2, this kvplan reads format 1"),
        ({"points": []}, ("--mem", "9%"), "p.front.json: the front has no points"),
        (
            {"points": [{"bytes": -1, "full_bytes": 9, "kl": 0.0, "policy": "kvplan: 1"}]},
            ("--mem", "9%"),
            "p.front.json: points.0.bytes: ",
        ),
        ({"points": 3}, ("--mem", "9%"), "p.front.json: points"),
        (
            {"points": [{"bytes": 1, "full_bytes": 9, "kl": 0.0, "policy": "kvplan: 1"}]},
            ("--mem", "90%"),
            "p.front.json:1:1: layers: ",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("p.front.json"), **changes)
    assert from_front(*argv) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("policy.yaml").exists()


def test_what_is_no_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.front.json").write_text("{")
    assert from_front("--mem", "9%") == 2
    assert "p.front.json: not JSON (" in capsys.readouterr().err
