"""Endless training documents: every sequence asks many questions, so that recall is learned from dense supervision."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import numpy as np

from kvplan.demo.world import Document, Item, Piece, Words, ask, split_tokens, vocabulary

BOS_ID = 2
LOSS_WEIGHT = {"story": 0.2, "statement": 0.02, "question": 0.02, "answer": 1.0}
MIX = (2.0, 1.0, 0.3, 1.5, 2.0, 2.0, 0.8, 1.0)  # of the statements, in the order of TASKS
CHAIN_MIX = (0.0, 0.0, 0.0, 2.0, 3.0, 1.5, 0.0, 0.0)
TASKS = ("fact", "hidden", "passkey", "hops0", "hops1", "hops2", "song", "vote")


@lru_cache(maxsize=1)
def _ids() -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary())}


def encode(text: str) -> list[int]:
    ids = _ids()
    return [ids[token] for token in split_tokens(text)]


def _statement(doc: Document, kind: str) -> Piece | None:
    if kind.startswith("hops"):
        return doc.variable(int(kind[-1]))
    return getattr(doc, kind)()


def document(rng: Random, num_tokens: int, chain_share: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training sequence.

    Args:
        chain_share: How often a document holds nothing but chains of variables.

    Returns:
        ids [T + 1] int64, weights [T + 1] float32 (loss weight of predicting that token), and
        tasks [T + 1] int8 (index into `TASKS` for the tokens of answers asked for the first time, -1 elsewhere).
    """
    doc = Document(rng, Words(), cast_size=rng.randint(2, 6))
    ids, weights, tasks = [BOS_ID], [0.0], [-1]
    # Chains of variables are learned last, from documents that hold nothing else.
    only_chains = rng.random() < chain_share
    mix = list(CHAIN_MIX) if only_chains else [rng.gammavariate(0.7, 1.0) * w for w in MIX]
    # Short documents leave little room for a story: first things first.
    story_share = rng.choice((0.0, 0.0, 0.3) if num_tokens <= 128 else (0.0, 0.2, 0.5, 0.8))
    question_share = rng.uniform(0.3, 0.5)
    if only_chains:
        story_share = 0.0

    asked: set[Item] = set()

    def emit(piece: Piece, first_time: bool = False) -> None:
        tokens = encode(piece.text)
        ids.extend(tokens)
        weights.extend([LOSS_WEIGHT[piece.kind]] * len(tokens))
        counted = piece.kind == "answer" and first_time
        tasks.extend([TASKS.index(piece.task) if counted else -1] * len(tokens))
        if counted:
            tasks[-1] = -1  # the end mark is no part of what is recalled

    while len(ids) <= num_tokens:
        if rng.random() < story_share:
            emit(doc.story())
            continue
        if (doc.items or doc.vote_item()) and rng.random() < question_share:
            vote = doc.vote_item()
            fresh = [item for item in doc.items if item not in asked]
            pool = fresh if fresh and rng.random() < 0.8 else doc.items
            urgency = [3.0 if chain_share and item.task in ("hops1", "hops2") else 1.0 for item in pool]
            item = vote if vote and (not pool or rng.random() < 0.15) else rng.choices(pool, urgency)[0]
            for piece in ask(item):
                emit(piece, item not in asked)
            asked.add(item)
            continue
        statement = _statement(doc, rng.choices(TASKS, mix)[0])
        emit(statement if statement is not None else doc.story())
    end = num_tokens + 1
    return np.asarray(ids[:end]), np.asarray(weights[:end], np.float32), np.asarray(tasks[:end], np.int8)
