"""Prompts in the demo world: a context that says things all over, and questions that come after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from kvplan.demo.world import Document, Item, Piece, Words, ask, split_tokens

TASKS = ("fact", "passkey", "facts", "hidden", "hops1", "hops2", "song", "vote", "story", "mixed")
MAX_NEW_TOKENS = 12
# One cycle of a data file. Story is last, since it is never asked about and so never question-aware.
CYCLE = ("facts", "mixed", "hops1", "hidden", "fact", "song", "mixed", "hops2", "facts", "passkey", "vote", "story")


@dataclass(frozen=True)
class Recipe:
    """What a task's document says, besides the story, and how many questions it is asked.

    Args:
        says: (statement, how many) pairs in the order in which they may be said; hops need their sources first.
        asks: Names of the items that the questions are drawn from.
        num_questions: Questions asked in turn.
    """

    says: tuple[tuple[str, int], ...]
    asks: tuple[str, ...]
    num_questions: int


RECIPES = {
    "fact": Recipe((("fact", 1),), ("fact",), 1),
    "passkey": Recipe((("passkey", 1),), ("passkey",), 1),
    "facts": Recipe((("fact", 10), ("hidden", 4), ("hops0", 4)), ("fact",), 4),
    "hidden": Recipe((("hidden", 10), ("fact", 4)), ("hidden",), 4),
    "hops1": Recipe((("hops0", 6), ("hops1", 6)), ("hops1",), 4),
    "hops2": Recipe((("hops0", 5), ("hops1", 5), ("hops2", 5)), ("hops2",), 4),
    "song": Recipe((("song", 5),), ("song",), 2),
    "vote": Recipe((("vote", 14),), ("vote",), 1),
    "story": Recipe((), (), 0),
    "mixed": Recipe(
        (
            *(("fact", 4), ("hidden", 4), ("hops0", 4), ("hops1", 3), ("hops2", 2)),
            *(("passkey", 1), ("song", 2), ("vote", 6)),
        ),
        ("fact", "hidden", "hops0", "hops1", "hops2", "passkey", "song"),
        6,
    ),
}


def count_tokens(text: str) -> int:
    """Tokens of `text`, without `<bos>`."""
    return len(split_tokens(text))


def _say(document: Document, kind: str) -> Piece | None:
    if kind.startswith("hops"):
        return document.variable(int(kind.removeprefix("hops")))
    return getattr(document, kind)()


def _statements(document: Document, recipe: Recipe, rng: Random) -> list[Piece]:
    """Every statement of the recipe, kinds mixed; a variable always follows the one that it is set to."""
    kinds = [kind for kind, count in recipe.says for _ in range(count)]
    rng.shuffle(kinds)
    # Sorting only the hops among themselves keeps every other kind anywhere.
    hops = iter(sorted(kind for kind in kinds if kind.startswith("hops")))
    kinds = [next(hops) if kind.startswith("hops") else kind for kind in kinds]
    pieces = [piece for kind in kinds if (piece := _say(document, kind)) is not None]
    while "vote" in recipe.asks and document.vote_item() is None:
        pieces.append(document.vote())
    return pieces


def _items(document: Document, recipe: Recipe, rng: Random) -> list[Item]:
    if "vote" in recipe.asks:
        return [item] if (item := document.vote_item()) else []
    pool = [item for item in document.items if item.task in recipe.asks]
    return rng.sample(pool, recipe.num_questions)


def _context(document: Document, statements: list[Piece], num_tokens: int, rng: Random) -> str:
    """The statements in their order, spread evenly at random over story sentences, in at most `num_tokens` tokens."""
    left = num_tokens - sum(count_tokens(piece.text) for piece in statements)
    story = []
    while (size := count_tokens((piece := document.story()).text)) <= left:
        story.append(piece)
        left -= size
    places = set(rng.sample(range(len(story) + len(statements)), len(statements)))
    said, told = iter(statements), iter(story)
    ordered = [next(said if i in places else told) for i in range(len(story) + len(statements))]
    return " ".join(piece.text for piece in ordered)


def make_record(name: str, words: Words, task: str, num_tokens: int, question_aware: bool = False) -> dict[str, Any]:
    """One JSON record.

    Args:
        name: Its id, and the seed of everything random in it.
        words: The split's words.
        task: A key of `RECIPES`.
        num_tokens: Most tokens of `<bos>`, context, questions and answers together.
        question_aware: Ask one question inside the prompt, instead of several after it.
    """
    rng, recipe = Random(name), RECIPES[task]
    document = Document(rng, words, cast_size=rng.randint(3, 6))
    statements = _statements(document, recipe, rng)
    if not recipe.num_questions:
        return {"id": name, "task": task, "prompt": _context(document, statements, num_tokens - 1, rng)}
    items = _items(document, recipe, rng)
    turns = [ask(item) for item in (items[:1] if question_aware else items)]
    asked = sum(count_tokens(piece.text) for turn in turns for piece in turn)
    context = _context(document, statements, num_tokens - 1 - asked, rng)
    if question_aware:
        question, answer = turns[0]
        prompt = f"{context} {question.text}"
        aware = {"answer": answer.text, "question_aware": True, "max_new_tokens": MAX_NEW_TOKENS}
        return {"id": name, "task": task, "prompt": prompt, **aware}
    messages = [{"role": "user", "content": context}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer.text}]
    return {"id": name, "task": task, "messages": messages, "max_new_tokens": MAX_NEW_TOKENS}


def records(split: str, num_records: int, tokens: tuple[int, int], label: str = "") -> Iterator[dict[str, Any]]:
    """The tasks in turn, in the words of `split`; two records of every twelve are question-aware.

    Args:
        split: A name in `world.SPLITS`.
        num_records: How many.
        tokens: Least and most tokens of a whole record.
        label: Added to ids, and so to seeds, so that two series of one split differ.
    """
    words = Words(split)
    for i in range(num_records):
        cycle, place = divmod(i, len(CYCLE))
        first = (cycle * 4 + 3) % 11
        name = f"{split}-{label}{i:03d}-{CYCLE[place]}"
        length = Random(f"{name}/length").randint(*tokens)
        yield make_record(name, words, CYCLE[place], length, place in (first, (first + 5) % 11))
