"""Rows are made up, in the published formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from byte_model import byte_tokenizer

from kvplan.check.scorers import scorers
from kvplan.check.suites import suite_examples, suites
from kvplan.check.suites.longbench import KINDS
from kvplan.errors import DataError, MethodError

DATA = Path(__file__).parent / "data"
FILES = {
    "gsm8k": DATA / "gsm8k.jsonl",
    "longbench": DATA / "hotpotqa.jsonl",
    "ruler": DATA / "niah_multivalue" / "validation.jsonl",
    "loogle": DATA / "longdep_qa.jsonl",
}


def read(name: str, file: Path | None = None, **options: Any) -> Any:
    return suite_examples(f"{name}:{file or FILES[name]}", byte_tokenizer(), **options)


def written(tmp_path: Path, name: str, *rows: Any) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt(example: Any) -> str:
    return byte_tokenizer().decode(example.prompt_ids)


def test_every_suite_has_a_file_here() -> None:
    assert set(FILES) == set(suites.names())


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_suite_reads_its_format(name: str) -> None:
    examples = read(name)
    assert examples and all(example.references and example.answers for example in examples)
    assert all(example.scorer in scorers for example in examples)
    ways = {example.question_aware for example in examples}
    assert ways == ({True} if suites[name].only_aware else {False, True})


def test_gsm8k_solves_four_rows_and_asks_the_others() -> None:
    agnostic, aware = read("gsm8k", samples=1)
    assert prompt(agnostic).count("Question:") == 4 and prompt(aware).count("Question:") == 5
    assert prompt(agnostic).count("####") == 4
    assert agnostic.scorer == "number" and agnostic.references[0][0].endswith("#### 9")


def test_longbench_asks_each_data_set_in_its_way(tmp_path: Path) -> None:
    row = {"input": "Who?", "context": "Ann ran.", "answers": ["Ann", "She"], "length": 2, "language": "en",
           "all_classes": None, "_id": "1"}  # fmt: skip
    for name, kind in KINDS.items():
        agnostic, aware = read("longbench", written(tmp_path, f"{name}.jsonl", {**row, "dataset": name}))
        assert (agnostic.task, agnostic.scorer, agnostic.max_new_tokens) == (name, kind.scorer, kind.max_new_tokens)
        assert agnostic.references == (("Ann", "She"),) and prompt(agnostic) == "Ann ran."
        assert ("Who?" in prompt(aware)) == ("{}" in kind.question)


def test_longbench_in_chinese_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "dureader.jsonl", {"input": "", "context": "x", "answers": ["x"], "dataset": "dureader"})
    with pytest.raises(DataError, match="row 0: unknown English data set of LongBench 'dureader'"):
        read("longbench", path)


def test_ruler_takes_its_task_from_the_folder_and_its_prefix_into_the_prompt() -> None:
    example = read("ruler")[0]
    assert example.task == "niah_multivalue" and example.scorer == "all_substrings"
    assert len(example.references[0]) == 2
    assert prompt(example).endswith("are")


def test_ruler_questions_need_one_of_the_answers(tmp_path: Path) -> None:
    path = written(tmp_path, "qa_1/validation.jsonl", {"index": 0, "input": "Text. Who?", "outputs": ["Al", "Albert"]})
    assert read("ruler", path)[0].scorer == "substring"


def test_ruler_cannot_be_asked_before_its_question() -> None:
    with pytest.raises(DataError, match="suite ruler: its prompts hold their questions"):
        read("ruler", ways=(False,))


def test_loogle_asks_its_pairs_in_turn_on_one_document(tmp_path: Path) -> None:
    pairs = [{"Q": "Who?", "A": "Ann", "S": ["..."]}, {"Q": "Where?", "A": "Here", "S": [".."]}]
    for told in (json.dumps(pairs), str(pairs)):
        agnostic, aware = read("loogle", written(tmp_path, "shortdep_qa.jsonl", {"input": "Doc", "qa_pairs": told}))
        assert len(agnostic.answers) == 2 and agnostic.references == (("Ann",), ("Here",))
        assert len(aware.answers) == 1


def test_loogle_summaries(tmp_path: Path) -> None:
    path = written(tmp_path, "summarization.jsonl", {"input": "Doc", "qa_pairs": "none", "output": "Short."})
    assert read("loogle", path)[0].references == (("Short.",),)


def test_loogle_cloze_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "shortdep_cloze.jsonl", {"input": "Doc", "qa_pairs": "[]"})
    with pytest.raises(DataError, match="cloze tests are not supported"):
        read("loogle", path)


MALFORMED = {
    "gsm8k": ({"question": "Q"}, "row 0: field 'answer' is missing"),
    "longbench": ({"input": "", "context": "", "answers": ["x"], "dataset": "qasper"}, "row 0: context: expected text"),
    "ruler": ({"input": "x", "outputs": []}, "row 0: outputs: expected texts"),
    "loogle": ({"input": "x", "qa_pairs": "[open"}, "row 0: qa_pairs: neither JSON nor a list"),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_a_malformed_row_is_named(tmp_path: Path, name: str) -> None:
    row, told = MALFORMED[name]
    with pytest.raises(DataError, match=told):
        read(name, written(tmp_path, "rows.jsonl", row))


def test_a_result_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: answer: no result behind '####'"):
        read("gsm8k", written(tmp_path, "rows.jsonl", {"question": "Q", "answer": "5"}))


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="suite ruler: no file is named; write --suite ruler:FILE"):
        suite_examples("ruler", byte_tokenizer())
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        suite_examples(f"gsm8k:{tmp_path}/none.jsonl", byte_tokenizer())
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        suite_examples(f"gsm8k:{tmp_path}", byte_tokenizer())
    with pytest.raises(MethodError, match="did you mean 'gsm8k'"):
        suite_examples("gsm8", byte_tokenizer())


def test_a_prompt_that_is_too_long_says_what_to_do() -> None:
    with pytest.raises(DataError, match="--max-tokens"):
        read("longbench", context_limit=100)
    assert max(len(e.prompt_ids) for e in read("longbench", context_limit=3000, max_tokens=60)) == 60
