"""Which layers are decided together: those of alike sensitivity, or what the user says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvplan.calibrate.groups import cluster_1d, layer_groups
from kvplan.errors import StudyError
from kvplan.model_spec import layers_in
from kvplan.search.allocators import knapsack

Groups = int | Sequence[Sequence[int]] | None  # how many, which, or as the sensitivities suggest


def natural_groups(
    curves: Sequence[Mapping[int, Sequence[float]]], layers: Sequence[int], share: float, k: int | None = None
) -> list[list[int]]:
    """Clusters of log KL, each layer with the evictor that suits it best, the least sensitive cluster first.

    Args:
        curves: Per evictor, basis points of the prompt -> KL per layer.
        layers: Those to group.
        share: Basis points at which the layers are compared.
        k: How many groups at most, or None: as many as separate well.
    """
    damage = [min(knapsack.kl_at({s: v[i] for s, v in c.items()}, share) for c in curves) for i in layers]
    values = [math.log(max(kl, knapsack.NO_KL)) for kl in damage]
    if k is None:
        return [[layers[i] for i in group] for group in layer_groups(values)]
    labels = cluster_1d(values, k)
    return [[i for i, label in zip(layers, labels, strict=True) if label == c] for c in sorted(set(labels))]


def parse_groups(text: str | None, layers: Sequence[int]) -> Groups:
    """`3`: so many groups; `0-3/4,6-7/5`: these.

    Args:
        layers: Those that have a budget.

    Raises:
        StudyError: not of that form, or a layer is missing, named twice or has no budget.
    """
    if text is None:
        return None
    try:
        if "/" not in text and "-" not in text and "," not in text:
            if (k := int(text)) < 1:
                raise ValueError
            return k
        found = [[i for part in layers_in(group) for i in part] for group in text.split("/")]
        if not all(found):
            raise ValueError
    except ValueError:
        raise StudyError(f"--groups {text}: give a number of groups, or layers like 0-3/4,6-7/5") from None
    named = [i for group in found for i in group]
    if twice := [i for i in named if named.count(i) > 1]:
        raise StudyError(f"--groups {text}: layer {twice[0]} is in two groups")
    if foreign := [i for i in named if i not in layers]:
        raise StudyError(
            f"--groups {text}: layer {foreign[0]} has no budget to plan; those that have: {_ranges(layers)}"
        )
    if missing := [i for i in layers if i not in named]:
        raise StudyError(f"--groups {text}: layer {missing[0]} is in no group")
    return found


def _ranges(layers: Sequence[int]) -> str:
    """0-3,5."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
