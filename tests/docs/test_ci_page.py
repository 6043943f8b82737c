"""What docs/ci.md tells people to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvplan.cli import config, console
from kvplan.cli.app import app
from kvplan.cli.exits import run_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    console.set_quiet(False)
    config.explain = False


def blocks() -> tuple[Any, Any]:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    job, hook = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    return job, hook


def commands() -> list[str]:
    job, hook = blocks()
    steps = [step["run"] for step in job["jobs"]["check"]["steps"] if "run" in step]
    return [text for text in [*steps, hook["repos"][0]["hooks"][0]["entry"]] if "kvplan check" in text]


def test_there_are_a_job_and_a_hook() -> None:
    assert len(commands()) == 2


@pytest.mark.parametrize("text", commands(), ids=["job", "hook"])
def test_its_options_and_files_are_there(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(text)[1:]
    assert run_app(app, [*words, "--explain-config"]) == 0
    assert "(command line)" in capsys.readouterr().out
    named = [word for word in words if word.startswith("policies/")]
    assert len(named) == 2 and all((ROOT / name).is_file() for name in named)


def test_the_hook_runs_when_a_policy_or_the_baseline_changes() -> None:
    (hook,) = blocks()[1]["repos"][0]["hooks"]
    assert hook["language"] == "system" and not hook["pass_filenames"]
    assert all(re.search(hook["files"], name) for name in shlex.split(hook["entry"]) if name.startswith("policies/"))
    assert not re.search(hook["files"], "kvplan/check/gate.py")
