import json
import subprocess
import sys

import pytest

from kvplan.calibrate.prompts import data_fingerprint, load_examples
from kvplan.calibrate.records import read_records
from kvplan.demo.data import calib_data_path
from kvplan.demo.tokenizer import build_tokenizer
from kvplan.errors import DataError

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ 'In' if m.role == 'user' else 'The' }}: {{ m.content.strip() }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}The:{% endif %}"
)
CONTEXT = "The code of Ala is 0471. The cat slept in the road. " * 4
TURNS = [
    {"role": "user", "content": "Question: What is the code of Ala? Answer:"},
    {"role": "assistant", "content": "0471;"},
    {"role": "user", "content": "Question: Where is the cat? Answer:"},
    {"role": "assistant", "content": "road;"},
]
MESSAGES = {
    "id": "m",
    "task": "facts",
    "messages": [{"role": "user", "content": CONTEXT}, *TURNS],
    "max_new_tokens": 12,
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
        return path

    return write


def words(tokenizer, example):
    return [tokenizer.decode(example.continuation_ids[a:b]) for a, b in example.answers]


def test_the_first_message_is_the_prompt_and_the_assistant_answers(tokenizer, write):
    (example,) = load_examples([write(MESSAGES)], tokenizer)
    assert list(example.prompt_ids) == tokenizer.encode(CONTEXT)
    whole = " ".join([CONTEXT, *(t["content"] for t in TURNS)])
    assert [*example.prompt_ids, *example.continuation_ids] == tokenizer.encode(whole)
    assert words(tokenizer, example) == ["0471;", "road;"]
    assert (example.id, example.task, example.max_new_tokens, example.question_aware) == ("m", "facts", 12, False)
    assert example.text == CONTEXT


def test_a_chat_template_renders_the_conversation(chat_tokenizer, write):
    (example,) = load_examples([write(MESSAGES)], chat_tokenizer)
    assert words(chat_tokenizer, example) == ["0471;", "road;"]
    assert example.prompt_ids[0] == 2 and example.prompt_ids.count(2) == 1
    text = chat_tokenizer.decode([*example.prompt_ids, *example.continuation_ids])
    assert text.startswith("<bos> In: The code") and text.endswith("The: road;<eos>")
    assert chat_tokenizer.decode(example.prompt_ids).endswith("in the road.")


def test_a_chat_template_that_refuses_is_named(chat_tokenizer, write):
    path = write({"id": "a", "task": "t", "messages": [{"role": "system", "content": "The."}, *MESSAGES["messages"]]})
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*chat template cannot render.*roles must alternate"):
        load_examples([path], chat_tokenizer)


def test_a_chat_template_that_rewrites_messages_is_refused(chat_tokenizer, write):
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*does not repeat a message as it is"):
        load_examples([write(MESSAGES)], chat_tokenizer)


def test_a_prompt_with_an_answer(tokenizer, write):
    record = {"id": "p", "task": "fact", "prompt": CONTEXT, "answer": "0471;", "question_aware": True}
    (example,) = load_examples([write(record)], tokenizer)
    assert words(tokenizer, example) == ["0471;"]
    assert example.answers == ((0, len(example.continuation_ids)),)
    assert example.question_aware


@pytest.mark.parametrize(("repeats", "expected"), [(1, 5), (20, 64)])
def test_a_prompt_alone_is_continued_by_its_last_tokens(tokenizer, write, repeats, expected):
    record = {
        "id": "p",
        "task": "story",
        "prompt": "The cat slept in the road. In the evening a cat came home. " * repeats,
    }
    (example,) = load_examples([write(record)], tokenizer)
    whole = tokenizer.encode(record["prompt"])
    assert [*example.prompt_ids, *example.continuation_ids] == whole
    assert len(example.continuation_ids) == min(64, len(whole) // 4)
    assert example.answers == ()
    assert tokenizer.encode(example.text) == list(example.prompt_ids)


def test_a_long_prompt_names_line_length_and_remedy(tokenizer, write):
    path = write({"id": "ok", "task": "t", "prompt": "The cat."}, {"id": "p", "task": "t", "prompt": "cat " * 99})
    with pytest.raises(DataError) as error:
        load_examples([path], tokenizer, context_limit=64)
    assert str(error.value) == (
        f"{path}:2: 100 tokens, but the model's context is 64; "
        "give --max-tokens 64 or less, which keeps the end of each prompt"
    )


def test_a_prompt_too_long_for_its_answer_names_the_length_that_fits(tokenizer, write):
    path = write({"id": "p", "task": "t", "prompt": "cat " * 99, "answer": "cat " * 24})
    answer = len(tokenizer.encode("cat " * 24, add_special_tokens=False))
    fits = 64 - answer
    with pytest.raises(DataError) as error:
        load_examples([path], tokenizer, max_tokens=50, context_limit=64)
    assert str(error.value) == (
        f"{path}:1: 50 prompt + {answer} continuation tokens, but the model's context is 64; "
        f"give --max-tokens {fits} or less, which keeps the end of each prompt"
    )
    assert len(load_examples([path], tokenizer, max_tokens=fits, context_limit=64)) == 1
    with pytest.raises(
        DataError, match=r"continuation tokens, but the model's context is \d+; no --max-tokens leaves room"
    ):
        load_examples([path], tokenizer, context_limit=answer)


def test_max_tokens_keeps_the_end_of_a_prompt(tokenizer, write):
    (example,) = load_examples([write(MESSAGES)], tokenizer, max_tokens=20, context_limit=64)
    assert list(example.prompt_ids) == tokenizer.encode(CONTEXT)[-20:]
    assert words(tokenizer, example) == ["0471;", "road;"]


@pytest.mark.parametrize(("num_tokens", "windows"), [(300, [100, 100, 100]), (310, [100, 100, 100]), (10, [11])])
def test_text_is_cut_into_windows(tokenizer, write, num_tokens, windows):
    # <bos> takes one token of each window.
    path = write("cat " * (num_tokens - 3 if num_tokens > 10 else 10), name="a.txt")
    examples = load_examples([path], tokenizer, max_tokens=100)
    assert [len(e.prompt_ids) + len(e.continuation_ids) for e in examples] == windows
    assert all(len(e.continuation_ids) == len(e.prompt_ids + e.continuation_ids) // 4 for e in examples)
    assert examples[0].id == "a.txt:0"


def test_windows_of_text_follow_each_other(tokenizer, write):
    text = next(r.prompt for r in read_records(calib_data_path()) if r.prompt)
    examples = load_examples([write(text, name="a.txt")], tokenizer, max_tokens=80, continuation_tokens=8)
    joined = [i for e in examples for i in (*e.prompt_ids[1:], *e.continuation_ids)]
    assert joined == tokenizer.encode(text)[1:][: len(joined)]
    assert {len(e.continuation_ids) for e in examples[:-1]} == {8}


def test_max_prompts_takes_sources_in_turn(tokenizer, write):
    a = write(*({"id": f"a{i}", "task": "t", "prompt": CONTEXT} for i in range(3)), name="a.jsonl")
    b = write(*({"id": f"b{i}", "task": "t", "prompt": CONTEXT} for i in range(3)), name="b.jsonl")
    assert [e.id for e in load_examples([a, b], tokenizer, max_prompts=3)] == ["a0", "b0", "a1"]


def test_one_id_in_two_sources_is_refused(tokenizer, write):
    with pytest.raises(DataError, match="id 'm' appears in two"):
        load_examples([write(MESSAGES, name="a.jsonl"), write(MESSAGES, name="b.jsonl")], tokenizer)


def test_the_fingerprint_ignores_the_path_and_sees_the_tokens(tokenizer, write):
    here = load_examples([write(MESSAGES, name="a.jsonl")], tokenizer)
    there = load_examples([write(MESSAGES, name="b.jsonl")], tokenizer)
    cut = load_examples([write(MESSAGES)], tokenizer, max_tokens=20)
    assert data_fingerprint(here) == data_fingerprint(there) != data_fingerprint(cut)
    assert data_fingerprint(here).startswith("sha256:")


OK = {"id": "a", "task": "t", "prompt": "The cat."}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        (["{"], ":1: not JSON ("),
        ([OK, "", "nope"], ":3: not JSON ("),
        (["[1]"], ":1: expected a JSON object, found a list"),
        ([{"task": "t", "prompt": "x"}], ":1: field 'id' is missing"),
        ([{"id": "a", "prompt": "x"}], ":1: field 'task' is missing"),
        ([{"id": "a", "task": "t"}], "'prompt' or 'messages'; this one has neither"),
        (
            [{"question": "Q", "answer": "#### 1"}],
            "field 'id' is missing; records have id, task and prompt or messages;",
        ),
        (
            [{"_id": "a", "input": "Q", "context": "C", "answers": ["x"]}],
            "read the file of a public suite with --suite",
        ),
        ([{**OK, "messages": MESSAGES["messages"]}], "'prompt' or 'messages'; this one has both"),
        ([{**OK, "id": 3}], ":1: id: expected text, found a number"),
        ([{**OK, "prompt": None}], ":1: prompt: expected text, found null"),
        ([{**OK, "prompt": "  "}], ":1: prompt: is empty"),
        ([{**OK, "answer": ["x"]}], ":1: answer: expected text, found a list"),
        ([{**OK, "max_new_tokens": True}], ":1: max_new_tokens: expected a whole number, found true or false"),
        ([{**OK, "max_new_tokens": 0}], ":1: max_new_tokens: must be at least 1, found 0"),
        ([{**OK, "question_aware": "yes"}], ":1: question_aware: expected true or false, found text"),
        ([{**OK, "answr": "x"}], ":1: unknown field 'answr'; did you mean 'answer'?"),
        ([OK, OK], ":2: id 'a' was used before, at "),
        ([{"id": "a", "task": "t", "messages": []}], ":1: messages: is empty"),
        ([{"id": "a", "task": "t", "messages": ["x"]}], ":1: messages[0]: expected an object, found text"),
        ([{"id": "a", "task": "t", "messages": [{"role": "user"}]}], "messages[0]: needs exactly 'role' and 'content'"),
        ([{"id": "a", "task": "t", "messages": [{"role": "u", "content": "x"}]}], "messages[0].role: unknown role 'u'"),
        ([{"id": "a", "task": "t", "messages": TURNS[1:]}], "messages[0].role: the first message is the prompt"),
        ([{**MESSAGES, "answer": "x"}], ":1: 'answer' goes with 'prompt'"),
        (['{"id": "a", "max_new_tokens": ' + "9" * 5000 + "}"], ":1: not JSON (Exceeds the limit"),
        (['{"id": "a", "task": "t", "prompt": "ab \\ud800"}'], ":1: prompt: character 4 is half a character"),
    ],
)
def test_a_malformed_file_is_one_line(write, lines, message):
    path = write(*lines)
    with pytest.raises(DataError) as error:
        read_records(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_fields_of_others_are_ignored(write):
    (record,) = read_records(write({**OK, "source": "mine", "level": 3}))
    assert (record.prompt, record.where.rsplit(":", 1)[1]) == ("The cat.", "1")


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "no.json", "no.csv"])
def test_a_missing_file_is_named(tokenizer, tmp_path, name):
    with pytest.raises(DataError, match=name):
        load_examples([tmp_path / name], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompts": 0}, "at least one prompt"),
        ({"max_tokens": 1}, "at most 1 tokens"),
        ({"max_tokens": 99, "context_limit": 64}, "--max-tokens 99 is more than the model's context of 64"),
        ({"column": "text"}, "--column and --split choose inside a dataset"),
    ],
)
def test_options_that_cannot_work_are_refused(tokenizer, write, options, message):
    with pytest.raises(DataError, match=message):
        load_examples([write(OK)], tokenizer, **options)


