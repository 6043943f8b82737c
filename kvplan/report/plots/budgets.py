"""What each layer keeps, how, and who reads whose cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvplan.model_spec import LayerSpec
from kvplan.policy.memory import allocated_slots, plan, stated_spec
from kvplan.policy.schema import LayerPolicy
from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, layer_axis, layer_rows, legend, plots, spark
from kvplan.report.plots.colours import LIGHT, series
from kvplan.report.policy import layer_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_EVICTOR = "all tokens stay"


@dataclass(frozen=True)
class LayerBudget:
    """What one layer holds: tokens per KV head, `tokens` in the mean; and what is at work in it."""

    tokens: float
    heads: tuple[int, ...]
    evictor: str
    how: str
    shares: int | None


@dataclass(frozen=True)
class Budgets:
    layers: list[LayerBudget]
    context_tokens: int
    bytes_share: float


@plots.register("budgets")
class BudgetsPlot(Plot[Budgets]):
    order = 2
    title = "What each layer keeps"
    look_for = (
        "A long bar is a layer that keeps most of the prompt; its colour says who chooses the tokens that stay, the "
        "text how they are stored, and an arc whose cache a layer reads instead of its own."
    )
    needs = "a policy (kvplan search)"

    def data(self, inputs: Inputs) -> Budgets | None:
        policy = inputs.policy
        if policy is None:
            return None
        spec, context = stated_spec(policy), inputs.context_tokens
        layers = [_budget(layer, shape, context) for layer, shape in zip(policy.layers, spec.layers, strict=True)]
        return Budgets(layers, context, plan(policy, spec, [context]).ratio)

    def told(self, data: Budgets) -> str:
        own = [layer for layer in data.layers if layer.shares is None]
        kept = sum(layer.tokens for layer in own) / (len(data.layers) * data.context_tokens)
        full = sum(layer.tokens >= data.context_tokens for layer in own)
        shared = len(data.layers) - len(own)
        reads = f"; {shared} read another layer's cache and store nothing" if shared else ""
        return (
            f"After a prompt of {data.context_tokens} tokens, {full} of {len(data.layers)} layers still hold all of "
            f"it{reads}. In all {kept:.0%} of the tokens stay, in {data.bytes_share:.1%} of the full cache's bytes."
        )

    def table(self, data: Budgets) -> Table:
        rows = (
            (i, layer.tokens, layer.tokens / data.context_tokens, layer.evictor, layer.how, layer.shares)
            for i, layer in enumerate(data.layers)
        )
        return Table(("layer", "tokens", "share", "evictor", "how", "reads layer"), tuple(rows))

    def draw(self, data: Budgets, page: Page) -> Figure:
        figure, axes = page.axes(layer_rows(page, len(data.layers), extra=96))
        names = sorted({layer.evictor for layer in data.layers if layer.shares is None} - {NO_EVICTOR})
        for name in [NO_EVICTOR, *names]:
            bars = [(i, layer) for i, layer in enumerate(data.layers) if layer.shares is None and layer.evictor == name]
            if bars:
                widths = [layer.tokens / data.context_tokens for _, layer in bars]
                colour = LIGHT["plain"] if name == NO_EVICTOR else series(names.index(name))
                axes.barh([i for i, _ in bars], widths, color=colour, height=0.7, label=name)
        _label(axes, data, page)
        for i, layer in enumerate(data.layers):
            if layer.shares is not None:
                _arc(axes, i, layer.shares)
        layer_axis(axes, len(data.layers))
        axes.set_ylabel("layer", labelpad=7)
        axes.set_xlim(0, 1)
        ticks = [0, 0.25, 0.5, 0.75, 1] if page.is_wide else [0, 0.5, 1]
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.set_xlabel(f"of {data.context_tokens} prompt tokens")
        axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
        legend(axes, page)
        return figure

    def short(self, data: Budgets) -> str:
        shares = [layer.tokens / data.context_tokens for layer in data.layers]
        return f"{spark(shares, 1.0)}\n{self.told(data)}"


def _budget(layer: LayerPolicy, shape: LayerSpec, context: int) -> LayerBudget:
    if layer.shares is not None:
        return LayerBudget(0.0, (), "", f"reads layer {layer.shares}", layer.shares)
    heads = tuple(min(allocated_slots(layer, shape, context, 0, h), context) for h in range(shape.kv_heads))
    evicts = not layer.slots.is_full and shape.window is None
    how = layer_text(layer) if shape.window is None else f"window of {shape.window} (the model's own)"
    # The evictor is told by the colour.
    told = layer_text(replace(layer, slots=type(layer.slots)())) if evicts else how
    return LayerBudget(sum(heads) / len(heads), heads, layer.evictor.name if evicts else NO_EVICTOR, told, None)


def _label(axes: Axes, data: Budgets, page: Page) -> None:
    most = 44 if page.is_wide else 16
    room = 1.12 if any(layer.shares is not None for layer in data.layers) else 1.03
    place = axes.get_yaxis_transform()
    for i, layer in enumerate(data.layers):
        told = layer.how if len(layer.how) <= most else layer.how[: most - 1] + "…"
        axes.text(room, i, told, transform=place, va="center", fontsize=11, color=LIGHT["muted"])


def _arc(axes: Axes, reader: int, source: int) -> None:
    """On the right of the bars, from the layer that owns the cache to the one that reads it."""
    from matplotlib.patches import FancyArrowPatch

    arrow = FancyArrowPatch(
        (1.015, source), (1.015, reader), transform=axes.get_yaxis_transform(), connectionstyle="arc3,rad=-0.35",
        arrowstyle="-|>", mutation_scale=9, color=LIGHT["accent"], linewidth=1.4, clip_on=False,
    )  # fmt: skip
    axes.add_patch(arrow)
