"""Regressions planted on purpose; the gate must be red for each of them, and green without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from kvplan.cli import console
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.demo.prompts import make_record
from kvplan.demo.world import Words
from kvplan.loading import load_model
from kvplan.methods.evictors.snapkv import SnapKV
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.policy.serialize import save_policy

PROMPTS, TOKENS = 64, 180
RECALL_LAYERS = (3, 4)  # of the bundled model; docs/demo-model.md
SINKS = 16


def records() -> Iterator[dict[str, Any]]:
    """A fact in the first tokens, or one between a quarter and a half of the text, and a question about it."""
    words = Words("heldout")
    for i in range(PROMPTS):
        draw, sentences = Random(i), make_record(f"planted-{i}", words, "story", TOKENS)["prompt"].split(". ")
        name, code = draw.choice(words.names), words.number(draw)
        task = "start" if i % 2 else "middle"
        at = 0 if task == "start" else draw.randint(-(-len(sentences) // 4) + 1, len(sentences) // 2)
        told = ". ".join([*sentences[:at], f"Code of {name} {code}", *sentences[at:]])
        question = f"Question: What is the code of {name}? Answer: Code of {name}"
        yield {"id": f"{i}", "task": task, "prompt": f"{told} {question}", "answer": f"{code};", "question_aware": True}


def cut(evictor: Any, share: int) -> LayerPolicy:
    return LayerPolicy(slots=Slots(share=share), min_slots=40, sink_tokens=SINKS, recent_tokens=16, evictor=evictor)


def policy(*layers: LayerPolicy) -> Policy:
    """These in the layers that recall runs through, and everything in the others."""
    chosen = dict(zip(RECALL_LAYERS, layers, strict=True))
    _, _, spec = load_model(None)
    return Policy(layers=tuple(chosen.get(i, LayerPolicy()) for i in range(spec.num_layers)), model=spec.policy_block())


ATTENTIVE = cut(SnapKV(), 3000)  # finds the fact that the question is about
STREAMING = replace(ATTENTIVE, slots=Slots(share=8000), evictor=LayerPolicy().evictor)  # sinks, and most of the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompts, both policies as they should be, and the baseline that they were measured for."""
    path = tmp_path_factory.mktemp("planted")
    (path / "prompts.jsonl").write_text("\n".join(json.dumps(record) for record in records()))
    save_policy(policy(ATTENTIVE, ATTENTIVE), path / "attentive.yaml")
    save_policy(policy(STREAMING, STREAMING), path / "streaming.yaml")
    assert gate(path, ("attentive", "streaming"), "--update") == 0
    return path


@pytest.fixture(autouse=True)
def _talk_again() -> Iterator[None]:
    yield
    console.set_quiet(False)


def gate(folder: Path, names: Sequence[str], *more: str) -> int:
    named = [word for name in names for word in ("--policy", str(folder / f"{name}.yaml"))]
    where = ("--data", str(folder / "prompts.jsonl"), "--baseline", str(folder / "baseline.json"))
    return run_app(app, ["-q", "check", *named, *where, *more])


def changed(folder: Path, tmp_path: Path, name: str, made: Policy) -> Path:
    """A folder in which one policy file is another one, beside the same prompts and baseline."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_policy(made, tmp_path / f"{name}.yaml")
    return tmp_path


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    (told,) = json.loads(capsys.readouterr().out)["policies"]
    return {finding["name"]: finding["state"] for finding in told["findings"]}


def test_without_a_planted_regression_it_is_green(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(folder, ("attentive", "streaming")) == 0
    assert (
        capsys.readouterr().out.count(f"pass after {PROMPTS} of {PROMPTS} prompts: the baseline's numbers again") == 2
    )


def test_an_evictor_that_keeps_random_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def random(self: SnapKV, view: Any) -> torch.Tensor:
        B, Hkv, T, _ = view.keys.shape
        return torch.rand(B, Hkv, T, generator=torch.Generator().manual_seed(T))

    monkeypatch.setattr(SnapKV, "score", random)
    assert gate(folder, ["attentive"], "--json") == 1
    found = findings(capsys)
    assert found["KL rise"] == "regression" and found["bytes held"] == found["bytes planned"] == "pass"


def test_the_slots_of_one_layer_halved(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = replace(STREAMING, slots=Slots(share=4000))
    assert gate(changed(folder, tmp_path, "streaming", policy(half, STREAMING)), ["streaming"], "--json") == 1
    assert findings(capsys)["KL rise"] == "regression"


def test_a_policy_one_percent_over_its_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 8.4 points more in one of eight layers.
    more = replace(STREAMING, slots=Slots(share=8840))
    assert gate(changed(folder, tmp_path, "streaming", policy(more, STREAMING)), ["streaming"], "--json") == 1
    (told,) = json.loads(capsys.readouterr().out)["policies"]
    red = [finding for finding in told["findings"] if finding["state"] == "regression"]
    assert [finding["name"] for finding in red] == ["bytes planned"]
    assert 1.005 < red[0]["value"] / red[0]["limit"] < 1.015


def test_a_runtime_that_drops_the_sinks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LayerPolicy, "protected_sinks", 0)
    assert gate(folder, ["streaming"], "--json") == 1
    found = findings(capsys)
    assert found["KL rise"] == "regression" and found["bytes planned"] == "pass"
