import re
from pathlib import Path
from random import Random

import pytest

from kvplan.demo.stream import LOSS_WEIGHT, TASKS, document, encode
from kvplan.demo.world import SPECIAL_TOKENS, SPLITS, Document, Words, ask, split_tokens, vocabulary


def test_vocabulary_has_no_token_twice_and_starts_with_the_special_ones():
    tokens = vocabulary()
    assert len(set(tokens)) == len(tokens)
    assert tuple(tokens[:4]) == SPECIAL_TOKENS


@pytest.mark.parametrize("kind", ["names", "places", "variables"])
def test_splits_share_no_word(kind):
    sets = [set(getattr(Words(split), kind)) for split in SPLITS]
    assert len(set.union(*sets)) == sum(len(s) for s in sets) == len(getattr(Words(), kind))


def test_splits_share_no_number():
    rng = Random(0)
    drawn = [{Words(split).number(rng) for _ in range(2000)} for split in SPLITS]
    assert not (drawn[0] & drawn[1] or drawn[0] & drawn[2] or drawn[1] & drawn[2])
    assert all(len(number) == 4 for numbers in drawn for number in numbers)


def test_variable_chains_end_in_the_number_that_they_started_from():
    doc = Document(Random(3))
    said = [doc.variable(hops).text for hops in (0, 0, 1, 1, 2, 2)]
    values = dict(re.fullmatch(r"Here (\w+) (\w+)\.", text).groups() for text in said)
    for item in doc.items:
        name = item.question.removeprefix("What is ").rstrip("?")
        while name in values:
            name = values[name]
        assert name == item.answer


def test_a_variable_needs_a_source():
    assert Document(Random(0)).variable(1) is None


def test_votes_are_asked_only_with_a_clear_lead():
    doc = Document(Random(1))
    doc.vote()
    assert doc.vote_item() is None
    while (item := doc.vote_item()) is None:
        doc.vote()
    counts = doc._votes.most_common(2)
    assert item.answer == counts[0][0]
    assert len(counts) == 1 or counts[0][1] >= counts[1][1] + 2


def test_question_and_answer_follow_other_text():
    doc = Document(Random(2))
    doc.fact()
    question, answer = ask(doc.items[0])
    name = doc.items[0].lead.removeprefix(" Code of ")
    assert question.text == f"Question: What is the code of {name}? Answer: Code of {name}"
    assert re.fullmatch(r"\d{4};", answer.text)


@pytest.mark.parametrize("kind", ["fact", "hidden", "passkey", "song"])
def test_an_answer_repeats_the_statement(kind):
    doc = Document(Random(5))
    said = getattr(doc, kind)().text
    question, answer = ask(doc.items[0])
    assert said == question.text.split("Answer: ")[1] + " " + answer.text.removesuffix(";") + "."


def test_numbers_are_two_tokens():
    assert split_tokens("Code of Ala 0471.")[-3:] == [" 04", "71", "."]


def test_a_training_document_has_the_asked_length_and_every_token_is_known():
    for seed in range(5):
        ids, weights, tasks = document(Random(seed), 256)
        assert len(ids) == len(weights) == len(tasks) == 257
        assert 1 not in ids
        assert set(weights[1:].tolist()) <= {float(w) for w in weights.dtype.type(list(LOSS_WEIGHT.values()))}
        assert tasks.max() < len(TASKS)
        assert (weights[tasks >= 0] == 1.0).all()


def test_a_training_document_depends_on_its_seed_only():
    first, again, other = (document(Random(seed), 128)[0].tolist() for seed in (7, 7, 8))
    assert first == again != other


def test_encode_knows_every_word_of_the_world():
    assert encode("Code of Ala 0471.") == [vocabulary().index(t) for t in split_tokens("Code of Ala 0471.")]


def test_the_model_card_states_the_size_of_the_vocabulary():
    page = (Path(__file__).parents[2] / "docs" / "demo-model.md").read_text(encoding="utf-8")
    assert f"of {len(vocabulary())} kinds" in " ".join(page.split())