def test_an_empty_text_file_is_refused(tokenizer, write):
    with pytest.raises(DataError, match="empty"):
        load_examples([write("", name="a.txt")], tokenizer)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_a_local_dataset(tokenizer, write, no_cache):
    path = write(*({"story": "The cat slept in the road. " * n} for n in (1, 20, 30)), name="a.json")
    examples = load_examples([path], tokenizer, column="story", max_tokens=100)
    assert sorted(e.id for e in examples) == ["a.json:1:0", "a.json:1:1", "a.json:2:0", "a.json:2:1"]
    first = load_examples([path], tokenizer, column="story", max_tokens=100, max_prompts=2)
    assert [e.id for e in first] == [e.id for e in examples[:2]]
    with pytest.raises(DataError, match=r"no column 'text' \(columns: story\); choose with --column"):
        load_examples([path], tokenizer)
    with pytest.raises(DataError, match=r"no split 'test' \(splits: train\)"):
        load_examples([path], tokenizer, column="story", split="test")


def test_an_unreachable_dataset_is_one_line(tokenizer, no_cache):
    with pytest.raises(DataError, match="check the name, or give a local file when offline") as error:
        load_examples(["nobody/nothing-here"], tokenizer)
    assert str(error.value).startswith("nobody/nothing-here: ") and "\n" not in str(error.value)


def test_importing_needs_no_torch():
    code = "import sys, kvplan.calibrate.prompts, kvplan.demo.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
