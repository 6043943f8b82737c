"""How much each layer suffers from every way of storing less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvplan.report.inputs import Inputs
from kvplan.report.plots.base import Page, Plot, Table, layer_axis, layer_rows, plain, plots, spark
from kvplan.report.plots.colours import HEAT, LIGHT
from kvplan.units import format_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 1e-5  # nats; less is nothing


@dataclass(frozen=True, eq=False)
class Way:
    """One way of storing less: an evictor that keeps a share, or a codec."""

    name: str
    share: str
    damage: npt.NDArray[np.float64]  # [layers] nats


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Importance per layer, and its damage under each way; layers with a window of their own have none (nan)."""

    importance: list[float]
    ways: list[Way]

    @property
    def cut(self) -> list[Way]:
        """Every evictor at the smallest share: what `kvplan profile show` takes the worst of."""
        return [way for way in _smallest_shares(self.ways) if way.share and not np.isnan(way.damage).all()]

    @property
    def encoded(self) -> list[Way]:
        """Every codec."""
        return [way for way in self.ways if not way.share]


@plots.register("sensitivity")
class SensitivityPlot(Plot[Sensitivity]):
    order = 1
    title = "Which layers matter"
    look_for = (
        "Strong blue marks layers that change the model's answers when they alone store less in that way; faint rows "
        "are layers where memory can be saved almost for free."
    )
    needs = "a profile (kvplan calibrate)"

    def data(self, inputs: Inputs) -> Sensitivity | None:
        profile = inputs.profile
        if profile is None or not (profile.sensitivity or profile.codec_sensitivity):
            return None
        cut = np.array([layer.window is None for layer in profile.spec.layers])
        ways = [
            Way(name, format_share(share), np.where(cut, kl, np.nan))
            for name, by_share in profile.sensitivity.items()
            for share, kl in sorted(by_share.items())
        ]
        ways += [Way(name, "", np.array(kl)) for name, kl in profile.codec_sensitivity.items()]
        return Sensitivity(profile.importance, ways)

    def told(self, data: Sensitivity) -> str:
        parts = []
        for what, ways in (
            ("Cut by the worst of the evictors at its smallest share", data.cut),
            ("Stored by the worst of the codecs", data.encoded),
        ):
            if ways:
                worst = _worst(ways)
                most, least = int(np.nanargmax(worst)), int(np.nanargmin(worst))
                parts.append(
                    f"{what}, layer {most} suffers most ({worst[most]:.3g} nats, {_blamed(ways, most)}), layer {least} "
                    f"least ({worst[least]:.2g})."
                )
        return (
            f"{' '.join(parts)} Nats are the unit of KL, the distance from the full cache's predictions: 0 means "
            "the same predictions, and each step of the scale is ten times the damage. The bars on the left say how "
            "much the layer's attention changes what flows through it at all."
        )

    def table(self, data: Sensitivity) -> Table:
        names = tuple(f"{way.name} {way.share}".strip() for way in data.ways)
        rows = (
            (i, importance, *(None if np.isnan(way.damage[i]) else float(way.damage[i]) for way in data.ways))
            for i, importance in enumerate(data.importance)
        )
        return Table(("layer", "importance", *(f"KL {name}" for name in names)), tuple(rows))

    def draw(self, data: Sensitivity, page: Page) -> Figure:
        ways = data.ways if page.is_wide else _smallest_shares(data.ways)
        figure = page.figure(layer_rows(page, len(data.importance), extra=150))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.0, 5.5 if page.is_wide else 3.2])
        plain(left)
        left.barh(range(len(data.importance)), data.importance, color=LIGHT["plain"], height=0.7)
        left.set_title("importance", loc="left", fontsize=11)
        left.set_xticks([])
        left.spines["bottom"].set_visible(False)
        left.set_ylabel("layer", labelpad=7)
        layer_axis(left, len(data.importance))
        damage = np.array([way.damage for way in ways]).T
        _heat(right, damage)
        _columns(right, ways)
        layer_axis(right, len(data.importance))
        right.tick_params(axis="y", labelleft=False)
        _scale(figure, right, damage, "cut or encoded" if data.encoded else "cut")
        return figure

    def short(self, data: Sensitivity) -> str:
        lines = []
        for what, ways in (("cut by evictors, smallest share", data.cut), ("stored by codecs", data.encoded)):
            if ways:
                worst = np.nan_to_num(_worst(ways))
                depth = np.log10(np.maximum(worst, LEAST)) - np.log10(LEAST)
                told = ", ".join(f"{i} ({worst[i]:.2g})" for i in np.argsort(-worst)[:3])
                lines += [spark(depth.tolist()), f"most sensitive when {what} (nats of KL): {told}"]
        return "\n".join(lines)


