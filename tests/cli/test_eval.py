from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvplan.loading
from kvplan.check.results import FULL_CACHE, load_results
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.policy.schema import LayerPolicy, Policy
from kvplan.policy.serialize import save_policy
from tests.check.byte_model import byte_tokenizer

CHECK = Path(__file__).parents[1] / "check"
SUITE = f"gsm8k:{CHECK / 'data' / 'gsm8k.jsonl'}"


@pytest.fixture
def here(byte_home: Path) -> Path:
    """With prompts.jsonl."""
    records = [
        {"id": f"{i}", "task": "copy" if i % 2 else "ask", "prompt": f"{'word ' * (60 + 200 * i)}{i} is",
         "answer": f"{i}", "question_aware": i < 2, **({"scorer": "f1", "max_new_tokens": 4} if i % 2 else {})}
        for i in range(4)
    ]  # fmt: skip
    (byte_home / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return byte_home


def kvplan_eval(*argv: object) -> int:
    return run_app(app, ["-q", "eval", *map(str, argv)])


BOTH = ("--policy", "a.yaml", "--policy", "b.yaml", "--data", "prompts.jsonl")


def test_the_results_file_and_the_json_say_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_eval(*BOTH, "--baseline", "uniform:knorm@50%", "--speed-tokens", 0, "-o", "r.json", "--json") == 0
    told, results = json.loads(capsys.readouterr().out), load_results(here / "r.json")
    names = [FULL_CACHE, "a", "b", "uniform:knorm@50%"]
    assert [policy.name for policy in results.policies] == [p["name"] for p in told["policies"]] == names
    assert [policy.source for policy in results.policies][1:] == ["a.yaml", "b.yaml", "uniform:knorm@50%"]
    assert [group["question"] for group in told["groups"]] == ["question-agnostic", "question-aware"]
    for group, rows in zip(told["groups"], ((2, 3), (0, 1)), strict=True):
        for one, policy in zip(group["policies"], results.policies, strict=True):
            assert one["kl"]["mean"] == pytest.approx(sum(policy.rows[i].kl for i in rows) / 2)
            assert one["kv_bytes"] == sum(policy.rows[i].kv_bytes for i in rows)
            assert one["kv_bytes"] <= one["planned_bytes"]
        assert set(group["tasks"]) == {"ask", "copy"}
    assert told["data"] == json.loads((here / "r.json").read_text())["data"]
    assert told["model"]["name"] == "bundled" and results.settings["samples"] == 8


def test_tables_fit_80_columns_and_keep_the_ways_of_asking_apart(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvplan_eval(*BOTH, "--baseline", "uniform:streaming+turboquant4@35%", "--speed-tokens", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "question-agnostic, 2 prompts" in text and "question-aware, 2 prompts" in text
    assert text.count("paired with the full cache") == text.count("paired with (1) a") == 2
    assert "score by task, question-agnostic" in text and "KL by context, question-aware" in text
    assert (
        " kvplan, full " in text[text.index("tok/s") :]
        and "  predicted: each token of the answer is the likeliest" in text
    )


def test_prompts_that_a_policy_was_found_on_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvplan.calibrate.collect import prompt_hash
    from kvplan.calibrate.prompts import load_examples
    from kvplan.policy.serialize import load_policy
    from kvplan.search.seen import KEY, packed

    examples = load_examples(["prompts.jsonl"], byte_tokenizer())
    a = load_policy("a.yaml")
    save_policy(replace(a, provenance={KEY: packed(map(prompt_hash, examples[1:]))}), "a.yaml")
    told = (
        "warning: at least 3 of 4 prompts are among those that a was found on, so its scores flatter it; "
        "give others with --data"
    )
    assert kvplan_eval(*BOTH, "--speed-tokens", 0) == 0
    assert capsys.readouterr().err.splitlines() == [told]
    loose = ("--max-kl", "10", "--min-recovery", "0", "--max-prompts", "4")
    run_app(app, ["-q", "check", *BOTH, *loose])
    assert capsys.readouterr().err.splitlines() == [told]
    assert kvplan_eval("--policy", "b.yaml", "--data", "prompts.jsonl", "--speed-tokens", 0) == 0
    assert capsys.readouterr().err == ""


def test_scores_are_shown_only_where_something_is_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x.txt").write_text("only words " * 60)
    assert kvplan_eval("--policy", "a.yaml", "--data", "x.txt", "--speed-tokens", 0) == 0
    text = capsys.readouterr().out
    assert "nothing asked, 1 prompt\n" in text and "recovery" not in text and "ppl" in text


def test_a_full_cache_that_knows_little_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_eval(*BOTH, "--speed-tokens", 0) == 0
    assert "The full cache scores 0.000 (question-aware): recovery says little there." in capsys.readouterr().out


def test_tasks_of_several_lengths_and_a_suite(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--task", "niah", "--task", "continuation", "--context", "600", "--context", "1k", "--samples", 1)
    assert kvplan_eval("--policy", "a.yaml", *asked, "--suite", SUITE, "--speed-tokens", 0) == 0
    results = load_results(here / "results.json")
    kinds = [(row.task, row.question_aware) for row in results.full.rows]
    lengths = 2 * [("niah", False), ("niah", True), ("continuation", False)]
    assert kinds == [*lengths, ("gsm8k", False), ("gsm8k", True)]
    assert all(row.answers for row in results.full.rows)
    assert results.data.sources == ("task niah", "task continuation", f"suite {SUITE}")


def test_one_way_of_asking(here: Path) -> None:
    asked = ("--task", "passkey", "--context", "600", "--samples", 1, "--question", "aware", "--speed-tokens", 0)
    assert kvplan_eval("--baseline", "uniform:snapkv@40%", *asked) == 0
    assert [row.question_aware for row in load_results(here / "results.json").full.rows] == [True]


def test_all_tasks(here: Path) -> None:
    from kvplan.check.tasks import tasks

    asked = ("--task", "all", "--context", "1500", "--samples", 1, "--question", "agnostic", "--speed-tokens", 0)
    assert kvplan_eval("--policy", "b.yaml", *asked) == 0
    assert [row.task for row in load_results(here / "results.json").full.rows] == tasks.names()


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no policy": ((), "nothing to measure; give --policy FILE, or --baseline such as uniform:snapkv@40%"),
    "a length without a task": ((*BOTH, "--context", "4k"), "--context is the length of generated prompts"),
    "no length": (("--policy", "a.yaml", "--task", "niah", "--context", "4x"), "write for example 4096 or 32k"),
    "a length beyond the model": (
        ("--policy", "a.yaml", "--task", "niah", "--context", "32k"),
        "--context 32768 is more than the model's context of 4096 tokens"),
    "an unknown task": (("--policy", "a.yaml", "--task", "nia"), "unknown task 'nia'; did you mean 'niah'?"),
    "an unknown suite": (("--policy", "a.yaml", "--suite", "rulr:x"), "unknown suite 'rulr'; did you mean 'ruler'?"),
    "an unknown scorer": ((*BOTH, "--scorer", "rouge"), "unknown scorer 'rouge'; did you mean 'rouge_l'?"),
    "an unknown way": ((*BOTH, "--question", "awre"), "unknown way of asking 'awre'; did you mean 'aware'?"),
    "a column of no dataset": (
        ("--policy", "a.yaml", "--task", "niah", "--column", "x"), "--column and --split choose inside a dataset"),
    "prompts of no data": (("--policy", "a.yaml", "--task", "niah", "--max-prompts", 3), "--samples says how many"),
    "a profile without a baseline": ((*BOTH, "--profile", "p.json"), "--profile is for baselines"),
    "a baseline that needs one": ((*BOTH, "--baseline", "squeeze:snapkv@40%"), "give the --profile"),
    "one policy twice": (("--policy", "a.yaml", *BOTH), "a.yaml is given twice"),
    "results over a policy": ((*BOTH, "-o", "a.yaml"), "a.yaml: this command reads that file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    argv, told = REFUSED[name]
    assert kvplan_eval(*argv) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_policy_of_another_model_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(Policy(layers=(LayerPolicy(),) * 3), here / "c.yaml")
    assert kvplan_eval(*BOTH, "--policy", "c.yaml") == 2
    assert "error: c.yaml: " in capsys.readouterr().err


def test_another_model_must_be_told_what_to_read(
    here: Path, byte_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvplan.loading, "BUNDLED_FOLDER", here)
    assert kvplan_eval("--policy", "a.yaml", "--model", byte_folder) == 2
    assert "nothing to measure on; give --data, --task or --suite" in capsys.readouterr().err
