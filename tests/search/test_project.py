from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplan.errors import TargetError
from kvplan.search.project import project


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[int], int, list[int], list[int]]:
    L = draw(st.integers(1, 12))
    raw = draw(st.lists(st.floats(0, 1e6), min_size=L, max_size=L))
    cost = draw(st.lists(st.integers(1, 600), min_size=L, max_size=L))
    floor = draw(st.lists(st.integers(0, 500), min_size=L, max_size=L))
    cap = [f + draw(st.integers(0, 10_000)) for f in floor]
    least = sum(f * c for f, c in zip(floor, cost, strict=True))
    most = sum(u * c for u, c in zip(cap, cost, strict=True))
    return raw, cost, draw(st.integers(least, most + 1000)), floor, cap


@given(problems())
def test_projected_split_fits_and_leaves_nothing_affordable(problem: tuple) -> None:
    _, cost, total, floor, cap = problem
    units = project(*problem)
    left = total - sum(u * c for u, c in zip(units, cost, strict=True))
    assert all(f <= u <= c for f, u, c in zip(floor, units, cap, strict=True))
    assert left >= 0
    assert all(u == top or c > left for u, top, c in zip(units, cap, cost, strict=True))


@given(problems())
def test_projecting_twice_changes_nothing(problem: tuple) -> None:
    _, cost, total, floor, cap = problem
    units = project(*problem)
    assert project([float(u) for u in units], cost, total, floor, cap) == units


@given(problems())
def test_layers_between_their_bounds_keep_their_proportions(problem: tuple) -> None:
    raw, _, total, floor, cap = problem
    units = project(raw, [1] * len(raw), max(total // 600, sum(floor)), floor, cap)
    least = 1e-9 * max(raw)  # below it a weight counts as `least`, lest it be 0
    free = [i for i, r in enumerate(raw) if floor[i] + 1 < units[i] < cap[i] - 1 and r > least]
    for i in free:
        for j in free:
            assert abs(units[j] - units[i] * raw[j] / raw[i]) <= 1.001 * (raw[j] / raw[i] + 1)


@pytest.mark.parametrize(
    ("raw", "total", "floor", "cap", "expected"),
    [
        ([10, 20, 30, 100], 160, [16] * 4, [64] * 4, [16, 32, 48, 64]),
        ([1, 1, 1], 100, [0] * 3, [100] * 3, [34, 33, 33]),
        ([242, 166, 90, 14], 512, [8] * 4, [480] * 4, [242, 166, 90, 14]),
        ([288] * 5 + [80] * 3, 1680, [64] * 8, [1000] * 8, [288] * 5 + [80] * 3),
        ([17.4718, 16.8474, 15.7770, 13.9038], 64, [4] * 4, [100] * 4, [17, 17, 16, 14]),
        ([0, 1], 100, [0, 0], [100, 60], [40, 60]),
        ([0, 0], 10, [0, 0], [100, 100], [5, 5]),
    ],
)
def test_goldens(raw: list[float], total: int, floor: list[int], cap: list[int], expected: list[int]) -> None:
    assert project(raw, [1] * len(raw), total, floor, cap) == expected


def test_floors_above_the_total_are_refused() -> None:
    with pytest.raises(TargetError, match="the smallest split costs 30 bytes; the target is 29 bytes"):
        project([1, 1], [3, 3], 29, [5, 5], [9, 9])
