from __future__ import annotations

import optuna
import pytest
from search_fakes import FakeProfile

from kvplan.errors import StudyError
from kvplan.policy.schema import Target
from kvplan.search.budget import Budget
from kvplan.search.decisions import BASIC, KINDS, Decisions, decisions, names
from kvplan.search.layer_groups import parse_groups
from kvplan.search.space import SearchSpace, space_for

PROFILE = FakeProfile(codecs=("int8/dense", "dense/int8"))
BUDGET = Budget(spec=PROFILE.spec, target=Target(share=4000), context_tokens=1000)


def space(*kinds: str, groups: int | None = None) -> SearchSpace:
    return space_for(PROFILE, BUDGET, Decisions(kinds), groups=groups)[1]  # type: ignore[arg-type]


def searched(space: SearchSpace) -> set[str]:
    """What a trial suggests, without the groups' letters."""
    trial = optuna.create_study().ask()
    space.suggest(trial)
    return {name.split(".")[0] for name in trial.params}


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (("budget",), {"split", "scale"}),
        (("evictor",), {"evictor"}),
        (("codec",), {"evictor"}),
        (("budget", "sharing"), {"split", "scale", "shared_layers"}),
        (("budget", "heads"), {"split", "scale", "split_heads"}),
        (("budget", "channels"), {"split", "scale", "dropped_channels"}),
        (BASIC, {"split", "scale", "evictor", "shared_layers"}),
        (KINDS, {"split", "scale", "evictor", "shared_layers", "split_heads", "dropped_channels", "snapkv"}),
    ],
)
def test_just_the_chosen_decisions_are_searched(kinds: tuple[str, ...], found: set[str]) -> None:
    chosen = space(*kinds)
    assert searched(chosen) == found
    for start in chosen.warm_starts():
        assert chosen.params(chosen.flat(start.params)) == start.params
        assert {name.split(".")[0] for name in chosen.flat(start.params)} == found


def test_without_evictor_or_codec_there_is_one_left() -> None:
    assert space("budget").evictors == ["h2o"]
    assert space("codec").evictors == ["h2o", "h2o+dense/int8", "h2o+int8", "profile"]
    assert {name.partition("+")[2] for name in space("evictor").evictors} == {""}


def test_halves_share_a_method_until_there_are_trials_for_every_group() -> None:
    few, many = (
        space_for(PROFILE, BUDGET, Decisions(BASIC, halves=halves), groups=4)[1]  # type: ignore[arg-type]
        for halves in (True, False)
    )
    assert (few.method_names, many.method_names) == (["ab", "ab", "cd", "cd"], ["a", "b", "c", "d"])
    trial = optuna.create_study().ask()
    chosen = few.suggest(trial).evictors
    assert chosen[0] == chosen[1] == trial.params["evictor.ab"] and chosen[2] == chosen[3] == trial.params["evictor.cd"]
    assert few.params(few.flat(few.suggest(trial))) == few.suggest(trial)
    assert decisions(129).halves and not decisions(130).halves


def test_more_is_decided_when_there_are_trials_for_it() -> None:
    assert decisions(60).kinds == BASIC
    assert decisions(100).kinds == (*BASIC, "heads", "channels")
    assert decisions(150).kinds == KINDS
    assert decisions(60, without=["sharing"]).kinds == ("budget", "evictor", "codec")
    assert decisions(10, only=["params", "budget"], without=["budget"]).kinds == ("params",)


def test_decisions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(StudyError, match="--only evictors: no such decision; choose among: budget, evictor"):
        decisions(10, only=["evictors"])
    with pytest.raises(StudyError, match="--without x"):
        decisions(10, without=["x"])
    with pytest.raises(StudyError, match="leave nothing to decide"):
        decisions(10, only=["codec"], without=["codec"])
    assert names(["a,b", " c ,"]) == ["a", "b", "c"]


def test_groups_are_as_told() -> None:
    layers = [0, 1, 2, 3, 5, 6]
    assert parse_groups(None, layers) is None
    assert parse_groups("3", layers) == 3
    assert parse_groups("0-1,3/2/5-6", layers) == [[0, 1, 3], [2], [5, 6]]
    assert len(space(*BASIC, groups=2).group_names) == 2
    for text, told in {
        "0": "give a number of groups",
        "a/b": "give a number of groups",
        "3-1/0,1,2,3,5,6": "give a number of groups",
        "0-3/3,5-6": "layer 3 is in two groups",
        "0-3/4-6": "layer 4 has no budget to plan; those that have: 0-3,5-6",
        "0-3/5": "layer 6 is in no group",
    }.items():
        with pytest.raises(StudyError, match=told):
            parse_groups(text, layers)
