"""Front: one search for many memory targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvplan.errors import TargetError
from kvplan.policy.schema import Policy, Target
from kvplan.search.budget import Budget
from kvplan.search.compile import Compiler, Params, budget_for

if TYPE_CHECKING:
    from kvplan.calibrate.profile import Profile

# Round figures, denser where the damage grows fastest.
SHARES = (300, 500, 700, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 6500, 8000)


class FrontCompiler(Compiler):
    """Compiles every point for its own share of the full cache, all with the groups of the largest.

    Args:
        profile, budget, names, groups, codecs: As `Compiler`; the budget is the largest.
        shares: The targets, in basis points.
    """

    def __init__(
        self, profile: Profile, budget: Budget, names: Sequence[str], groups: Any, codecs: Any, shares: Sequence[int]
    ) -> None:
        super().__init__(profile, budget, names, groups, codecs=codecs)
        self._at = {
            share: Compiler(
                profile,
                budget_for(profile, budget.spec, Target(share=share), budget.protection),
                names,
                self.groups,
                codecs=codecs,
            )
            for share in shares
        }

    def compile(self, params: Params, provenance: Mapping[str, Any] | None = None) -> Policy:
        if params.share is None:
            return super().compile(params, provenance)
        return self._at[params.share].compile(params, provenance)


def feasible_shares(top: int, compiled: Callable[[Target], object]) -> tuple[int, ...]:
    """The shares of a front: `SHARES` below the largest as far as they are feasible, and the largest.

    Args:
        top: Basis points.
        compiled: Raises TargetError for a target that cannot be met.
    """

    def is_feasible(share: int) -> bool:
        try:
            compiled(Target(share=share))
        except TargetError:
            return False
        return True

    return (*(share for share in SHARES if share < top and is_feasible(share)), top)
