"""Prompts to measure on: JSON-lines records, text files and `datasets`, as tokens.

Tokens of an `Example`: the prompt is prefilled (and then compressed), the continuation is teacher-forced after it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from kvplan.calibrate.datasets_source import load_dataset_split
from kvplan.calibrate.examples import Example, Limits, encode, encode_prompt, halve, to_example
from kvplan.calibrate.records import read_prompt_file, read_records, type_name
from kvplan.errors import DataError

MIN_WINDOW_TOKENS = 32
MAX_DATASET_WINDOWS = 256


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
        text = read_prompt_file(Path(source))
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


def _refuse_duplicates(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"id {name!r} appears in two of the given sources; ids must differ")
        seen.add(name)


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
        prompt, continuation = halve([*start_ids, *window], limits.continuation, source)
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
            raise DataError(f"{source}: row {index}: {column}: expected text, found {type_name(text)}")
        examples += _windows(f"{Path(source).name}:{index}", text, tokenizer, limits, keep_short=False)
        if len(examples) >= max_prompts:
            break
    if not examples:
        raise DataError(f"{source}: no row of {column!r} has {MIN_WINDOW_TOKENS} tokens or more")
    return examples[:max_prompts]
