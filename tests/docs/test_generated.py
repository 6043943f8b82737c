"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from kvplan.policy.serialize import parse_policy

DOCS = Path(__file__).parents[2] / "docs"


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("kvplan_docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["policy.md", "cli.md"])
def test_a_generated_page_is_current(name: str) -> None:
    page = generator().PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == page, "write it again: python docs/generate.py"


def test_help_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator()
    before = made.cli_page()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert made.cli_page() == before
    assert "\x1b" not in before


def test_the_example_is_a_valid_policy() -> None:
    for example in (generator().EXAMPLE, generator().EXAMPLE_OF_ALL):
        assert len(parse_policy(example).layers) == 8
