from itertools import combinations

import numpy as np
import pytest

from kvplan.calibrate.groups import cluster_1d, layer_groups

GOLDEN = [0.50, 0.72, 0.74, 0.76, 0.95, 0.96, 0.97, 0.80]


def cost(values, labels):
    return sum(
        ((v := np.array([x for x, c in zip(values, labels, strict=True) if c == k])) - v.mean()).dot(v - v.mean())
        for k in set(labels)
    )


def test_golden_of_squeeze_attention():
    assert cluster_1d(GOLDEN, 3) == [0, 1, 1, 1, 2, 2, 2, 1]


@pytest.mark.parametrize("seed", range(8))
def test_no_split_is_better(seed):
    values = np.random.default_rng(seed).normal(size=9).round(1).tolist()
    found = cost(values, cluster_1d(values, 3))
    order = sorted(values)
    best = min(cost(order, [sum(i >= c for c in cuts) for i in range(9)]) for cuts in combinations(range(1, 9), 2))
    assert found == pytest.approx(best, abs=1e-12)


def test_labels_follow_a_permutation_and_rise_with_the_centroid():
    permutation = [3, 0, 7, 1, 6, 2, 5, 4]
    labels = cluster_1d(GOLDEN, 3)
    assert cluster_1d([GOLDEN[i] for i in permutation], 3) == [labels[i] for i in permutation]
    assert cluster_1d([5.0, -1.0], 2) == [1, 0]


def test_fewer_distinct_values_than_clusters():
    assert cluster_1d([0.3] * 5, 3) == [0] * 5
    assert cluster_1d([0.3, 0.3, 0.9], 3) == [0, 0, 1]
    assert cluster_1d([], 3) == []


def test_groups_are_a_partition_chosen_by_silhouette():
    groups = layer_groups(GOLDEN)
    assert sorted(i for g in groups for i in g) == list(range(8))
    assert [4, 5, 6] in groups
    assert layer_groups([0.1, 0.1, 0.9, 0.9]) == [[0, 1], [2, 3]]
    assert layer_groups([1.0, 1.01, 5.0, 5.01, 9.0, 9.01]) == [[0, 1], [2, 3], [4, 5]]


def test_alike_layers_are_one_group():
    assert layer_groups([0.4] * 6) == [[0, 1, 2, 3, 4, 5]]
    assert layer_groups([0.4]) == [[0]]
    assert layer_groups([]) == []


def test_groups_do_not_depend_on_scale_or_offset():
    assert layer_groups([1000 + 1e-6 * v for v in GOLDEN]) == layer_groups(GOLDEN)