def _worst(ways: list[Way]) -> npt.NDArray[np.float64]:
    """[layers] the largest damage of any of these ways; nan where none was measured."""
    damage = np.array([way.damage for way in ways])
    return np.where(np.isnan(damage).all(0), np.nan, np.nan_to_num(damage).max(0))


def _blamed(ways: list[Way], layer: int) -> str:
    """The way that damages a layer most."""
    way = max(ways, key=lambda way: float(way.damage[layer]))
    return f"{way.name} {way.share}".strip()


def _smallest_shares(ways: list[Way]) -> list[Way]:
    """The hardest cut of each evictor, and the codecs."""
    first: dict[str, Way] = {}
    for way in ways:
        first.setdefault(way.name, way)
    return list(first.values())


def _range(damage: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The powers of ten of the scale."""
    seen = damage[np.isfinite(damage) & (damage > LEAST)]
    low = np.floor(np.log10(seen.min())) if seen.size else -5.0
    high = np.ceil(np.log10(seen.max())) if seen.size else 0.0
    return float(low), float(max(high, low + 1))


def _heat(axes: Axes, damage: npt.NDArray[np.float64]) -> None:
    low, high = _range(damage)
    level = (np.log10(np.maximum(np.nan_to_num(damage), 10**low)) - low) / (high - low)
    axes.imshow(shades(level), aspect="auto", interpolation="none")
    for side in axes.spines.values():
        side.set_visible(False)
    for layer, way in zip(*np.where(np.isnan(damage)), strict=True):
        axes.text(way, layer, "·", ha="center", va="center", color=LIGHT["muted"])


def shades(level: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[..., 4] of [...] levels from 0 to 1: one colour, more or less of it."""
    colour = np.empty((*level.shape, 4))
    colour[..., :3] = HEAT
    colour[..., 3] = np.clip(level, 0, 1)
    return colour


def _columns(axes: Axes, ways: list[Way]) -> None:
    axes.set_xticks(range(len(ways)), [way.share or way.name for way in ways], rotation=90, fontsize=11)
    axes.tick_params(axis="x", length=0)
    start = 0
    for i in range(1, len(ways) + 1):
        if i < len(ways) and ways[i].name == ways[start].name:
            continue
        if i - start > 1:
            axes.text((start + i - 1) / 2, -0.7, ways[start].name, ha="center", va="bottom", fontsize=11)
        elif ways[start].share:  # a single column: its name says more than its share
            labels = axes.get_xticklabels()
            labels[start].set_text(f"{ways[start].name} {ways[start].share}")
            axes.set_xticklabels([label.get_text() for label in labels])
        if i < len(ways) and (ways[i].share or ways[start].share) and ways[start].name != ways[i].name:
            axes.axvline(i - 0.5, color=LIGHT["page"], linewidth=3)
        start = i


def _scale(figure: Figure, axes: Axes, damage: npt.NDArray[np.float64], done: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    low, high = _range(damage)
    colours = ListedColormap(shades(np.linspace(0, 1, 24)))
    bar = figure.colorbar(
        ScalarMappable(LogNorm(10**low, 10**high), colours), ax=axes, location="bottom", aspect=40, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    ticks = [10**power for power in np.arange(low, high + 1).tolist()]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label(f"KL in nats, {done} alone", fontsize=11)
