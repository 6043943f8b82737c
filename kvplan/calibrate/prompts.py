"""Prompts to measure on: JSON-lines records, text files and `datasets`, as tokens.

Tokens of an `Example`: the prompt is prefilled (and then compressed), the continuation is teacher-forced after it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any

from kvplan.calibrate.datasets_source import first_line, load_dataset_split
from kvplan.errors import DataError, KVPlanError
from kvplan.files import read_text

ROLES = ("system", "user", "assistant")
MIN_WINDOW_TOKENS = 32
DEFAULT_WINDOW_TOKENS = 1024
MAX_DATASET_WINDOWS = 256
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

Span = tuple[int, int]


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


@dataclass(frozen=True)
class Example:
    """One prompt as tokens.

    Attributes:
        id: Unique among the examples loaded together.
        task: What it tests; "text" where the source does not say.
        prompt_ids: Prefilled, then compressed.
        continuation_ids: Teacher-forced on the compressed cache.
        answers: [start, end) spans of `continuation_ids` that are scored as answers.
        question_aware: The prompt already holds the question.
        text: The prompt as text.
        max_new_tokens: How much to generate, where the record says so.
        references: The texts that count as right, for each of `answers`.
        scorer: What judges generated answers, where the record says so.
    """

    id: str
    task: str
    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    answers: tuple[Span, ...]
    question_aware: bool
    text: str
    max_new_tokens: int | None
    references: tuple[tuple[str, ...], ...] = ()
    scorer: str | None = None


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. `window` is the longest text taken whole from a source without records."""

    max_tokens: int | None
    context: int | None
    continuation: int

    @property
    def window(self) -> int:
        limit = min(self.context or DEFAULT_WINDOW_TOKENS, DEFAULT_WINDOW_TOKENS)
        return limit if self.max_tokens is None else self.max_tokens


def load_examples(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    max_prompts: int | None = None,
    max_tokens: int | None = None,
    context_limit: int | None = None,
    continuation_tokens: int = 64,
    column: str | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Example]:
    """Read every source.

    `.jsonl` holds records. `.txt` is cut into consecutive windows. Anything else is a `datasets` name, folder or file
    whose rows of text are cut likewise, in an order drawn by `seed`; at most `MAX_DATASET_WINDOWS` of them when
    `max_prompts` is not given.

    Args:
        sources: Paths, or names of `datasets`.
        tokenizer: A transformers tokenizer. With a chat template, `messages` are rendered by it.
        max_prompts: Most examples; the first ones, taken from the sources in turn.
        max_tokens: Longest prompt (records) or window (text). A longer prompt of a record keeps its *last* tokens.
        context_limit: Most tokens of prompt and continuation that the model can read.
        continuation_tokens: Tokens predicted at the end of a text without answers; at most a quarter of the text.
        column: The column with text in a `datasets` source; "text" unless told.
        split: The split of a `datasets` source, needed where it has several.
        seed: Draws rows of a `datasets` source.

    Raises:
        DataError: a source is missing, empty or malformed, or a prompt is longer than the context.
    """
    if max_prompts is not None and max_prompts < 1:
        raise DataError(f"at least one prompt is needed, not {max_prompts}")
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"prompts of at most {max_tokens} tokens leave nothing to measure; allow 2 or more")
    if context_limit is not None and max_tokens is not None and max_tokens > context_limit:
        raise DataError(f"--max-tokens {max_tokens} is more than the model's context of {context_limit} tokens")
    if not sources:
        raise DataError("no prompts were given")
    limits = Limits(max_tokens, context_limit, continuation_tokens)
    loaded = [_load(str(source), tokenizer, limits, max_prompts, column, split, seed) for source in sources]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*loaded))
    examples = [example for example in turns if example is not None][:max_prompts]
    _refuse_duplicates(example.id for example in examples)
    return examples


def _load(
    source: str,
    tokenizer: Any,
    limits: Limits,
    max_prompts: int | None,
    column: str | None,
    split: str | None,
    seed: int,
) -> list[Example]:
    suffix = Path(source).suffix.lower()
    if suffix in (".jsonl", ".txt") and (column is not None or split is not None):
        raise DataError(f"{source}: --column and --split choose inside a dataset; this is a {suffix} file")
    if suffix == ".jsonl":
        return [to_example(r, tokenizer, limits) for r in read_records(Path(source))[:max_prompts]]
    if suffix == ".txt":
        text = _read(Path(source))
        windows = list(_windows(source, text, tokenizer, limits, keep_short=True))
        if not windows:
            raise DataError(f"{source}: the file is empty")
        return windows[:max_prompts]
    return _dataset_examples(source, tokenizer, limits, max_prompts or MAX_DATASET_WINDOWS, column, split, seed)


