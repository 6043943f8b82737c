"""What goes wrong around kvplan is one clear line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvplan.cli.app import app
from kvplan.cli.exits import run_app

NOWHERE = ("file/out", "gone/out")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("output", NOWHERE)
@pytest.mark.parametrize("argv", ["calibrate", "search --mem 40%", "eval --baseline uniform:snapkv@40%"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    argv: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, [*argv.split(), "-o", output]) == 2
    assert one_line(capsys).startswith(f"{output}: cannot write there (")


OLD = {
    "p.yaml": ("kvplan: 0\nlayers: {0: {slots: full}}\n", "policy show", "must be the format version", 2),
    "p.json": (json.dumps({"kind": "kvplan profile", "schema_version": 0}), "profile show", "is not 1", 2),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_format_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, command, told, code = OLD[name]
    Path(name).write_text(text)
    assert run_app(app, [*command.split(), name]) == code
    line = one_line(capsys)
    assert line.startswith(f"{name}:") and told in line


def test_old_results_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text('{"kvplan_results": 0}')
    assert run_app(app, ["report", "r.json", "--plot", "pareto"]) != 0
    assert "results of format 0, this kvplan reads format 1" in one_line(capsys)
