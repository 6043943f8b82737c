from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kvplan.loading
import kvplan.runtime.cache
from kvplan.calibrate.records import parse_record
from kvplan.calibrate.requests import expected_answer, request_ids
from kvplan.cli import console
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.policy.memory import plan
from kvplan.policy.schema import LayerPolicy, Policy, Slots
from kvplan.policy.serialize import save_policy

LONG = " ".join(chr(97 + (i * i + i // 7) % 26) for i in range(90))
FIELDS = {
    "text",
    "prompt_tokens",
    "new_tokens",
    "kv_bytes",
    "kv_bytes_planned",
    "kv_bytes_full",
    "kv_ratio",
    "peak_kv_bytes",
    "batch_rows",
    "prefill_seconds",
    "decode_tokens_per_second",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}z{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """A folder with p.yaml, whose model is the bundled one."""
    monkeypatch.setattr(kvplan.loading, "BUNDLED_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    save_policy(POLICY, tmp_path / "p.yaml")
    yield tmp_path
    console.set_quiet(False)


LAYER = LayerPolicy(slots=Slots(share=3000), min_slots=16, recent_tokens=4)
SHAPE = {"layers": 2, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}
POLICY = Policy(layers=(LAYER, replace(LAYER, slots=Slots(tokens=20))))


def kvplan_run(*argv: object) -> int:
    return run_app(app, ["run", "--policy", "p.yaml", *map(str, argv)])


def records(path: Path) -> Path:
    lines = [
        {"id": "a", "task": "t", "prompt": LONG, "answer": "b"},
        {"id": "b", "task": "t", "prompt": "a b c", "max_new_tokens": 3},
        {"id": "c", "task": "u", "messages": [{"role": "user", "content": LONG}, {"role": "user", "content": "q"},
                                              {"role": "assistant", "content": "r"}]},
        {"id": "d", "task": "u", "prompt": "x y"},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_text_goes_to_stdout_and_the_rest_to_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run(LONG, "--max-new-tokens", 5) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 and len(captured.out.split()) <= 5
    assert captured.err.startswith("KV cache ") and captured.err.count("\n") == 1
    assert "| prompt 90 + 5 tokens | prefill " in captured.err and "planned" in captured.err
    assert kvplan_run("-q", LONG, "--max-new-tokens", 5) == 0
    assert capsys.readouterr() == (captured.out, "")


def test_json_has_every_field(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run(LONG, "--max-new-tokens", 5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= FIELDS and "id" not in found
    assert (found["prompt_tokens"], found["new_tokens"]) == (90, 5)
    assert found["kv_bytes"] == found["kv_bytes_planned"] < found["kv_bytes_full"] <= found["peak_kv_bytes"] * 3
    assert found["kv_ratio"] == found["kv_bytes"] / found["kv_bytes_full"]


def test_every_source_gives_the_same_prompt(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompt.txt").write_text(LONG + "\n")
    kvplan_run(LONG)
    wanted = capsys.readouterr().out
    assert wanted
    for argv in ((), ("-",), ("--prompt-file", "-"), ("--prompt-file", "prompt.txt"), ("--stream", LONG)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{LONG}\n".encode())))
        assert kvplan_run(*argv) == 0
        assert capsys.readouterr().out.split() == wanted.split()


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_read_where_that_was_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kvplan_run(LONG)
    wanted = capsys.readouterr().out
    for argv in (("-",), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", _Terminal(io.BytesIO(f"{LONG}\n".encode())))
        assert kvplan_run(*argv) == 0
        told = capsys.readouterr()
        assert told.out == wanted and "type the prompt; Ctrl-D on a line of its own ends it" in told.err
    assert kvplan_run() == 2
    assert capsys.readouterr().err.startswith("error: no prompt; give it as an argument")


def test_data_goes_to_a_file_in_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = records(here / "in.jsonl")
    assert kvplan_run("--data", data, "-o", "out.jsonl", "--batch-size", 2) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "4 prompts: KV cache" in captured.err
    rows = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row.get("answer") for row in rows] == ["b", None, "r", None]
    assert [row["new_tokens"] for row in rows] == [64, 3, 64, 64] and rows[2]["prompt_tokens"] == 91
    assert kvplan_run("--data", data, "--max-new-tokens", 7, "--json", "--batch-size", 1) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["new_tokens"] for row in alone] == [7] * 4
    for row, other in zip(rows, alone, strict=True):
        words = min(len(row["text"].split()), len(other["text"].split()))
        assert row["text"].split()[:words] == other["text"].split()[:words]


def test_texts_of_data_have_their_ids(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = records(here / "in.jsonl")
    assert kvplan_run("--data", data, "--max-new-tokens", 3, "--json") == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert kvplan_run("--data", data, "--max-new-tokens", 3) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in texts)
    assert [line for line in captured.err.splitlines() if line.startswith("==")] == [f"== {name}" for name in "abcd"]


def test_more_bytes_than_the_full_caches_are_explained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "above 100%: growing layers hold room for the next tokens; full counts none"
    assert kvplan_run(LONG, "--compare", "--max-new-tokens", 20) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "= 111.9% of full" in lines[1] and lines[2] == told
    save_policy(Policy(layers=(LayerPolicy(),) * 2), here / "p.yaml")
    assert kvplan_run(LONG, "--max-new-tokens", 20) == 0
    assert capsys.readouterr().err.splitlines()[1:] == [told]
    assert kvplan_run(LONG, "--compare", "--max-new-tokens", 1) == 0
    assert told not in capsys.readouterr().err


def test_compare_shows_both(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run(LONG, "--compare", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert set(found["full"]) >= FIELDS and found["full"]["kv_bytes"] > found["kv_bytes"]
    assert not found["same_text"] and found["first_difference"] < 64
    told = captured.err.splitlines()
    assert told[0].startswith("policy: KV cache") and told[1].startswith("full:   KV cache")
    assert told[3] == f"the full cache gives another text, from new token {found['first_difference'] + 1} on:"
    assert told[4:] == [f"policy> {found['text']}", f"full>   {found['full']['text']}"]
    assert kvplan_run("a b", "--compare", "--max-new-tokens", 4) == 0
    assert "the full cache gives the same tokens" in capsys.readouterr().err


def test_compare_of_data_counts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run("--data", records(here / "in.jsonl"), "--compare", "--max-new-tokens", 4, "-o", "o") == 0
    assert "of 4 prompts give the same tokens as with the full cache" in capsys.readouterr().err


def test_a_floor_that_binds_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run("a b c d", "--max-new-tokens", 2) == 0
    told = "min_slots binds for this prompt of 4 tokens: layers 0 may hold 16 tokens, above their percentage"
    assert told in capsys.readouterr().err
    assert kvplan_run("--data", records(here / "in.jsonl"), "--max-new-tokens", 2, "-o", "o") == 0
    assert "min_slots binds for 2 of 4 prompts (at most 3 tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("a", "--data", "x"), "PROMPT and --data both give prompts; keep one"),
        (("a", "--prompt-file", "x"), "PROMPT and --prompt-file both give prompts; keep one"),
        (("a", "-o", "x"), "-o goes with --data; the text of a single prompt goes to stdout"),
        (("a", "--stream", "--json"), "--stream prints the text of one prompt; leave out --json"),
        (("a", "--temperature", "inf"), "--temperature inf is not a temperature; write for example 0.7"),
        (("",), "the prompt: the prompt is empty"),
        ((), "standard input: the prompt is empty"),
        (("--prompt-file", "gone.txt"), "gone.txt: cannot read the prompt (No such file or directory)"),
        (("--data", "gone.jsonl"), "gone.jsonl: cannot read the file of prompts (No such file or directory)"),
        (("--data", "empty.jsonl"), "empty.jsonl: the file is empty"),
        (("--data", "in.jsonl", "-o", "no/out"), "no/out: cannot write there (No such file or directory)"),
        (("--data", "in.jsonl", "-o", "."), ".: a folder; name a file"),
        (
            (LONG, "--max-new-tokens", "200"),
            "the prompt: 90 prompt + 200 new tokens, but the model's context is 256; "
            "shorten the prompt, or give --max-new-tokens 166",
        ),
        (
            (f"{LONG} {LONG} {LONG}",),
            "the prompt: 270 prompt + 64 new tokens, but the model's context is 256; shorten the prompt by 78 tokens",
        ),
    ],
)
def test_bad_input_is_one_line(
    here: Path,
    argv: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records(here / "in.jsonl")
    (here / "empty.jsonl").write_text("\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    before = sorted(here.iterdir())
    assert kvplan_run(*argv) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")
    assert sorted(here.iterdir()) == before


def test_another_models_policy(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(replace(POLICY, model={**SHAPE, "fingerprint": "sha256:" + "0" * 32}), here / "p.yaml")
    assert kvplan_run("a") == 2
    captured = capsys.readouterr()
    assert "made for another model" in captured.err and captured.err.endswith("give it with --model\n")
    assert kvplan_run("a", "--model", folder) == 2
    assert "model.fingerprint: the policy was made for another model" in capsys.readouterr().err


def test_the_policys_own_model_is_the_default(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvplan.loading, "BUNDLED_FOLDER", here / "nothing")
    save_policy(replace(POLICY, provenance={"model": str(folder)}), here / "p.yaml")
    assert kvplan_run("a b", "--max-new-tokens", 2) == 0
    save_policy(replace(POLICY, provenance={"model": "./gone"}), here / "p.yaml")
    capsys.readouterr()
    assert kvplan_run("a b") == 2
    told = "error: ./gone: no such folder; the policy names this model, --model takes another\n"
    assert capsys.readouterr().err == told


def test_bytes_above_the_plan_exit_1(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvplan.runtime.cache, "plan", lambda p, s, rows, n: plan(p, s, [1 for _ in rows], 0))
    assert kvplan_run("--data", records(here / "in.jsonl"), "-o", "out.jsonl") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: the cache holds ")
    assert captured.out == "" and not (here / "out.jsonl").exists()


def test_interrupt_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvplan.runtime.generation

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kvplan.runtime.generation, "generate", interrupt)
    data = records(here / "in.jsonl")
    assert kvplan_run("--data", data, "-o", "out.jsonl") == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "p.yaml"]


def test_chat_templates_hand_over_to_the_assistant(tiny_tokenizer: Any) -> None:
    import copy

    chat = copy.deepcopy(tiny_tokenizer)
    chat.chat_template = TEMPLATE
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    talk = parse_record({"id": "1", "task": "t", "messages": messages}, "here:1")
    plain = parse_record({"id": "2", "task": "t", "prompt": "b", "answer": "c"}, "here:2")
    assert chat.decode(request_ids(talk, chat)) == "s a u b z"
    assert chat.decode(request_ids(plain, chat)) == "u b z"
    assert tiny_tokenizer.decode(request_ids(talk, tiny_tokenizer)) == "a b"
    assert tiny_tokenizer.decode(request_ids(plain, tiny_tokenizer)) == "b"
    assert expected_answer(talk) == expected_answer(plain) == "c"


def test_a_prompt_that_is_not_utf8_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run("a \udcff b") == 2
    assert "the prompt: character 3 is half a character" in capsys.readouterr().err


def test_a_policy_or_data_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = records(here / "in.jsonl")
    before = data.read_text()
    for output in ("in.jsonl", "p.yaml"):
        assert kvplan_run("--data", "in.jsonl", "-o", output) == 2
        assert capsys.readouterr().err == f"error: {output}: this command reads that file; name another one to write\n"
    assert data.read_text() == before


def test_a_temperature_that_overflows_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvplan_run("a", "--temperature", "1e-300") == 2
    assert capsys.readouterr().err == "error: --temperature 1e-300 is too small; 0 takes the likeliest token\n"


def test_a_policy_of_another_shape_is_named(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(Policy(layers=(LAYER,) * 3), here / "p.yaml")
    assert kvplan_run("a", "--model", folder) == 2
    assert capsys.readouterr().err.startswith("error: p.yaml: the policy has 3 layers, the model 2; ")
