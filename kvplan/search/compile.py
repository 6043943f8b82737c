"""A trial's parameters -> a policy under the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvplan.calibrate.precision import DENSE, WHOLE, Precision
from kvplan.errors import MethodError, ProfileError
from kvplan.methods.channels.think import ThinK
from kvplan.methods.evictors.streaming import Streaming
from kvplan.methods.head_splits.adakv import AdaKV
from kvplan.model_spec import ModelSpec
from kvplan.policy.schema import LayerPolicy, Policy, Target
from kvplan.search.allocators import allocators, knapsack
from kvplan.search.budget import Budget, Protection
from kvplan.search.layer_groups import Groups, natural_groups
from kvplan.search.method import Method, joined, named
from kvplan.search.project import project
from kvplan.search.sharing import rankers, sharing_map
from kvplan.units import BASIS_POINTS

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile

KNAPSACK = "knapsack"
PROFILE = "profile"


@dataclass(frozen=True, kw_only=True)
class Params:
    """One point of the search space.

    Args:
        split: Name of an allocator, or `knapsack`.
        scales: Factor on the split per layer group, before the projection.
        evictors: Method per layer group: an evictor (`snapkv`), one with a codec (`snapkv+int8`), or `profile`: what
            the knapsack picks for each layer.
        shared_layers: How many layers read another layer's cache.
        split_heads: Whether slots go to the KV heads that need them, where the layer's method can do that.
        dropped_channels: Share of the key channels that is not stored, 0 to 1, likewise.
        share: Basis points of the full cache, in a search over several; None: the target's.
        tuned: (evictor, parameter, value) of each parameter that is not at its default.
    """

    split: str
    scales: tuple[float, ...]
    evictors: tuple[str, ...]
    shared_layers: int = 0
    split_heads: bool = False
    dropped_channels: float = 0.0
    share: int | None = None
    tuned: tuple[tuple[str, str, Any], ...] = ()


class Compiler:
    """Turns parameters into policies, for one profile and one target.

    Args:
        profile: Importance, sensitivity and pair distances of the layers.
        budget: The target.
        names: Evictors to choose from; all of the profile's when empty.
        groups: Layers that are decided together, or how many groups of alike sensitivity, the least sensitive first.
        ranker: Name of the ranker of layer pairs.
        codecs: What to choose from beside storing slots as they are: `int8` for keys, values or both,
            `int8/turboquant2` for just that pair; None: all of the profile's.

    Raises:
        ProfileError: the profile holds no sensitivity for a name or a codec.
        TargetError: the target cannot be met with any evictor and codec.
    """

    def __init__(
        self,
        profile: Profile,
        budget: Budget,
        names: Sequence[str] = (),
        groups: Groups = None,
        ranker: str = "kvsharer",
        codecs: Sequence[str] | None = None,
    ) -> None:
        self._curves = dict(profile.sensitivity)
        if not self._curves:
            raise ProfileError("the profile holds no sensitivity; run kvplan calibrate without --no-sensitivity")
        self.names = sorted(set(names or self._curves))
        missing = [name for name in self.names if name not in self._curves]
        if missing:
            raise ProfileError(
                f"the profile holds no sensitivity for {', '.join(missing)}; calibrate with it, or choose among: "
                f"{', '.join(sorted(self._curves))}"
            )
        rounding = _rounding(profile, codecs)
        self.methods = {name: named(name) for name in self.names}
        # A codec rounds whatever stays, so its damage comes on top of what is lost.
        for precision, damage in rounding.items():
            for name in self.names:
                both = joined(name, precision)
                if not all(named(both).runs(budget.spec.layers[i], budget.spec.dtype) for i in budget.layers):
                    continue
                curve = {s: [a + b for a, b in zip(kl, damage, strict=True)] for s, kl in self._curves[name].items()}
                self._curves[both] = {**curve, BASIS_POINTS: damage}
                self.methods[both] = named(both)
        budget.check(self.methods.values())
        self.budget = budget
        self._stand_ins = _stand_ins(self.methods, budget)
        self.precisions = _undominated(rounding, budget)
        self._facts = profile.facts
        plannable = [self._facts[i] for i in budget.layers]
        self.allocators = [name for name in allocators.names() if allocators[name].usable(plannable)]
        if groups is None or isinstance(groups, int):
            curves = [self._curves[name] for name in self.names]
            groups = natural_groups(curves, budget.layers, self.mean_share * BASIS_POINTS, groups)
        self.groups = [list(group) for group in groups]
        self._group_of = {layer: g for g, members in enumerate(self.groups) for layer in members}
        self._ranked = rankers[ranker]().rank(_pair_distances(profile))
        self._solved: dict[int, dict[int, knapsack.Choice]] = {}
        available = len(sharing_map(self._ranked, budget.spec, budget.spec.num_layers))
        self.max_shared = min(budget.spec.num_layers // 4, available)

    @property
    def mean_share(self) -> float:
        """What a uniform split gives every layer, 0 to 1."""
        plain = sum(self.budget.spec.token_bytes(i) for i in self.budget.layers) * self.budget.whole
        return min(self.budget.total / plain, 1.0)

    def best_evictor(self) -> str:
        """The one with the smallest summed sensitivity at the mean share, if any fits without a codec of those."""
        names = [name for name in self.names if self.fits(name)] or self.names
        curves = {name: self._curves[name] for name in names}
        return knapsack.ranked_evictors(curves, self.budget.layers, self.mean_share * BASIS_POINTS)[0]

    def fits(self, name: str) -> bool:
        """Whether a method's fewest slots in every layer are within the target."""
        return name == PROFILE or self._stand_ins[name] == name

    def compile(self, params: Params, provenance: Mapping[str, Any] | None = None) -> Policy:
        """A valid policy whose planned bytes are at most the target's."""
        budget, spec = self.budget, self.budget.spec
        source_of = sharing_map(self._ranked, spec, params.shared_layers)
        owners = [i for i in budget.layers if i not in source_of]
        names = [self._evictor_name(params, i, owners) for i in owners]
        chosen = self._affordable(owners, names, params)
        cost = [budget.cost(i, e) for i, e in zip(owners, chosen, strict=True)]
        plain = sum(spec.token_bytes(i) for i in owners) * budget.whole
        if params.split == KNAPSACK:
            base = [float(self._knapsack(owners)[i].units) for i in owners]
        else:
            facts = [self._facts[i] for i in owners]
            base = allocators[params.split]().split(facts, min(budget.total / plain, 1.0))
        raw = [b * params.scales[self._group_of[i]] for b, i in zip(base, owners, strict=True)]
        floor = [budget.floor(i, e) for i, e in zip(owners, chosen, strict=True)]
        cap = [budget.cap(i, e) for i, e in zip(owners, chosen, strict=True)]
        fixed = sum(budget.fixed(i, e) for i, e in zip(owners, chosen, strict=True))
        units = project(raw, cost, budget.total - fixed, floor, cap)
        plans = {i: self._layer(i, u, e) for i, u, e in zip(owners, units, chosen, strict=True)}
        plans |= {i: LayerPolicy(shares=source) for i, source in source_of.items()}
        return Policy(
            layers=tuple(plans.get(i, LayerPolicy()) for i in range(spec.num_layers)),
            model=spec.policy_block(),
            target=budget.target,
            provenance=dict(provenance or {}),
        )

    def _layer(self, layer: int, units: int, method: Method) -> LayerPolicy:
        keep = self.budget.protection
        return method.layer(
            self.budget.slots(units, layer, method),
            sink_tokens=keep.sink_tokens,
            recent_tokens=keep.recent_tokens,
            min_slots=keep.min_slots,
        )

    def _method(self, layer: int, name: str, params: Params) -> Method:
        method = self.methods[name]
        tuned = {field: value for evictor, field, value in params.tuned if evictor == method.evictor.name}
        channels = ThinK(drop=params.dropped_channels) if params.dropped_channels else None
        spec = self.budget.spec
        heads = AdaKV() if params.split_heads else None
        return method.tuned(tuned).with_legal(spec.layers[layer], spec.dtype, heads, channels)

    def _affordable(self, owners: list[int], names: Sequence[str], params: Params) -> list[Method]:
        """The methods that are asked for, without the rarer decisions where these leave no room for the floors."""
        budget = self.budget
        plain = replace(params, split_heads=False, dropped_channels=0.0, tuned=())
        for asked in (params, plain):
            methods = [self._method(i, name, asked) for i, name in zip(owners, names, strict=True)]
            if budget.affords(owners, methods):
                return methods
        return [min(self.methods.values(), key=lambda method: _unit_bytes(method, budget, owners))] * len(owners)

    def _evictor_name(self, params: Params, layer: int, owners: list[int]) -> str:
        name = params.evictors[self._group_of[layer]]
        return self._knapsack(owners)[layer].method if name == PROFILE else self._stand_ins[name]

    def _knapsack(self, owners: list[int]) -> dict[int, knapsack.Choice]:
        # The ranking fixes which layers share, so their number identifies the owners.
        if len(owners) not in self._solved:
            self._solved[len(owners)] = knapsack.solve(self._curves, self.methods, self.budget, owners)
        return self._solved[len(owners)]


