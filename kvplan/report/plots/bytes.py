"""Where the bytes of a policy go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvplan.policy.layout import KINDS
from kvplan.policy.memory import BytesPlan, plan, stated_spec
from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, layer_axis, layer_rows, legend, plots
from kvplan.report.plots.colours import LIGHT, series
from kvplan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bytes:
    """A plan for one prompt, and the full cache's bytes per layer."""

    plan: BytesPlan
    full: list[int]
    context_tokens: int

    @property
    def by_kind(self) -> dict[str, int]:
        """What is stored at all."""
        held = {kind: getattr(self.plan.by_kind, kind) for kind in KINDS}
        return {kind: n for kind, n in held.items() if n}


@plots.register("bytes")
class BytesPlot(Plot[Bytes]):
    order = 3
    title = "Where the bytes go"
    look_for = (
        "The frame of each row is what the full cache would take; what is filled is really stored, and its colours "
        "say as what."
    )
    needs = "a policy (kvplan search)"

    def data(self, inputs: Inputs) -> Bytes | None:
        policy = inputs.policy
        if policy is None:
            return None
        spec, context = stated_spec(policy), inputs.context_tokens
        full = [
            spec.token_bytes(i) * (context if layer.window is None else min(context, layer.window))
            for i, layer in enumerate(spec.layers)
        ]
        return Bytes(plan(policy, spec, [context]), full, context)

    def told(self, data: Bytes) -> str:
        total = max(data.plan.total, 1)
        kinds = ", ".join(f"{kind} {held / total:.0%}" for kind, held in data.by_kind.items())
        return (
            f"{format_bytes(data.plan.total)} of {format_bytes(data.plan.full)} ({data.plan.ratio:.1%}) after a prompt "
            f"of {data.context_tokens} tokens: {kinds}. Scales belong to codecs; positions and scores are what some "
            "evictors remember of each token."
        )

    def table(self, data: Bytes) -> Table:
        rows = (
            (i, *(getattr(layer, kind) for kind in KINDS), layer.total, data.full[i])
            for i, layer in enumerate(data.plan.layers)
        )
        return Table(("layer", *KINDS, "total", "full"), tuple(rows))

    def draw(self, data: Bytes, page: Page) -> Figure:
        figure, axes = page.axes(layer_rows(page, len(data.full), extra=96))
        largest = max([*data.full, *(layer.total for layer in data.plan.layers)])
        unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if largest >= u)
        left = [0.0] * len(data.full)
        for kind in data.by_kind:
            widths = [getattr(layer, kind) / unit for layer in data.plan.layers]
            axes.barh(range(len(widths)), widths, left=left, color=series(KINDS.index(kind)), height=0.7, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.barh(
            range(len(data.full)), [n / unit for n in data.full], height=0.7, facecolor="none",
            edgecolor=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)), label="full cache",
        )  # fmt: skip
        layer_axis(axes, len(data.full))
        axes.set_xlim(0, 1.02 * largest / unit)
        axes.set_ylabel("layer", labelpad=7)
        axes.set_xlabel(f"{name} after a prompt of {data.context_tokens} tokens")
        axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
        legend(axes, page)
        return figure

    def short(self, data: Bytes) -> str:
        return self.told(data).split(". ")[0]
