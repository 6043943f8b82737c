"""What a record asks the model for: the tokens to generate from, and the answer that it expects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from kvplan.calibrate.chat import apply_template, merge_roles, segments
from kvplan.calibrate.examples import encode, encode_prompt
from kvplan.calibrate.records import Message, Record
from kvplan.errors import DataError


def request_ids(record: Record, tokenizer: Any) -> list[int]:
    """Tokens of everything before the first answer.

    With a chat template, the conversation is rendered by it (a `prompt` as the user's message) up to where the
    assistant speaks. Without one, the text is read as it is.

    Raises:
        DataError: the prompt has no token, or the chat template cannot render it.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = _asked(record.messages) or [Message("user", record.prompt or "")]
        text = apply_template(record, tokenizer, merge_roles(messages), generate=True)
        ids = encode_prompt(tokenizer, text, rendered=True)
    else:
        prompt, pieces = segments(record, tokenizer)
        ids = encode_prompt(tokenizer, prompt, rendered=False)
        for piece, _ in takewhile(lambda piece: not piece[1], pieces):
            ids += encode(tokenizer, piece)
    if not ids:
        raise DataError(f"{record.where}: the prompt has no token")
    return ids


def expected_answer(record: Record) -> str | None:
    """The record's answer, or the assistant's first message."""
    return record.answer or next((m.content for m in record.messages if m.role == "assistant"), None)


def _asked(messages: Sequence[Message]) -> list[Message]:
    return list(takewhile(lambda message: message.role != "assistant", messages))