def data_fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over ids and tokens, whatever the paths they came from."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.id, e.prompt_ids, e.continuation_ids, e.answers]).encode() + b"\n")
    return "sha256:" + digest.hexdigest()[:32]


# Records


def read_records(path: str | Path) -> list[Record]:
    """Parse and check a JSON-lines file. Blank lines are skipped.

    Raises:
        DataError: the file is missing or empty, or a line is malformed, named as `file:line`.
    """
    records: list[Record] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(_read(Path(path)).split("\n"), 1):
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
        raise DataError(f"{where}: expected a JSON object, found {_type_name(data)}")
    for name, value in data.items():
        if name in _FIELD_TYPES:
            _check_type(value, _FIELD_TYPES[name], f"{where}: {name}")
            if isinstance(value, str):
                check_text(value, f"{where}: {name}")
        elif near := get_close_matches(name, _FIELD_TYPES, n=1, cutoff=0.8):
            raise DataError(f"{where}: unknown field {name!r}; did you mean {near[0]!r}?")
    for name in ("id", "task"):
        if name not in data:
            raise DataError(f"{where}: field {name!r} is missing")
    if ("prompt" in data) == ("messages" in data):
        found = "both" if "prompt" in data else "neither"
        raise DataError(f"{where}: a record has either 'prompt' or 'messages'; this one has {found}")
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
        raise DataError(f"{where}: expected {names[kind]}, found {_type_name(value)}")


def check_text(text: str, where: str) -> None:
    """Raises: DataError: `text` cannot be written as UTF-8, so no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half a character ({text[error.start]!r}); write the text as UTF-8"
        ) from error


def _type_name(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _read(path: Path) -> str:
    try:
        return read_text(path, "file of prompts")
    except KVPlanError as error:
        raise DataError(str(error)) from error


def _refuse_duplicates(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"id {name!r} appears in two of the given sources; ids must differ")
        seen.add(name)


# Records to tokens


def to_example(record: Record, tokenizer: Any, limits: Limits | None = None) -> Example:
    """Tokenize one record.

    Messages: the first is the prompt (with a system message before it, if any), the rest the continuation, the
    assistant's turns the answers. A prompt with an answer: the answer is the continuation. A prompt alone: its last
    tokens are the continuation.

    Raises:
        DataError: the record is longer than the context, or the chat template cannot render it.
    """
    limits = limits or Limits(None, None, 64)
    prompt, pieces = segments(record, tokenizer)
    prompt_ids = _cut(encode_prompt(tokenizer, prompt, rendered=_is_chat(record, tokenizer)), limits.max_tokens)
    text = prompt
    continuation: list[int] = []
    answers: list[Span] = []
    references: list[tuple[str, ...]] = []
    for piece, is_answer in pieces:
        start = len(continuation)
        continuation += encode(tokenizer, piece)
        if is_answer:
            answers.append((start, len(continuation)))
            references.append(record.answers or (piece.strip(),))
    _check_length(record.where, len(prompt_ids) + len(continuation), limits)
    if not continuation:
        prompt_ids, continuation = _halve(prompt_ids, limits.continuation, record.where)
        text = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return Example(
        id=record.id,
        task=record.task,
        prompt_ids=tuple(prompt_ids),
        continuation_ids=tuple(continuation),
        answers=tuple(answers),
        question_aware=record.question_aware,
        text=text,
        max_new_tokens=record.max_new_tokens,
        references=tuple(references),
        scorer=record.scorer,
    )


def _is_chat(record: Record, tokenizer: Any) -> bool:
    return bool(record.messages) and bool(getattr(tokenizer, "chat_template", None))


def segments(record: Record, tokenizer: Any) -> tuple[str, list[tuple[str, bool]]]:
    """The prompt's text, and the continuation as (text, is it an answer) pieces."""
    if record.prompt is not None:
        return record.prompt, [] if record.answer is None else [(_spaced(record.answer), True)]
    if _is_chat(record, tokenizer):
        return _render(record, tokenizer)
    first = _num_prompt_messages(record)
    prompt = "\n\n".join(m.content for m in record.messages[:first])
    return prompt, [(_spaced(m.content), m.role == "assistant") for m in record.messages[first:]]


def _spaced(text: str) -> str:
    """Text as it follows other text. The bundled tokenizer reads it the same with or without the space."""
    return text if text[0].isspace() else " " + text


def _num_prompt_messages(record: Record) -> int:
    is_prompt = [m.role != "system" for m in record.messages]
    return is_prompt.index(True) + 1 if True in is_prompt else len(is_prompt)


