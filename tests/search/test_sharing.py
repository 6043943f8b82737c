from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_fakes import spec_of

from kvplan.search.sharing import rankers, sharing_map

PAIRS = [(i, j) for i in range(8) for j in range(i)]


@given(order=st.permutations(PAIRS), num=st.integers(0, 8), windows=st.sets(st.integers(0, 7)))
def test_no_layer_shares_from_a_sharer_or_a_later_layer(order: list, num: int, windows: set[int]) -> None:
    source_of = sharing_map(order, spec_of(windows=sorted(windows)), num)
    assert len(source_of) <= num
    assert not set(source_of) & set(source_of.values())
    assert all(source < i for i, source in source_of.items())
    assert not (set(source_of) | set(source_of.values())) & windows


@pytest.mark.parametrize("name", list(rankers))
def test_ranking_holds_every_pair_once(name: str) -> None:
    distances = [(i, j, (i * 7 + j * 3) % 5 / 5) for i, j in PAIRS]
    assert sorted(rankers[name]().rank(distances)) == sorted(PAIRS)


def test_kvsharer_shares_the_most_distant_pair_and_similar_the_closest() -> None:
    distances = [(1, 0, 0.5), (2, 0, 0.9), (2, 1, 0.1)]
    assert rankers["kvsharer"]().rank(distances)[0] == (2, 0)
    assert rankers["similar"]().rank(distances)[0] == (2, 1)


def test_chains_collapse_to_the_layer_that_stores() -> None:
    assert sharing_map([(3, 2), (2, 0), (5, 3)], spec_of(), 8) == {3: 0, 2: 0, 5: 0}


def test_a_short_ranking_shares_fewer_layers() -> None:
    assert sharing_map([(1, 0)], spec_of(), 3) == {1: 0}
