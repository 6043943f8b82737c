"""SearchSpace: the dimensions, how a trial suggests each, and the recipes that every study tries first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from kvplan.methods.channels.think import ThinK
from kvplan.methods.evictors import evictors
from kvplan.methods.params import Choice, IntRange, search_ranges
from kvplan.search.budget import Budget
from kvplan.search.compile import KNAPSACK, PROFILE, Compiler, Params
from kvplan.search.decisions import Decisions
from kvplan.search.front import FrontCompiler
from kvplan.search.layer_groups import Groups
from kvplan.search.method import joined
from kvplan.units import format_share

if TYPE_CHECKING:
    import optuna

    from kvplan.calibrate.profile import Profile

SCALE_LOW, SCALE_HIGH = 0.25, 4.0


@dataclass(frozen=True)
class WarmStart:
    """A labelled point that is tried before the sampler chooses any. Recipes are from papers."""

    label: str
    params: Params
    is_recipe: bool


class SearchSpace:
    """One scale and one method per layer group, the split that the scales bend, how many layers share, and the rest.

    A method is an evictor, alone or with codecs; codecs are offered with the evictor that suits the profile best.

    Args:
        compiler: Knows the groups, the evictors and how many layers can share.
        decisions: What is searched; the rest stays as a uniform policy has it.
        shares: The memory targets in basis points, ascending, when there are several: one more dimension.
    """

    def __init__(self, compiler: Compiler, decisions: Decisions = Decisions(), shares: Sequence[int] = ()) -> None:
        self._compiler, self.decisions, self.shares = compiler, decisions, tuple(shares)
        self.splits = [*compiler.allocators, KNAPSACK] if "budget" in decisions else ["uniform"]
        best = compiler.best_evictor()
        encoded = [joined(best, precision) for precision in compiler.precisions]
        self.evictors = [*compiler.names, *encoded, PROFILE] if len(compiler.methods) > 1 else compiler.names
        self.group_names = ascii_lowercase[: len(compiler.groups)]
        self.method_names = _method_names(self.group_names, decisions.halves)
        self.max_shared = compiler.max_shared if "sharing" in decisions else 0
        self.channels = _choices(search_ranges(ThinK)["drop"]) if "channels" in decisions else ()
        self.tunable = _tunable(compiler.names) if "params" in decisions else {}

    def suggest(self, trial: optuna.Trial) -> Params:
        budget = "budget" in self.decisions
        return Params(
            split=trial.suggest_categorical("split", self.splits) if budget else self.splits[0],
            scales=tuple(
                trial.suggest_float(f"scale.{g}", SCALE_LOW, SCALE_HIGH, log=True) if budget else 1.0
                for g in self.group_names
            ),
            evictors=self._methods(
                {
                    name: trial.suggest_categorical(f"evictor.{name}", self.evictors)
                    if len(self.evictors) > 1
                    else self.evictors[0]
                    for name in dict.fromkeys(self.method_names)
                }
            ),
            shared_layers=trial.suggest_int("shared_layers", 0, self.max_shared) if self.max_shared else 0,
            split_heads="heads" in self.decisions and trial.suggest_categorical("split_heads", [False, True]),
            dropped_channels=trial.suggest_categorical("dropped_channels", [0.0, *self.channels])
            if self.channels
            else 0.0,
            share=self.shares[trial.suggest_int("mem", 0, len(self.shares) - 1)] if self.shares else None,
            tuned=tuple((e, field, _suggest(trial, e, field, choices)) for (e, field), choices in self.tunable.items()),
        )

    def flat(self, params: Params) -> dict[str, Any]:
        """The parameters by Optuna's names: those that are searched."""
        flat: dict[str, Any] = {}
        if "budget" in self.decisions:
            flat["split"] = params.split
            flat |= {f"scale.{g}": x for g, x in zip(self.group_names, params.scales, strict=True)}
        if len(self.evictors) > 1:
            flat |= {f"evictor.{name}": e for name, e in zip(self.method_names, params.evictors, strict=True)}
        if self.max_shared:
            flat["shared_layers"] = params.shared_layers
        if "heads" in self.decisions:
            flat["split_heads"] = params.split_heads
        if self.channels:
            flat["dropped_channels"] = params.dropped_channels
        if params.share is not None:
            flat["mem"] = self.shares.index(params.share)
        return flat | {f"{evictor}.{field}": value for evictor, field, value in params.tuned}

    def params(self, flat: dict[str, Any]) -> Params:
        """The inverse of `flat`."""
        return Params(
            split=flat.get("split", self.splits[0]),
            scales=tuple(flat.get(f"scale.{g}", 1.0) for g in self.group_names),
            evictors=self._methods({name: flat.get(f"evictor.{name}", self.evictors[0]) for name in self.method_names}),
            shared_layers=flat.get("shared_layers", 0),
            split_heads=flat.get("split_heads", False),
            dropped_channels=flat.get("dropped_channels", 0.0),
            share=self.shares[flat["mem"]] if self.shares else None,
            tuned=tuple((e, field, flat[f"{e}.{field}"]) for e, field in self.tunable),
        )

    def _methods(self, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """One per group."""
        return tuple(chosen[name] for name in self.method_names)

    def describe(self) -> dict[str, Any]:
        """What identifies the space: a study cannot go on with another one."""
        return {
            "splits": self.splits,
            "evictors": self.evictors,
            "groups": self._compiler.groups,
            "max_shared": self.max_shared,
            "decisions": list(self.decisions.kinds),
            "methods": list(self.method_names),
            "params": [f"{evictor}.{field}" for evictor, field in self.tunable],
        } | ({"shares": list(self.shares)} if self.shares else {})

    def warm_starts(self) -> list[WarmStart]:
        """Best guesses first, in case there are fewer trials than warm starts."""
        best = self._compiler.best_evictor()
        any_evictor = self.evictors[-1]
        alike = [joined(best, p) for p in self._compiler.precisions if p.keys == p.values]
        knapsack = self._start("knapsack", KNAPSACK, any_evictor)
        starts = self._that_fit(
            *(self.solved() if KNAPSACK in self.splits else []),
            *(self._start(f"uniform {name}", "uniform", name, is_recipe=True) for name in self._compiler.names),
            *(
                self._start(f"{split} {best}", split, best, is_recipe=True)
                for split in self.splits
                if split not in ("uniform", KNAPSACK)
            ),
            *(self._start(f"uniform {both}", "uniform", both, is_recipe=True) for both in alike),
        )
        if KNAPSACK not in self.splits:
            if any_evictor == PROFILE:
                starts.append(self._start("uniform profile", "uniform", PROFILE))
            return starts
        starts += self._that_fit(self._start(f"knapsack {best}", KNAPSACK, best))
        if len(self.group_names) > 1:
            starts += [self._start(f"tilt {x:g} {any_evictor}", "uniform", any_evictor, tilt=x) for x in (1.5, 3.0)]
        return starts + self._variants(knapsack)

    def _that_fit(self, *starts: WarmStart) -> list[WarmStart]:
        """Without those whose method would be replaced by a cheaper one: they would not be what their label says."""
        return [start for start in starts if all(map(self._compiler.fits, start.params.evictors))]

    def solved(self) -> list[WarmStart]:
        """The knapsack's answer for each memory target, the largest first."""
        start = self._start("knapsack", KNAPSACK, self.evictors[-1])
        smaller = [
            WarmStart(f"knapsack {format_share(share)}", replace(start.params, share=share), is_recipe=False)
            for share in self.shares[-2::-1]
        ]
        return [start, *smaller]

    def _variants(self, start: WarmStart) -> list[WarmStart]:
        """The start with each of the rarer decisions alone."""
        changes: list[tuple[str, dict[str, Any]]] = []
        if self.max_shared:
            changes.append(("1 layer shares", {"shared_layers": 1}))
        if "heads" in self.decisions:
            changes.append(("heads split", {"split_heads": True}))
        if self.channels:
            least = min(self.channels)
            changes.append((f"{least:.0%} of the channels dropped", {"dropped_channels": least}))
        return [
            WarmStart(f"{start.label}, {told}", replace(start.params, **change), is_recipe=False)
            for told, change in changes
        ]

    def _start(self, label: str, split: str, evictor: str, *, is_recipe: bool = False, tilt: float = 1.0) -> WarmStart:
        """`tilt`: what the most important group gets, as a multiple of the least important one's share."""
        G = len(self.group_names)
        scales = tuple(tilt ** (g / (G - 1) - 0.5) if G > 1 else 1.0 for g in range(G))
        defaults = tuple((e, field, getattr(evictors[e](), field)) for e, field in self.tunable)
        share = self.shares[-1] if self.shares else None
        params = Params(split=split, scales=scales, evictors=(evictor,) * G, share=share, tuned=defaults)
        return WarmStart(label, params, is_recipe)


def space_for(
    profile: Profile,
    budget: Budget,
    decisions: Decisions = Decisions(),
    names: Sequence[str] = (),
    groups: Groups = None,
    codecs: Sequence[str] | None = None,
    shares: Sequence[int] = (),
) -> tuple[Compiler, SearchSpace]:
    """The compiler and the space of what is to be decided.

    Raises:
        ProfileError, TargetError: see `Compiler`.
    """
    stored = codecs if "codec" in decisions else ["dense"]
    compiler = Compiler(profile, budget, names, groups, codecs=stored)
    if "evictor" not in decisions:
        names = [compiler.best_evictor()]
        compiler = Compiler(profile, budget, names, groups, codecs=stored)
    if shares:
        compiler = FrontCompiler(profile, budget, names, groups, stored, shares)
    return compiler, SearchSpace(compiler, decisions, shares)


def _method_names(groups: str, halves: bool) -> list[str]:
    """Of each group, the parameter that chooses its method: its own, or that of its half."""
    if not halves or len(groups) <= 2:
        return list(groups)
    lower = len(groups) // 2
    return [groups[:lower] if at < lower else groups[lower:] for at in range(len(groups))]


def _tunable(names: Sequence[str]) -> dict[tuple[str, str], IntRange | Choice]:
    return {(name, field): found for name in names for field, found in search_ranges(evictors[name]).items()}


def _choices(searched: IntRange | Choice) -> tuple[Any, ...]:
    assert isinstance(searched, Choice)
    return searched.values


def _suggest(trial: optuna.Trial, evictor: str, field: str, choices: IntRange | Choice) -> Any:
    name = f"{evictor}.{field}"
    if isinstance(choices, IntRange):
        return trial.suggest_int(name, choices.low, choices.high, log=choices.log)
    return trial.suggest_categorical(name, choices.values)