def _render(record: Record, tokenizer: Any) -> tuple[str, list[tuple[str, bool]]]:
    """Render the conversation by the chat template and cut it behind the prompt's own words.

    Neighbours of one role become one turn, since many templates insist on taking turns.
    """
    first = _num_prompt_messages(record)
    turns = merge_roles(record.messages)
    whole = apply_template(record, tokenizer, turns, generate=False)
    end = _find(record, whole, record.messages[first - 1].content, 0)
    prompt, cursor, pieces = whole[:end], end, []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = apply_template(record, tokenizer, turns[:i], generate=True)
        before = max(cursor, _num_common(whole, asked))
        end = _find(record, whole, turn["content"], before)
        start = end - len(turn["content"].strip())
        pieces += [(whole[cursor:start], False), (whole[start:end], True)]
        cursor = end
    return prompt, [piece for piece in [*pieces, (whole[cursor:], False)] if piece[0]]


def _num_common(a: str, b: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def merge_roles(messages: Sequence[Message]) -> list[dict[str, str]]:
    groups = itertools.groupby(messages, key=lambda m: m.role)
    return [{"role": role, "content": "\n\n".join(m.content for m in group)} for role, group in groups]


def apply_template(record: Record, tokenizer: Any, turns: list[dict[str, str]], *, generate: bool) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # A template is a program of its author's and may raise anything.
        problem = f"the tokenizer's chat template cannot render these messages ({first_line(error)})"
        raise DataError(f"{record.where}: {problem}") from error


def _find(record: Record, whole: str, content: str, start: int) -> int:
    """Where `content` ends in the rendered conversation; templates strip it."""
    place = whole.find(content.strip(), start)
    if place < 0:
        raise DataError(
            f"{record.where}: the tokenizer's chat template does not repeat a message as it is,"
            " so prompt and answers cannot be told apart; give 'prompt' and 'answer' instead of 'messages'"
        )
    return place + len(content.strip())


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode_prompt(tokenizer: Any, text: str, *, rendered: bool) -> list[int]:
    """With the tokenizer's first special tokens, unless a chat template has written them."""
    if rendered:
        return encode(tokenizer, text)
    ids = list(tokenizer(text, verbose=False).input_ids)
    # Some tokenizers end every text; a prompt goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _cut(ids: list[int], max_tokens: int | None) -> list[int]:
    """The last `max_tokens` of a prompt."""
    return ids if max_tokens is None else ids[-max_tokens:]


def _check_length(where: str, num_tokens: int, limits: Limits) -> None:
    if limits.context is not None and num_tokens > limits.context:
        cut = limits.max_tokens is not None
        hint = "lower --max-tokens" if cut else "--max-tokens N keeps the last N tokens of each prompt"
        raise DataError(f"{where}: {num_tokens} tokens, but the model's context is {limits.context}; {hint}")


def _halve(ids: list[int], continuation_tokens: int, where: str) -> tuple[list[int], list[int]]:
    """A text without answers: the last tokens, at most a quarter, are what is predicted."""
    size = max(min(continuation_tokens, len(ids) // 4), 1)
    if len(ids) < 2:
        raise DataError(f"{where}: the prompt has {len(ids)} token(s); at least 2 are needed")
    return ids[:-size], ids[-size:]


# Plain text and datasets


def _windows(source: str, text: str, tokenizer: Any, limits: Limits, *, keep_short: bool) -> Iterator[Example]:
    """Consecutive windows of a text; one shorter than `MIN_WINDOW_TOKENS` only if alone and `keep_short`."""
    ids = encode(tokenizer, text)
    start_ids = encode_prompt(tokenizer, "a", rendered=False)[: -len(encode(tokenizer, "a")) or None]
    size = max(limits.window - len(start_ids), 1)
    for number, start in enumerate(range(0, len(ids), size)):
        window = ids[start : start + size]
        if len(window) < MIN_WINDOW_TOKENS and len(window) < size and (start or not keep_short):
            return
        name = f"{Path(source).name}:{number}"
        prompt, continuation = _halve([*start_ids, *window], limits.continuation, source)
        decoded = tokenizer.decode(prompt, skip_special_tokens=True)
        yield Example(name, "text", tuple(prompt), tuple(continuation), (), False, decoded, None)


def _dataset_examples(
    source: str, tokenizer: Any, limits: Limits, max_prompts: int, column: str | None, split: str | None, seed: int
) -> list[Example]:
    rows = load_dataset_split(source, split)
    column = column or "text"
    if column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise DataError(f"{source}: no column {column!r} (columns: {known}); choose with --column")
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    examples: list[Example] = []
    for index in order:
        text = rows[index][column]
        if not isinstance(text, str):
            raise DataError(f"{source}: row {index}: {column}: expected text, found {_type_name(text)}")
        examples += _windows(f"{Path(source).name}:{index}", text, tokenizer, limits, keep_short=False)
        if len(examples) >= max_prompts:
            break
    if not examples:
        raise DataError(f"{source}: no row of {column!r} has {MIN_WINDOW_TOKENS} tokens or more")
    return examples[:max_prompts]
