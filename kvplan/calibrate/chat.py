"""A record as text: its prompt, and what follows, with a tokenizer's chat template or without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from kvplan.calibrate.datasets_source import first_line
from kvplan.calibrate.records import Message, Record
from kvplan.errors import DataError


def is_chat(record: Record, tokenizer: Any) -> bool:
    return bool(record.messages) and bool(getattr(tokenizer, "chat_template", None))


def segments(record: Record, tokenizer: Any) -> tuple[str, list[tuple[str, bool]]]:
    """The prompt's text, and the continuation as (text, is it an answer) pieces."""
    if record.prompt is not None:
        return record.prompt, [] if record.answer is None else [(_spaced(record.answer), True)]
    if is_chat(record, tokenizer):
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
