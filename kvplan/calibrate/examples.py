"""Records to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvplan.calibrate.chat import is_chat, segments
from kvplan.calibrate.records import Record
from kvplan.errors import DataError

DEFAULT_WINDOW_TOKENS = 1024
MIN_PROMPT_TOKENS = 2  # the least that --max-tokens takes

Span = tuple[int, int]


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
    prompt_ids = _cut(encode_prompt(tokenizer, prompt, rendered=is_chat(record, tokenizer)), limits.max_tokens)
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
    _check_length(record.where, len(prompt_ids), len(continuation), limits.context)
    if not continuation:
        prompt_ids, continuation = halve(prompt_ids, limits.continuation, record.where)
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


def _check_length(where: str, prompt_tokens: int, continuation_tokens: int, context: int | None) -> None:
    if context is None or prompt_tokens + continuation_tokens <= context:
        return
    found = (
        f"{prompt_tokens} prompt + {continuation_tokens} continuation" if continuation_tokens else f"{prompt_tokens}"
    )
    fits = context - continuation_tokens
    hint = (
        f"give --max-tokens {fits} or less, which keeps the end of each prompt"
        if fits >= MIN_PROMPT_TOKENS
        else "no --max-tokens leaves room for the questions and answers that follow; leave the record out"
    )
    raise DataError(f"{where}: {found} tokens, but the model's context is {context}; {hint}")


def halve(ids: list[int], continuation_tokens: int, where: str) -> tuple[list[int], list[int]]:
    """A text without answers: the last tokens, at most a quarter, are what is predicted."""
    size = max(min(continuation_tokens, len(ids) // 4), 1)
    if len(ids) < 2:
        raise DataError(f"{where}: the prompt has {len(ids)} token(s); at least 2 are needed")
    return ids[:-size], ids[-size:]
