import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from kvplan.demo.data import calib_data_path
from kvplan.demo.make_data import split_text
from kvplan.demo.prompts import CYCLE, TASKS, count_tokens, make_record
from kvplan.demo.world import NAMES, PLACES, SPLITS, VARIABLES, Words
from kvplan.errors import DataError

SIZES = {"calibrate": 48, "search": 96, "heldout": 300}


def read(split):
    return [json.loads(line) for line in calib_data_path(split).read_text(encoding="utf-8").splitlines()]


def whole_text(record):
    if "messages" in record:
        return " ".join(m["content"] for m in record["messages"])
    return f"{record['prompt']} {record.get('answer', '')}".strip()


@pytest.mark.parametrize("split", SPLITS)
def test_the_shipped_file_is_remade_byte_for_byte(split):
    assert calib_data_path(split).read_bytes() == split_text(split).encode()


def test_splits_share_no_name_place_variable_or_number():
    used = {}
    for split in SPLITS:
        words = set(re.findall(r"\w+", calib_data_path(split).read_text(encoding="utf-8")))
        numbers = {w for w in words if re.fullmatch(r"\d{4}", w)}
        used[split] = (words & {*NAMES, *PLACES, *VARIABLES}) | numbers
        assert len(numbers) > 50
    for a, b in combinations(SPLITS, 2):
        assert not used[a] & used[b]


def test_splits_share_no_seed():
    # An id is its record's seed.
    ids = [record["id"] for split in SPLITS for record in read(split)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("split", SPLITS)
def test_every_record_fits_its_length(split):
    records = read(split)
    assert len(records) == SIZES[split]
    for record in records:
        limit, least = (2048, 1900) if "-long-" in record["id"] else (1024, 900 if split == "heldout" else 570)
        assert least <= 1 + count_tokens(whole_text(record)) <= limit


@pytest.mark.parametrize("split", SPLITS)
def test_a_sixth_is_question_aware(split):
    records = read(split)
    aware = [r for r in records if r.get("question_aware")]
    assert len(aware) == len(records) // 6
    assert all("prompt" in r and "Answer:" in r["prompt"] and r["answer"].endswith(";") for r in aware)


def test_the_first_records_are_a_mix_of_all_tasks():
    for split in SPLITS:
        assert {r["task"] for r in read(split)[: len(CYCLE) * 5 // 4]} == set(TASKS)


def test_the_data_are_small():
    assert sum(calib_data_path(split).stat().st_size for split in SPLITS) < 3e6


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("story", "vote")])
def test_the_context_says_what_is_asked_and_never_asks(task):
    record = make_record("prompts-0", Words("heldout"), task, 1024)
    context, *turns = [m["content"] for m in record["messages"]]
    assert "Question" not in context
    answers = [t.removesuffix(";") for t in turns[1::2]]
    assert len(answers) == len(turns) / 2
    assert all(answer in context for answer in answers)


def test_statements_are_spread_over_the_context():
    record = make_record("prompts-1", Words("heldout"), "facts", 1024)
    context = record["messages"][0]["content"]
    places = [m.start() / len(context) for m in re.finditer(r"Code of", context)]
    assert len(places) == 10
    assert min(places) < 0.3 and max(places) > 0.7


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="no split 'train' \\(known: calibrate, search, heldout\\)"):
        calib_data_path("train")


def test_the_installed_copy_comes_first(monkeypatch, tmp_path):
    import kvplan.demo.data as data

    package = tmp_path / "kvplan" / "demo"
    (package / "calib_data").mkdir(parents=True)
    (tmp_path / "calib_data").mkdir()
    monkeypatch.setattr(data, "__file__", str(package / "data.py"))
    with pytest.raises(DataError, match="make_data"):
        data.calib_data_path("search")
    (tmp_path / "calib_data" / "search.jsonl").touch()
    assert data.calib_data_path("search") == Path(tmp_path / "calib_data" / "search.jsonl").resolve()
    (package / "calib_data" / "search.jsonl").touch()
    assert data.calib_data_path("search") == (package / "calib_data" / "search.jsonl").resolve()
