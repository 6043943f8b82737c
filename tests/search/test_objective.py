from __future__ import annotations

import math

import pytest

from kvplan.errors import StudyError
from kvplan.search.objective import Judge, Objective, parse_floors
from kvplan.stats import PromptScores

NAN = math.nan


def scores(kl: float, task: tuple[float, ...]) -> PromptScores:
    n = len(task)
    return PromptScores((kl,) * n, (1.0,) * n, task, (1.0,) * n)


def test_each_objective_ranks_as_it_says() -> None:
    close, right = scores(0.1, (0.5, 0.5)), scores(0.4, (1.0, 0.9))
    for kind, best in (("kl", close), ("task", right), ("mixed", right)):
        assert min((close, right), key=Objective(kind).loss) is best
    assert Objective("kl").loss(close) == pytest.approx(math.log(0.1))
    assert Objective("mixed").loss(right) == pytest.approx(math.log(0.4 + 0.05))
    # Among equal answers the nearer to the full cache wins.
    assert Objective("task").loss(scores(0.1, (1.0,))) < Objective("task").loss(scores(0.2, (1.0,)))


@pytest.mark.parametrize("kind", ["kl", "task", "mixed"])
def test_a_score_that_is_not_finite_is_no_loss(kind: str) -> None:
    assert math.isnan(Objective(kind).loss(scores(NAN, (1.0,))))
    assert math.isnan(Objective(kind).loss(scores(math.inf, (1.0,))))


def test_a_policy_that_keeps_its_floors_comes_before_a_better_one_that_does_not() -> None:
    judge = Judge(Objective("kl", {"fact": 0.9}), ("fact", "song", "fact", "song"))
    prompts = [0, 1, 2, 3]
    good, lost = scores(0.5, (1.0, 0.0, 1.0, 0.0)), scores(0.1, (0.5, 1.0, 1.0, 1.0))
    assert judge.rank(good, prompts) < judge.rank(lost, prompts)
    assert judge.shortfalls(lost, prompts) == {"fact": pytest.approx(0.15)}
    assert judge.rank(good, prompts)[0] == 0.0
    # On prompts of its own subset, by index.
    assert judge.shortfalls(scores(0.1, (0.2, 0.9)), [1, 2]) == {"fact": pytest.approx(0.0)}


def test_what_the_prompts_cannot_tell_is_refused() -> None:
    tasks, answered = ["fact", "text"], [True, False]
    Objective("mixed", {"fact": 0.9}).check(tasks, answered)
    Objective("kl").check(["text"], [False])
    with pytest.raises(StudyError, match="--floor text: no prompt of that task has an answer; choose among: fact"):
        Objective("kl", {"text": 0.5}).check(tasks, answered)
    for objective, told in (
        (Objective("task"), "--objective task: no prompt has an answer to be right about; use --objective kl$"),
        (Objective("kl", {"fact": 0.5}), "--floor: no prompt has an answer to be right about; drop --floor$"),
        (Objective("task", {"fact": 0.5}), "use --objective kl and drop --floor$"),
    ):
        with pytest.raises(StudyError, match=told):
            objective.check(["fact"], [False])
    with pytest.raises(StudyError, match="--objective accuracy: no such objective; choose among: kl, task, mixed"):
        Objective("accuracy")


def test_floors_are_read() -> None:
    assert parse_floors(["fact=0.95", "two=hops=90%"]) == {"fact": 0.95, "two=hops": 0.9}
    for bad in ("fact", "=0.9", "fact=", "fact=2", "fact=high"):
        with pytest.raises(StudyError, match="like fact=0.95"):
            parse_floors([bad])
