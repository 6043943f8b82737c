from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from byte_model import byte_tokenizer

from kvplan.check.scorers import scorers
from kvplan.check.tasks import generated, tasks
from kvplan.check.tasks.build import length
from kvplan.errors import DataError, MethodError


@pytest.mark.parametrize("name", tasks.names())
def test_every_answer_is_told_in_the_context(name: str) -> None:
    for seed in range(5):
        case = tasks[name]().case(Random(seed), 40)
        for turn in case.turns:
            assert all(answer.rstrip(".") in case.context for answer in turn.answers)
        assert case.scorer in scorers


@pytest.mark.parametrize("name", tasks.names())
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("context", [1600, 6000])
def test_every_task_fills_the_length_that_is_asked_for(name: str, chat: bool, context: int) -> None:
    made = generated(name, byte_tokenizer(chat), context, 2)
    for example in made:
        assert length(example) <= context
        assert length(example) > 0.8 * context
        assert len(example.references) == len(example.answers)
    assert len({example.id for example in made}) == len(made)


@pytest.mark.parametrize("name", sorted(set(tasks.names()) - {"continuation"}))
def test_both_ways_of_asking_are_made(name: str) -> None:
    tokenizer = byte_tokenizer()
    agnostic, aware = generated(name, tokenizer, 2500, 1)
    assert (agnostic.question_aware, aware.question_aware) == (False, True)
    case = tasks[name]().case(Random(f"{name}-2500-0-0"), 8)
    words = case.turns[0].question.split()[-1]
    # Agnostic: the question comes after what is compressed. Aware: with it, so that the answer comes next.
    assert agnostic.answers[0][0] > 0 and aware.answers[0][0] == 0
    assert tokenizer.decode(aware.prompt_ids).endswith(words)
    assert not tokenizer.decode(agnostic.prompt_ids).endswith(words)


def test_the_same_seed_makes_the_same_prompts() -> None:
    tokenizer = byte_tokenizer()
    first, again = (generated("niah", tokenizer, 1500, 2) for _ in range(2))
    assert first == again
    assert first != generated("niah", tokenizer, 1500, 2, seed=1)


def test_the_common_words_are_the_most_common() -> None:
    for seed in range(5):
        case = tasks["aggregation"]().case(Random(seed), 200)
        words = case.context.removeprefix("Here is a list of words: ").rstrip(".").split(", ")
        (a, n), (b, m), (_, rest) = Counter(words).most_common(3)
        assert {a, b} == set(case.turns[0].answers) and min(n, m) > 2 * rest


def test_variables_are_set_before_they_are_compared_with() -> None:
    case = tasks["variable_tracking"]().case(Random(3), 20)
    known: dict[str, str] = {}
    for said in case.context.split(". "):
        words = said.rstrip(".").split()
        if said.endswith("coins") and words[1:2] == ["has"] and words[2].isdigit():
            known[words[0]] = words[2]
        elif " has as many coins as " in said:
            known[words[0]] = known[words[-1]]
    turn = case.turns[0]
    assert known[turn.question.split()[-2]] == turn.answers[0]


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"task niah: \d+ tokens are the least that it takes; --context is 50, raise it"
    ):
        generated("niah", byte_tokenizer(), 50, 1)


def test_a_tokenizer_of_other_words_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"task niah: the tokenizer does not know \d+% of its words"):
        generated("niah", tiny_tokenizer, 500, 1)


def test_an_unknown_task_is_named_with_the_closest() -> None:
    with pytest.raises(MethodError, match="did you mean 'passkey'"):
        generated("paskey", byte_tokenizer(), 500, 1)