def budget_for(profile: Profile, spec: ModelSpec, target: Target, protection: Protection) -> Budget:
    """The target's budget, counted at its context or else at the mean length of the profile's prompts."""
    context = target.context_tokens or mean_prompt_tokens(profile)
    return Budget(spec=spec, target=target, context_tokens=context, protection=protection)


def mean_prompt_tokens(profile: Profile) -> int:
    """Of the prompts that the profile was measured on, rounded up."""
    statistics = profile.statistics
    return -(-statistics.num_tokens // max(statistics.num_prompts, 1))


def _rounding(profile: Profile, wanted: Sequence[str] | None) -> dict[Precision, list[float]]:
    """KL of each layer at every precision that can be told from the profile, and that is wanted; not of `WHOLE`.

    What was measured for keys and for values alone is added up for both.
    """
    measured = {Precision.parse(label): kl for label, kl in profile.codec_sensitivity.items()}
    nothing = [0.0] * profile.spec.num_layers
    keys = {DENSE: nothing} | {p.keys: kl for p, kl in measured.items() if p.values == DENSE}
    values = {DENSE: nothing} | {p.values: kl for p, kl in measured.items() if p.keys == DENSE}
    known = {
        Precision(k, v): [a + b for a, b in zip(keys[k], values[v], strict=True)] for k in keys for v in values
    } | measured
    known.pop(WHOLE, None)
    if wanted is None:
        return known
    labels = {label for label in wanted if "/" not in label} | {DENSE}
    pairs = [p for p in known if {p.keys, p.values} <= labels]
    try:
        exact = [Precision.parse(text) for text in wanted]
    except MethodError as error:
        raise ProfileError(f"--codec: {error}") from error
    if missing := [p for p in exact if p != WHOLE and p not in known]:
        have = sorted({str(p) for p in known if p.keys == p.values})
        raise ProfileError(
            f"the profile holds no sensitivity for the codec {', '.join(map(str, missing))}; calibrate again, or "
            f"choose among: {', '.join([DENSE, *have])}"
        )
    return {p: known[p] for p in dict.fromkeys([*pairs, *exact]) if p != WHOLE}


def _undominated(rounding: Mapping[Precision, Sequence[float]], budget: Budget) -> list[Precision]:
    """Without those that another precision beats in bytes and in damage, summed over the layers."""

    def cost(precision: Precision) -> int:
        method = Method(Streaming(), precision)
        return sum(method.slot_bytes(budget.spec.layers[i], budget.spec.dtype, full=True) for i in budget.layers)

    kept: list[Precision] = []
    least = math.inf
    for precision in sorted(rounding, key=lambda p: (cost(p), sum(rounding[p]), str(p))):
        if sum(rounding[precision]) < least:
            kept.append(precision)
            least = sum(rounding[precision])
    return kept[::-1]


def _stand_ins(methods: Mapping[str, Method], budget: Budget) -> dict[str, str]:
    """Each method, or if its fewest slots are above the target the dearest that fits, of its evictor if one does.

    Between what codecs need and what plain slots need, most of the space would else be impossible.
    """
    fitting = [name for name, method in methods.items() if budget.affords(budget.layers, [method] * len(budget.layers))]
    if len(fitting) == len(methods):
        return {name: name for name in methods}
    unit = {name: _unit_bytes(methods[name], budget, budget.layers) for name in fitting}
    found = {}
    for name, method in methods.items():
        alike = [other for other in fitting if methods[other].evictor.name == method.evictor.name]
        found[name] = name if name in unit else max(alike or fitting, key=unit.__getitem__)
    return found


def _unit_bytes(method: Method, budget: Budget, layers: Sequence[int]) -> int:
    return sum(budget.cost(i, method) for i in layers)


def _pair_distances(profile: Profile) -> list[tuple[int, int, float]]:
    try:
        return profile.pair_distances
    except ProfileError:  # no prompt was long enough to measure them: no layer shares
        return []
