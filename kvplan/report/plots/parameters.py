"""Which parameter of the search mattered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvplan.model_spec import layer_ranges
from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, plots
from kvplan.report.plots.colours import LIGHT
from kvplan.search.trials import TOP_SHARE, StudyRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Parameter:
    """`name` is Optuna's, `meaning` for people, `importance` 0 to 1."""

    name: str
    meaning: str
    importance: float


@dataclass(frozen=True)
class Parameters:
    """The most important first."""

    found: list[Parameter]
    num_trials: int


@plots.register("parameters")
class ParametersPlot(Plot[Parameters]):
    order = 6
    title = "Which choice mattered"
    look_for = (
        "A long bar is a choice in which the best trials differ from the others, so it is the first one to get right."
    )
    needs = "a search's journal with at least 10 trials (kvplan search)"

    def data(self, inputs: Inputs) -> Parameters | None:
        study = inputs.study
        if study is None or not study.importance:
            return None
        found = [Parameter(name, _meaning(name, study), share) for name, share in study.importance.items()]
        return Parameters(sorted(found, key=lambda p: -p.importance), len(study.trials))

    def told(self, data: Parameters) -> str:
        first = data.found[0]
        return (
            f"What mattered most: {first.meaning} ({first.importance:.0%}). The bars add up to 100 % and compare the "
            f"values that the best {TOP_SHARE:.0%} of {data.num_trials} trials have with those of all (PED-ANOVA). The "
            "sampler does not try all values equally often, so take the order as a hint and not as a measurement."
        )

    def table(self, data: Parameters) -> Table:
        return Table(
            ("parameter", "meaning", "importance"), tuple((p.name, p.meaning, p.importance) for p in data.found)
        )

    def draw(self, data: Parameters, page: Page) -> Figure:
        from textwrap import fill

        figure, axes = page.axes(70 + (28 if page.is_wide else 44) * len(data.found))
        axes.barh(range(len(data.found)), [p.importance for p in data.found], color=LIGHT["accent"], height=0.6)
        names = [p.meaning if page.is_wide else fill(p.meaning, 20) for p in data.found]
        axes.set_yticks(range(len(data.found)), names)
        axes.set_ylim(len(data.found) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        for i, p in enumerate(data.found):
            axes.annotate(f"{p.importance:.0%}", (p.importance, i), (6, 0), textcoords="offset points", va="center",
                          fontsize=11)  # fmt: skip
        axes.set_xlim(0, 1.15 * max(p.importance for p in data.found))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return figure

    def short(self, data: Parameters) -> str:
        return "\n".join(
            f"{p.importance:>4.0%} {'#' * round(30 * p.importance):30} {p.meaning[:44]}" for p in data.found
        )


def _meaning(name: str, study: StudyRecord) -> str:
    """`scale.a` -> 'memory of layers 0-2'."""
    kind, _, rest = name.partition(".")
    # Groups that are decided alike stand together: `evictor.bc`.
    together = sorted(layer for group in rest for layer in study.groups.get(group, ()))
    layers = f"layers {layer_ranges(together).replace(',', ', ')}" if together else f"group {rest}"
    plain = {
        "mem": "the memory target",
        "split": "how memory is split over layers",
        "shared_layers": "how many layers share",
        "split_heads": "whether heads get unequal parts",
        "dropped_channels": "how many key channels go",
    }
    if name in plain:
        return plain[name]
    if kind == "scale":
        return f"memory of {layers}"
    if kind == "evictor":
        return f"method of {layers}"
    return f"{rest} of {kind}" if rest else name
