"""A model of bytes that stands for the bundled one, and a folder with two policies of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvplan.loading
from kvplan.cli import console
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.policy.serialize import save_policy
from tests.check.byte_model import byte_model, byte_tokenizer


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    path = tmp_path_factory.mktemp("model")
    byte_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def byte_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_folder: Path) -> Iterator[Path]:
    """The current folder, with a.yaml (half of the slots) and b.yaml (30 %)."""
    monkeypatch.setattr(kvplan.loading, "BUNDLED_FOLDER", byte_folder)
    monkeypatch.chdir(tmp_path)
    for name, share in (("a", 5000), ("b", 3000)):
        layer = LayerPolicy(slots=Slots(share=share), min_slots=24)
        save_policy(Policy(layers=(layer, layer)), tmp_path / f"{name}.yaml")
    yield tmp_path
    console.set_quiet(False)
