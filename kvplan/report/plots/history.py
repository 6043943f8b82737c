"""How the search went, trial by trial."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, legend, log_axis, plots
from kvplan.report.plots.colours import LIGHT
from kvplan.search.trials import TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class History:
    trials: tuple[TrialRecord, ...]
    shares: tuple[float, float]

    @property
    def valid(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.is_valid]

    @property
    def best(self) -> TrialRecord:
        return min(self.valid, key=lambda trial: trial.mean_kl)

    @property
    def best_by_sampler(self) -> TrialRecord | None:
        return min((t for t in self.valid if not t.is_warm_start), key=lambda t: t.mean_kl, default=None)


@plots.register("history")
class HistoryPlot(Plot[History]):
    order = 5
    title = "How the search went"
    look_for = (
        "The line is the best trial so far: where it stops falling, further trials stopped paying; squares are the "
        "known recipes and guesses that every search tries first."
    )
    needs = "a search's journal (kvplan search)"

    def data(self, inputs: Inputs) -> History | None:
        study = inputs.study
        return (
            History(study.trials, study.shares) if study is not None and any(t.is_valid for t in study.trials) else None
        )

    def told(self, data: History) -> str:
        best, sampled = data.best, data.best_by_sampler
        by = best.label if best.is_warm_start else "chosen by the sampler"
        more = f"; the sampler's own best is {sampled.mean_kl:.2g}" if sampled and best.is_warm_start else ""
        failed = len(data.trials) - len(data.valid)
        lost = f" {failed} trials gave no score and are not drawn." if failed else ""
        least, most = data.shares
        sizes = (
            f" Trials hold {least:.0%} to {most:.0%} of the full cache's bytes; less memory tends to lie higher."
            if most > least + 0.01
            else ""
        )
        return (
            f"Of {len(data.trials)} trials, number {best.number} is best on the search prompts with a KL of "
            f"{best.mean_kl:.2g} nats ({by}){more}. The winner is chosen later, on prompts that no trial has "
            f"seen.{sizes}{lost}"
        )

    def table(self, data: History) -> Table:
        names = sorted({name for trial in data.trials for name in trial.params})
        rows = (
            (t.number, t.label, t.mean_kl if t.is_valid else None, *(t.params.get(name) for name in names))
            for t in data.trials
        )
        return Table(("trial", "label", "KL", *names), tuple(rows))

    def draw(self, data: History, page: Page) -> Figure:
        figure, axes = page.axes(300)
        valid = data.valid
        log_axis(axes)
        best = list(itertools.accumulate((max(t.mean_kl, 1e-9) for t in valid), min))
        axes.step([t.number for t in valid], best, where="post", color=LIGHT["warm"], linewidth=2, label="best so far")
        for label, warm, marker, colour in (
            ("tried first", True, "s", LIGHT["plain"]),
            ("the sampler's", False, "o", LIGHT["accent"]),
        ):
            own = [t for t in valid if t.is_warm_start == warm]
            axes.plot([t.number for t in own], [max(t.mean_kl, 1e-9) for t in own], marker, color=colour, markersize=6,
                      label=label, clip_on=False)  # fmt: skip
        axes.set_xlabel("trial")
        axes.margins(x=0.02)
        axes.locator_params(axis="x", integer=True)
        legend(axes, page)
        return figure

    def short(self, data: History) -> str:
        return self.told(data).split(" The winner")[0]
