"""SearchSpace: the dimensions, how a trial suggests each, and the recipes that every study tries first."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from kvplan.search.allocators import allocators
from kvplan.search.compile import KNAPSACK, PROFILE, Compiler, Params
from kvplan.search.method import joined

if TYPE_CHECKING:
    import optuna

SCALE_LOW, SCALE_HIGH = 0.25, 4.0


@dataclass(frozen=True)
class WarmStart:
    """A labelled point that is tried before the sampler chooses any. Recipes are from papers."""

    label: str
    params: Params
    is_recipe: bool


class SearchSpace:
    """One scale and one method per layer group, the split that the scales bend, and how many layers share.

    A method is an evictor, alone or with a codec; every codec is offered with the evictor that suits the profile best.

    Args:
        compiler: Knows the groups, the evictors and how many layers can share.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self.splits = [*allocators.names(), KNAPSACK]
        best = compiler.best_evictor()
        self.evictors = (
            [*compiler.names, *self._encoded(best), PROFILE] if len(compiler.methods) > 1 else compiler.names
        )
        self.group_names = ascii_lowercase[: len(compiler.groups)]

    def suggest(self, trial: optuna.Trial) -> Params:
        return Params(
            split=trial.suggest_categorical("split", self.splits),
            scales=tuple(trial.suggest_float(f"scale.{g}", SCALE_LOW, SCALE_HIGH, log=True) for g in self.group_names),
            evictors=tuple(trial.suggest_categorical(f"evictor.{g}", self.evictors) for g in self.group_names),
            shared_layers=trial.suggest_int("shared_layers", 0, self._compiler.max_shared),
        )

    def flat(self, params: Params) -> dict[str, Any]:
        """The parameters by Optuna's names."""
        scales = {f"scale.{g}": x for g, x in zip(self.group_names, params.scales, strict=True)}
        chosen = {f"evictor.{g}": e for g, e in zip(self.group_names, params.evictors, strict=True)}
        return {"split": params.split, **scales, **chosen, "shared_layers": params.shared_layers}

    def params(self, flat: dict[str, Any]) -> Params:
        """The inverse of `flat`."""
        return Params(
            split=flat["split"],
            scales=tuple(flat[f"scale.{g}"] for g in self.group_names),
            evictors=tuple(flat[f"evictor.{g}"] for g in self.group_names),
            shared_layers=flat["shared_layers"],
        )

    def describe(self) -> dict[str, Any]:
        """What identifies the space: a study cannot go on with another one."""
        return {
            "splits": self.splits,
            "evictors": self.evictors,
            "groups": self._compiler.groups,
            "max_shared": self._compiler.max_shared,
        }

    def warm_starts(self) -> list[WarmStart]:
        """Best guesses first, in case there are fewer trials than warm starts."""
        best, most = self._compiler.best_evictor(), self._compiler.max_shared
        any_evictor = self.evictors[-1]
        starts = [
            self._start("knapsack", KNAPSACK, any_evictor),
            *(self._start(f"uniform {name}", "uniform", name, is_recipe=True) for name in self._compiler.names),
            self._start(f"squeeze {best}", "squeeze", best, is_recipe=True),
            self._start(f"pyramid {best}", "pyramid", best, is_recipe=True),
            *(self._start(f"uniform {both}", "uniform", both, is_recipe=True) for both in self._encoded(best)),
            self._start(f"knapsack {best}", KNAPSACK, best),
        ]
        if len(self.group_names) > 1:
            starts += [self._start(f"tilt {x:g} {any_evictor}", "uniform", any_evictor, tilt=x) for x in (1.5, 3.0)]
        if most > 0:
            starts.append(self._start("knapsack, 1 layer shares", KNAPSACK, any_evictor, shared=1))
        return starts

    def _encoded(self, evictor: str) -> list[str]:
        return [joined(evictor, codec) for codec in self._compiler.codecs]

    def _start(
        self, label: str, split: str, evictor: str, *, is_recipe: bool = False, tilt: float = 1.0, shared: int = 0
    ) -> WarmStart:
        """`tilt`: what the most important group gets, as a multiple of the least important one's share."""
        G = len(self.group_names)
        scales = tuple(tilt ** (g / (G - 1) - 0.5) if G > 1 else 1.0 for g in range(G))
        params = Params(split=split, scales=scales, evictors=(evictor,) * G, shared_layers=shared)
        return WarmStart(label, params, is_recipe)
