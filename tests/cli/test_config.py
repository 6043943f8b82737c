from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from kvplan.cli import config
from kvplan.cli.app import app as kvplan_app
from kvplan.cli.config import load
from kvplan.cli.exits import run_app
from kvplan.errors import ConfigError

ROOT = typer.main.get_command(kvplan_app)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("KVPLAN_CONFIG", "KVPLAN_SEARCH_TRIALS", "KVPLAN_TRIALS", "KVPLAN_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def explained(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, tuple[str, str]]]:
    def run(*argv: str) -> dict[str, tuple[str, str]]:
        try:
            assert run_app(kvplan_app, [*argv, "--explain-config"]) == 0
        finally:
            config.explain = False
        lines = capsys.readouterr().out.splitlines()
        rows = [line.rstrip(")").rpartition("  (") for line in lines]
        return {left.split()[0]: (" ".join(left.split()[1:]), origin) for left, _, origin in rows}

    return run


def test_flag_beats_variable_beats_file_beats_default(
    here: Path, explained: Callable[..., dict[str, tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("search", "--mem", "40%")
    assert explained(*asked)["--trials"] == ("60", "default")
    (here / "kvplan.toml").write_text('device = "cuda:1"\n[search]\ntrials = 7\nevictor = ["tova", "h2o"]\n')
    found = explained(*asked)
    assert found["--trials"] == ("7", "kvplan.toml [search]")
    assert found["--evictor"] == ("tova h2o", "kvplan.toml [search]")
    assert found["--device"] == ("cuda:1", "kvplan.toml")
    assert found["--mem"] == ("40%", "command line")
    monkeypatch.setenv("KVPLAN_TRIALS", "8")
    assert explained(*asked)["--trials"] == ("8", "KVPLAN_TRIALS")
    monkeypatch.setenv("KVPLAN_SEARCH_TRIALS", "9")
    assert explained(*asked)["--trials"] == ("9", "KVPLAN_SEARCH_TRIALS")
    assert explained(*asked, "--trials", "10")["--trials"] == ("10", "command line")
    assert explained("calibrate")["--device"] == ("cuda:1", "kvplan.toml")


def test_values_reach_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "kvplan.toml").write_text("[search]\ntrials = -1\n")
    assert run_app(kvplan_app, ["search", "--mem", "40%"]) == 2
    assert "trials" in capsys.readouterr().err


def test_options_have_the_names_that_users_type(here: Path) -> None:
    (here / "kvplan.toml").write_text("[policy.bytes]\njson = true\n")
    assert load(ROOT, {}).values["policy", "bytes"] == {"as_json": True}
    assert load(ROOT, {"KVPLAN_SEARCH_JSON": "1"}).values["search",] == {"as_json": "1"}


def test_lists_and_commands_of_groups(here: Path) -> None:
    (here / "kvplan.toml").write_text('[policy.bytes]\ncontext = 9\n[search]\ndata = "one.jsonl"\n')
    found = load(ROOT, {"KVPLAN_SEARCH_EVICTOR": "tova, h2o", "KVPLAN_POLICY_BYTES_NEW_TOKENS": "5"})
    assert found.values["policy", "bytes"] == {"context": 9, "new_tokens": "5"}
    assert found.values["search",] == {"data": ["one.jsonl"], "evictor": ["tova", "h2o"]}
    assert found.default_map()["policy"]["bytes"]["context"] == 9


def test_an_error_names_the_file_or_variable_that_a_value_is_from(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "kvplan.toml").write_text('profile = "none.json"\n[search]\nmem = "40x"\ntrials = 5\n')
    monkeypatch.setenv("KVPLAN_BATCH", "0")
    asked = [
        (("search",), "--batch 0: must be greater than or equal to 1 (from KVPLAN_BATCH); see kvplan search --help"),
        (("search", "--batch", "1"), "'40x' is not a size; write for example 512MiB or 1.5GiB "
         "(--mem 40x is from kvplan.toml [search])"),
        (("search", "--batch", "1", "--mem", "5%"), "--mem 5% holds for any context and batch; leave out --context and "
         "--batch"),
    ]  # fmt: skip
    for argv, told in asked:
        assert run_app(kvplan_app, list(argv)) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
    monkeypatch.delenv("KVPLAN_BATCH")
    assert run_app(kvplan_app, ["search", "--mem", "5%"]) == 2
    told = "none.json: cannot read the profile (No such file or directory) (--profile none.json is from kvplan.toml)"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_a_variable_that_means_nothing_is_a_warning(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("KVPLAN_SERCH_TRIALS", "KVPLAN_SEARCH_TRIALS", "KVPLAN_KERNELS", "KVPLAN_TORCH"):
        monkeypatch.setenv(name, "1")
    assert run_app(kvplan_app, ["policy", "schema"]) == 0
    told = "warning: KVPLAN_SERCH_TRIALS is no variable of kvplan and has no effect; did you mean KVPLAN_SEARCH_TRIALS?"
    assert capsys.readouterr().err == told + "\n"
    monkeypatch.setenv("_KVPLAN_COMPLETE", "bash_complete")
    load(ROOT)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trials = ", "kvplan.toml: not TOML ("),
        ("[serch]\ntrials = 1", "kvplan.toml: unknown command 'serch'; did you mean 'search'?"),
        ("[search]\ntrails = 1", "kvplan.toml: [search] unknown option 'trails'; did you mean 'trials'?"),
        ("[policy]\ncontext = 1", "kvplan.toml: [policy] unknown option 'context'"),
        ("trails = 1", "kvplan.toml: unknown option 'trails'; did you mean 'trials'?"),
        (
            "trust_remote_code = true",
            "kvplan.toml: trust_remote_code cannot be set in a file; give --trust-remote-code",
        ),
        ("[search]\ntrials = [1]", "kvplan.toml: trials is [1]; it takes one value"),
        ("[search]\nevictor = 1", "kvplan.toml: evictor is 1; it takes a list"),
    ],
)
def test_a_bad_file_is_one_line(here: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "kvplan.toml").write_text(text)
    assert run_app(kvplan_app, ["policy", "schema"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1


def test_another_file_can_be_named_and_must_be_there(here: Path) -> None:
    (here / "mine.toml").write_text("[run]\nseed = 3\n")
    assert load(ROOT, {"KVPLAN_CONFIG": "mine.toml"}).values["run",] == {"seed": 3}
    with pytest.raises(ConfigError, match=r"gone.toml: cannot be read \(No such file or directory\)"):
        load(ROOT, {"KVPLAN_CONFIG": "gone.toml"})
