"""Which tokens of a prompt every layer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, layer_axis, layer_rows, plots, spark
from kvplan.report.plots.colours import LIGHT
from kvplan.report.plots.sensitivity import shades
from kvplan.report.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 360  # of the picture; more tokens share one


@plots.register("kept")
class KeptPlot(Plot[Sample]):
    order = 7
    title = "Which tokens stay"
    look_for = (
        "Each row is a layer and each column a place in the prompt: blue is kept, empty is forgotten; a layer with "
        "gaps answers from what its evictor thought worth keeping."
    )
    needs = "a policy and its model (kvplan search)"

    def data(self, inputs: Inputs) -> Sample | None:
        return inputs.sample

    def told(self, data: Sample) -> str:
        layers, tokens = data.held.shape
        nowhere = int((data.layers_holding == 0).sum())
        everywhere = int((data.layers_holding >= layers - 1e-9).sum())
        return (
            f"{data.source}, {tokens} tokens: {everywhere} are kept in all {layers} layers, {nowhere} in none, and "
            f"the mean token in {data.layers_holding.mean():.1f} of {layers}. Where the heads of a layer keep "
            "different tokens, the shade is the share of its heads."
        )

    def table(self, data: Sample) -> Table:
        layers = tuple(f"layer {i}" for i in range(len(data.held)))
        rows = (
            (t, piece, float(data.layers_holding[t]), *(float(x) for x in data.held[:, t]))
            for t, piece in enumerate(data.pieces)
        )
        return Table(("position", "token", "layers", *layers), tuple(rows))

    def draw(self, data: Sample, page: Page) -> Figure:
        layers, tokens = data.held.shape
        figure, axes = page.axes(layer_rows(page, layers))
        axes.imshow(
            shades(0.9 * _columns(data.held)), aspect="auto", interpolation="none",
            extent=(-0.5, tokens - 0.5, layers - 0.5, -0.5),
        )  # fmt: skip
        for edge in range(1, layers):
            axes.axhline(edge - 0.5, color=LIGHT["page"], linewidth=2)
        layer_axis(axes, layers)
        axes.set_ylabel("layer", labelpad=7)
        axes.set_xlabel("position in the prompt")
        axes.spines["left"].set_visible(False)
        if not page.is_wide:
            axes.locator_params(axis="x", nbins=4)
        return figure

    def short(self, data: Sample) -> str:
        lines = [f"{i:>5} {spark(row, 1.0)} {share:>4.0%}" for i, row, share in _strips(data.held)]
        return "\n".join([f"layer {'prompt, from its first token to its last':64} kept", *lines])


def _columns(held: npt.NDArray[np.float64], most: int = _COLUMNS) -> npt.NDArray[np.float64]:
    """[layers, at most `most`]: means over neighbouring tokens."""
    tokens = held.shape[1]
    if tokens <= most:
        return held
    edges = np.linspace(0, tokens, most + 1).astype(int)[:-1]
    return np.add.reduceat(held, edges, axis=1) / np.diff(np.append(edges, tokens))


def _strips(held: npt.NDArray[np.float64]) -> list[tuple[int, list[float], float]]:
    return [(i, row.tolist(), float(held[i].mean())) for i, row in enumerate(_columns(held, 64))]
