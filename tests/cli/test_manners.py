"""What is written to a pipe: no control codes, and nothing wider than 80 columns where COLUMNS says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from kvplan.cli.app import app
from kvplan.policy.schema import LayerPolicy, Slots
from kvplan.report.policy import picture

ROOT = Path(__file__).parents[2]
POLICY = str(ROOT / "policies" / "bundled" / "40pct.yaml")
OTHER = str(ROOT / "policies" / "bundled" / "10pct.yaml")
HELD_OUT = str(ROOT / "calib_data" / "heldout.jsonl")
SHORT = ("--max-prompts", "3", "--max-tokens", "320")

# Commands with their exit code; 2 where what is read is not there.
COMMANDS = {
    "methods": 0,
    "methods snapkv": 0,
    f"policy show {POLICY}": 0,
    f"policy bytes {POLICY} --context 8192 --batch 4": 0,
    f"policy diff {POLICY} {OTHER}": 0,
    f"policy validate {POLICY} {OTHER}": 0,
    "search --nope": 2,
    "search --mem 40% --profile none.json": 2,
    f"run --policy {POLICY} --compare --max-new-tokens 4 where": 0,
    f"eval --policy {POLICY} --baseline uniform:snapkv@40% --data {HELD_OUT} {' '.join(SHORT)} --speed-tokens 4": 0,
}


def every_help(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of each command and group."""
    subs = getattr(command, "commands", {})
    return [path, *(found for name, sub in subs.items() for found in every_help(sub, (*path, name)))]


def lines_of(folder: Path, argv: list[str], code: int = 0) -> tuple[list[str], list[str]]:
    """stdout's and stderr's lines in a pipe of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kvplan", *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def assert_plain(lines: list[str]) -> None:
    for line in lines:
        assert line.isprintable(), ascii(line)


@pytest.mark.parametrize("command", COMMANDS)
def test_piped_output_is_plain_and_fits(tmp_path: Path, command: str) -> None:
    out, err = lines_of(tmp_path, command.split(), COMMANDS[command])
    assert out or err
    assert_plain([*out, *err])
    # What was generated is as long as it is.
    assert [line for line in out if len(line) > 80 and not command.startswith("run ")] == []


@pytest.mark.parametrize("path", every_help(typer.main.get_command(app)), ids=lambda path: " ".join(path) or "kvplan")
def test_help_fits_and_names_every_option_in_full(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    command: Any = typer.main.get_command(app)
    monkeypatch.setenv("COLUMNS", "80")
    context = command.make_context("kvplan", [], resilient_parsing=True)
    for name in path:
        command = command.commands[name]
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
    text = command.get_help(context)
    assert_plain(text.splitlines())
    assert max(map(len, text.splitlines())) <= 80
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            assert max(param.opts, key=len) in text


def test_a_long_list_of_methods_is_wrapped_not_cut() -> None:
    from kvplan.methods.codecs import codecs
    from kvplan.methods.evictors.snapkv import SnapKV
    from kvplan.policy.schema import Policy

    layer = LayerPolicy(slots=Slots(share=4000), evictor=SnapKV(window_tokens=17), key_codec=codecs["int8"]())
    text = picture(Policy(layers=(layer,)), 100).plain
    assert max(map(len, text.splitlines())) <= 80
    told = " ".join(text.split())
    assert all(part in told for part in ("window_tokens=17", "keys int8, values dense", "(min 64)"))
    assert ".." not in told.split("]")[-1]
