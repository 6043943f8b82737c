"""generated(): a task's prompts, as long as asked for, in the tokens of the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from kvplan.calibrate.examples import Example, to_example
from kvplan.check.cases import length_generated
from kvplan.check.tasks.base import Task, tasks
from kvplan.errors import DataError

# Of a context's tokens. A tokenizer of subwords has none; one of another vocabulary has nothing but.
MAX_UNKNOWN = 0.02


def generated(
    name: str,
    tokenizer: Any,
    context_tokens: int,
    samples: int,
    *,
    ways: Sequence[bool] = (False, True),
    seed: int = 0,
) -> list[Example]:
    """Cases of one task, each as long as fits.

    Args:
        name: In the registry of tasks.
        context_tokens: Most tokens of a prompt with its questions and answers.
        samples: Cases; each is asked in every way.
        ways: `question_aware`, false and true. A task that asks nothing is made once.
        seed: With the task's name, the length and the case's number, decides everything random.

    Raises:
        MethodError: there is no such task.
        DataError: the context is too short for the task, or the tokenizer does not know its words.
    """
    task = tasks[name]()
    made = []
    for number in range(samples):
        for aware in ways:
            made.append(_fitted(task, tokenizer, context_tokens, f"{name}-{context_tokens}-{seed}-{number}", aware))
            if not made[-1].answers:
                break
    return made


def _fitted(task: Task, tokenizer: Any, limit: int, seed: str, aware: bool) -> Example:
    """The longest case of at most `limit` tokens, or one that is at most a few sentences shorter."""

    def example(size: int) -> Example:
        record = task.case(Random(seed), size).record(
            f"{seed}-{'aware' if aware else 'agnostic'}", task.name, f"task {task.name}", question_aware=aware
        )
        return to_example(record, tokenizer)

    size, step = task.least_size, 16
    best = example(size)
    refuse_unknown(best, tokenizer, f"task {task.name}")
    if length(best) > limit:
        raise DataError(
            f"task {task.name}: {length(best)} tokens are the least that it takes; --context is {limit}, raise it"
        )
    per_unit = max((length(example(size + step)) - length(best)) / step, 1e-9)
    # Units differ in length, so the first guess is off by a few: go on from where it lands.
    for _ in range(4):
        guess = size + int((limit - length(best)) / per_unit)
        if guess <= size:
            break
        made = example(guess)
        while length(made) > limit and guess > size + 1:
            guess = max(size + 1, guess - max(1, round((length(made) - limit) / per_unit)))
            made = example(guess)
        if length(made) > limit or length(made) <= length(best):
            break
        size, best = guess, made
    return best


def length(example: Example) -> int:
    """Tokens of the prompt and of all that follows it, whether it is the true text or generated."""
    return max(len(example.prompt_ids) + len(example.continuation_ids), length_generated(example))


def unknown_share(examples: Sequence[Example], tokenizer: Any) -> float:
    """Share of the tokens that stand for words which the tokenizer does not know."""
    ids = [i for e in examples for i in (*e.prompt_ids, *e.continuation_ids)]
    return ids.count(tokenizer.unk_token_id) / len(ids) if tokenizer.unk_token_id is not None and ids else 0.0


def refuse_unknown(example: Example, tokenizer: Any, where: str) -> None:
    """Raises: DataError: the tokenizer does not know the words, or those of an answer."""
    share = unknown_share([example], tokenizer)
    lost = any(i == tokenizer.unk_token_id for a, b in example.answers for i in example.continuation_ids[a:b])
    if share > MAX_UNKNOWN or (lost and tokenizer.unk_token_id is not None):
        raise DataError(
            f"{where}: the tokenizer does not know {share:.0%} of its words, so its scores would mean nothing; take "
            "another model, or prompts in this model's own words (--data)"
        )
