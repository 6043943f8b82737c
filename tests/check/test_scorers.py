from __future__ import annotations

import pytest

from kvplan.check.scorers import scorers

# Worked out by hand: SQuAD's F1 of two words in common out of 3 and 2 is 2 * (2/3 * 1) / (2/3 + 1) = 0.8; ROUGE-L
# of "the cat sat" and "the dog sat down": the longest common subsequence is 2, P = 2/3, R = 2/4, F = 4/7.
CASES = [
    ("exact", "The Answer.", ["answer"], 1.0),
    ("exact", "\n answer\nQuestion: another", ["answer"], 1.0),
    ("exact", "answer two", ["answer"], 0.0),
    ("exact", "b", ["a", "b"], 1.0),
    ("substring", "It is 4821, surely", ["4821"], 1.0),
    ("substring", "PARIS", ["paris", "rome"], 1.0),
    ("substring", "48 21", ["4821"], 0.0),
    ("all_substrings", "red and blue", ["blue", "red"], 1.0),
    ("all_substrings", "red and green", ["blue", "red"], 0.5),
    ("f1", "blue round box", ["round box"], 0.8),
    ("f1", "nothing", ["round box"], 0.0),
    ("f1", "box", ["round box", "box"], 1.0),
    ("rouge_l", "the cat sat", ["the dog sat down"], 4 / 7),
    ("rouge_l", "the cat sat", ["no", "the cat sat"], 1.0),
    ("number", "so it is 1,234 apples. #### 1234", ["x #### 1234"], 1.0),
    ("number", "5 and 6 make 11.0", ["#### 11"], 1.0),
    ("number", "11 and then 6", ["#### 11"], 0.0),
    ("number", "#### 11\nQuestion: what is 3 + 4?", ["#### 11"], 1.0),
    ("number", "none", ["#### 11"], 0.0),
    ("numbers", "Paragraph 3", ["Paragraph 3"], 1.0),
    ("numbers", "1, 2, 3, 4", ["Paragraph 3"], 0.25),
    ("numbers", "no", ["3"], 0.0),
    ("edit_similarity", "# a remark\nreturn x\nmore", ["return x"], 1.0),
    ("edit_similarity", "", ["return x"], 0.0),
]


@pytest.mark.parametrize(("name", "text", "references", "score"), CASES)
def test_scores_by_hand(name: str, text: str, references: list[str], score: float) -> None:
    assert scorers[name]().score(text, references) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("name", scorers.names())
def test_every_scorer_stays_in_range_and_knows_a_right_answer(name: str) -> None:
    right = "word 42"
    assert scorers[name]().score(right, [right]) == pytest.approx(1.0)
    for text in ("", "\n", "???", "word word word", "42 43", "é" * 50):
        assert 0 <= scorers[name]().score(text, [right, "other 7"]) <= 1
