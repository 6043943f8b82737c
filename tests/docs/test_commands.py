"""Every command in README and docs exists, with the options that it is given; `make test-docs` runs the quick ones."""

from __future__ import annotations

import importlib.util
import re
import tomllib

import pytest
from commands import ROOT, Command, commands

from kvplan.cli import config
from kvplan.cli.app import app
from kvplan.cli.exits import run_app

FOUND = commands()
# Programs of others, in the page that tells how to set a server up.
FOREIGN = ("apt-get", "initdb", "postgres", "createdb", "wait")


def test_the_commands_are_found() -> None:
    kinds = {command.words[0] for command in FOUND if command.page == "README.md"}
    assert {"kvplan", "make"} <= kinds
    assert len(FOUND) > 40 and any(command.words[1:3] == ("worker", "--study") for command in FOUND)


@pytest.mark.parametrize("command", FOUND, ids=str)
def test_a_command_exists_with_its_options(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.words
    if command.is_kvplan:
        try:
            code = run_app(app, words if "--help" in words else ["--explain-config", *words])
        finally:
            config.explain = False
        assert code == 0, capsys.readouterr().err
    elif program == "make":
        targets = re.findall(r"^([a-z\- ]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        known = {target for names in targets for target in names.split()}
        assert {word for word in words if "=" not in word} <= known
    elif program == "python":
        exists = importlib.util.find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file()
        assert exists, f"{command}: no such module or file"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        asked = {extra for text in re.findall(r"\[(.+?)\]", " ".join(words)) for extra in text.split(",")}
        assert words[0] == "install" and asked <= set(extras)
    else:
        assert program in FOREIGN
