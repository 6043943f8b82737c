"""Prompts as a JSON-lines file says them: parsed, checked, not yet tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvplan.calibrate.datasets_source import first_line
from kvplan.errors import DataError, KVPlanError
from kvplan.files import read_text

ROLES = ("system", "user", "assistant")
_FIELD_TYPES = {
    "id": str,
    "task": str,
    "prompt": str,
    "messages": list,
    "answer": str,
    "answers": list,
    "scorer": str,
    "max_new_tokens": int,
    "question_aware": bool,
}
_PROMPTS = ("prompt", "messages")
# Where a record has neither, the file may be of another kind.
_SUITE_HINT = (
    "; records have id, task and prompt or messages; "
    "kvplan eval and check read the file of a public suite with --suite NAME:FILE"
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One line of a JSON-lines file: either a `prompt` or `messages`.

    Attributes:
        where: Its `file:line`.
        answers: What else counts as right, `answer` included; for the only answer of a record.
        scorer: What judges the generated answers, by name; None: whether every token of the answer is predicted.
    """

    id: str
    task: str
    where: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    max_new_tokens: int | None = None
    question_aware: bool = False
    answers: tuple[str, ...] = ()
    scorer: str | None = None


def read_records(path: str | Path) -> list[Record]:
    """Parse and check a JSON-lines file. Blank lines are skipped.

    Raises:
        DataError: the file is missing or empty, or a line is malformed, named as `file:line`.
    """
    records: list[Record] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(read_prompt_file(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({first_line(error)})") from error
        record = parse_record(data, where)
        if record.id in seen:
            raise DataError(f"{where}: id {record.id!r} was used before, at {seen[record.id]}")
        seen[record.id] = where
        records.append(record)
    if not records:
        raise DataError(f"{path}: the file is empty")
    return records


def parse_record(data: Any, where: str) -> Record:
    """Check one JSON record. Fields that mean nothing here are ignored, unless they look like a misspelled one.

    Raises:
        DataError: a field is missing, unknown or of the wrong type; the text starts with `where`.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected a JSON object, found {type_name(data)}")
    hint = "" if any(name in data for name in _PROMPTS) else _SUITE_HINT
    for name, value in data.items():
        if name in _FIELD_TYPES:
            _check_type(value, _FIELD_TYPES[name], f"{where}: {name}")
            if isinstance(value, str):
                check_text(value, f"{where}: {name}")
        elif near := get_close_matches(name, _FIELD_TYPES, n=1, cutoff=0.8):
            told = "" if near[0] in _PROMPTS else hint
            raise DataError(f"{where}: unknown field {name!r}; did you mean {near[0]!r}?{told}")
    for name in ("id", "task"):
        if name not in data:
            raise DataError(f"{where}: field {name!r} is missing{hint}")
    if ("prompt" in data) == ("messages" in data):
        found = "both" if "prompt" in data else "neither"
        raise DataError(f"{where}: a record has either 'prompt' or 'messages'; this one has {found}{hint}")
    if data.get("max_new_tokens", 1) < 1:
        raise DataError(f"{where}: max_new_tokens: must be at least 1, found {data['max_new_tokens']}")
    for name in ("id", "task", "prompt", "answer"):
        if not data.get(name, "-").strip():
            raise DataError(f"{where}: {name}: is empty")
    if "messages" in data and "answer" in data:
        raise DataError(f"{where}: 'answer' goes with 'prompt'; in 'messages' the assistant's turns are the answers")
    messages = _parse_messages(data["messages"], where) if "messages" in data else ()
    known = {name: value for name, value in data.items() if name in _FIELD_TYPES}
    if "answers" in data:
        known |= _parse_answers(data, messages, where)
    return Record(**{**known, "messages": messages}, where=where)


def _parse_answers(data: Any, messages: tuple[Message, ...], where: str) -> dict[str, Any]:
    """`answers`, and the `answer` that is predicted token by token: the first of them, unless one is given."""
    answers = data["answers"]
    for i, answer in enumerate(answers):
        _check_type(answer, str, f"{where}: answers[{i}]")
        check_text(answer, f"{where}: answers[{i}]")
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError(f"{where}: answers: is empty, or holds an empty text")
    if messages and sum(m.role == "assistant" for m in messages) != 1:
        raise DataError(f"{where}: 'answers' are of one answer; these messages do not have exactly one")
    return {"answers": tuple(answers), **({} if messages else {"answer": data.get("answer", answers[0])})}


def _parse_messages(items: list[Any], where: str) -> tuple[Message, ...]:
    messages = []
    for i, item in enumerate(items):
        place = f"{where}: messages[{i}]"
        _check_type(item, dict, place)
        if set(item) != {"role", "content"}:
            found = ", ".join(sorted(item)) or "nothing"
            raise DataError(f"{place}: needs exactly 'role' and 'content', found {found}")
        for name in ("role", "content"):
            _check_type(item[name], str, f"{place}.{name}")
        check_text(item["content"], f"{place}.content")
        if item["role"] not in ROLES:
            raise DataError(f"{place}.role: unknown role {item['role']!r} (known: {', '.join(ROLES)})")
        if not item["content"].strip():
            raise DataError(f"{place}.content: is empty")
        messages.append(Message(**item))
    if not messages:
        raise DataError(f"{where}: messages: is empty")
    if messages[0].role == "assistant":
        raise DataError(f"{where}: messages[0].role: the first message is the prompt, so it cannot be the assistant's")
    return tuple(messages)


def _check_type(value: Any, kind: type, where: str) -> None:
    # JSON true is not a number, though Python's bool is an int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}
        raise DataError(f"{where}: expected {names[kind]}, found {type_name(value)}")


def check_text(text: str, where: str) -> None:
    """Raises: DataError: `text` cannot be written as UTF-8, so no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half a character ({text[error.start]!r}); write the text as UTF-8"
        ) from error


def type_name(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def read_prompt_file(path: Path) -> str:
    try:
        return read_text(path, "file of prompts")
    except KVPlanError as error:
        raise DataError(str(error)) from error
