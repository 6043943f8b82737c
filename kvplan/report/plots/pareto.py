"""Quality against bytes: every policy and baseline with its interval, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvplan.check.results import FULL_CACHE, Results
from kvplan.check.summary import by_question, summaries
from kvplan.report.inputs import Inputs, NamedPolicy
from kvplan.report.plots.base import Page, Plot, Table, log_axis, plain, plots
from kvplan.report.plots.colours import LIGHT
from kvplan.search.trials import StudyRecord
from kvplan.stats import MIN_PROMPTS, Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 15  # pixels between labels
SAME_SHARE = 0.005  # of the full cache's bytes; less is no difference


@dataclass(frozen=True)
class Point:
    """One policy: bytes as a share of the full cache's, KL in nats.

    Attributes:
        found: kvplan's search made it.
        prompts: That the KL is of, or None where it is not stated.
    """

    name: str
    share: float
    kl: Interval
    found: bool
    prompts: int | None = None

    @property
    def has_interval(self) -> bool:
        return self.prompts is None or self.prompts >= MIN_PROMPTS


@dataclass(frozen=True)
class Pareto:
    """Panels of points that were measured on the same prompts, by what these prompts are."""

    panels: dict[str, list[Point]]


@plots.register("pareto")
class ParetoPlot(Plot[Pareto]):
    order = 4
    title = "Quality against memory"
    look_for = (
        "Further left is less memory and further down is closer to the full cache, so the best policies lie at the "
        "lower left; those on the line are beaten by no other in both."
    )
    needs = "a results file (kvplan eval), several policies, or a search's journal"

    def data(self, inputs: Inputs) -> Pareto | None:
        if inputs.results is not None:
            return Pareto(_of_results(inputs.results, {p.name for p in inputs.policies}))
        points = [*_of_policies(inputs.policies), *_of_study(inputs.study)]
        return Pareto({"prompts of the search and of its confirmation": points}) if len(points) > 1 else None

    def told(self, data: Pareto) -> str:
        parts = []
        for name, points in data.panels.items():
            best = ", ".join(f"{p.name} ({p.share:.0%}, KL {p.kl.mean:.2g})" for p in front(points)) or "none"
            parts.append(f"{name[0].upper()}{name[1:]}: nothing beats {best}.")
        return (
            f"{' '.join(parts)} KL is the distance from the full cache's predictions in nats; the whiskers are its "
            "95 % interval over prompts. Bytes nearer than half a percentage point count as equal."
        )

    def table(self, data: Pareto) -> Table:
        rows = (
            (name, p.name, p.share, p.kl.mean, *_bounds(p), p in front(points))
            for name, points in data.panels.items()
            for p in points
        )
        return Table(("prompts", "policy", "share of bytes", "KL", "KL low", "KL high", "on the front"), tuple(rows))

    def draw(self, data: Pareto, page: Page) -> Figure:
        most = max(map(len, data.panels.values()))
        height = max(320, 110 + _LINE * most)
        figure = page.figure(height * len(data.panels))
        engine: Any = figure.get_layout_engine()  # the page sets one
        engine.set(hspace=0.05)
        for axes, (name, points) in zip(
            figure.subplots(len(data.panels), 1, squeeze=False)[:, 0], data.panels.items(), strict=True
        ):
            plain(axes)
            if len(data.panels) > 1:
                axes.set_title(name, loc="left", fontsize=12)
            _panel(axes, points, page, height)
        return figure

    def short(self, data: Pareto) -> str:
        lines = []
        for name, points in data.panels.items():
            lines.append(f"{name}; * nothing beats it")
            for p in sorted(points, key=lambda p: p.kl.mean):
                star = "*" if p in front(points) else " "
                span = f"[{p.kl.low:.4f}, {p.kl.high:.4f}]" if p.has_interval else "[-]"
                lines.append(f"{star} {p.name[:34]:34} {p.share:>6.1%}  KL {p.kl.mean:<7.4f} {span}")
        return "\n".join(lines)


def _bounds(point: Point) -> tuple[float | None, float | None]:
    return (point.kl.low, point.kl.high) if point.has_interval else (None, None)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in bytes without losing in KL, by bytes; the full cache is not one of them.

    Bytes nearer than half a percentage point of the full cache's count as equal, so that of such points one is left.
    """
    own = sorted((p for p in points if p.name != FULL_CACHE), key=lambda p: (p.share, p.kl.mean))
    return [p for i, p in enumerate(own) if not any(_beats(q, p, j < i) for j, q in enumerate(own) if j != i)]


def _beats(one: Point, other: Point, first: bool) -> bool:
    """At as many bytes or fewer; where KL is the same too, `first` decides."""
    if one.share >= other.share + SAME_SHARE:
        return False
    return one.kl.mean < other.kl.mean or (one.kl.mean == other.kl.mean and first)


def _of_results(results: Results, found: set[str]) -> dict[str, list[Point]]:
    """A panel per way of asking: they are never averaged together."""
    panels = {}
    for group in by_question(results):
        panels[f"{group.name}, {len(group.rows)} prompts"] = [
            Point(s.policy, s.share, s.kl, s.policy in found or _is_file(results, s.policy), s.prompts)
            for s in summaries(results, group)
        ]
    return panels


def _is_file(results: Results, name: str) -> bool:
    return results.policy(name).source.endswith((".yaml", ".yml"))


def _of_policies(policies: Sequence[NamedPolicy]) -> list[Point]:
    """Policies that state what the search confirmed of them."""
    points = []
    for named in policies:
        told = _numbers(named.policy.provenance)
        if told is not None:
            share, kl, prompts = told
            points.append(Point(named.name, share, kl, found=True, prompts=prompts))
    return points


def _numbers(provenance: Mapping[str, Any]) -> tuple[float, Interval, int | None] | None:
    """Share of the full cache's bytes, KL and its prompts; None where a file does not state them, or not as numbers.

    The KL of few prompts is stated without an interval.
    """
    planned: Any = provenance.get("planned")
    search: Any = provenance.get("search")
    try:
        share = planned["bytes"] / planned["full_bytes"]
        kl = float(search["kl"])
        low, high = search.get("kl_95", (kl, kl))
        prompts = search.get("num_prompts") if "kl_95" in search else 0
        return float(share), Interval(kl, float(low), float(high)), None if prompts is None else int(prompts)
    except (AttributeError, TypeError, KeyError, ValueError, ZeroDivisionError):
        return None


def _of_study(study: StudyRecord | None) -> list[Point]:
    """The warm starts (recipes from papers, the profile's own guesses), and what the sampler found beyond them."""
    if study is None:
        return []
    points = {
        t.number: Point(
            t.label if t.is_warm_start else f"trial {t.number}",
            t.share,
            bootstrap(t.kl),
            found=False,
            prompts=len(t.kl),
        )
        for t in study.trials
        if t.is_valid and t.share is not None
    }
    best = front(list(points.values()))
    # Of policies that did the same, the first stands for all.
    first = {(p.share, p.kl.mean): n for n, p in reversed(points.items())}
    warm = {t.number for t in study.trials if t.is_warm_start}
    return [
        replace(p, found=n not in warm)
        for n, p in points.items()
        if n in warm or (p in best and first[p.share, p.kl.mean] == n)
    ]


def _panel(axes: Axes, points: Sequence[Point], page: Page, height: float) -> None:
    least = min((p.kl.mean for p in points if p.kl.mean > 0), default=1e-4)
    floor = least / 3
    best = front(points)
    log_axis(axes)
    ordered = sorted(points, key=lambda p: p.kl.mean)
    place = {p.name: (x, max(p.kl.mean, floor)) for p, x in zip(ordered, _aside(ordered, page), strict=True)}
    for p in points:
        colour = LIGHT["warm"] if p.found else LIGHT["accent"] if p in best else LIGHT["plain"]
        x, y = place[p.name]
        if p.has_interval:
            axes.plot([x, x], [max(p.kl.low, floor), max(p.kl.high, floor)], color=colour, linewidth=1.6)
        axes.plot([x], [y], "D" if p.found else "o", color=colour, markersize=8 if p.found else 6)
    if len(best) > 1:
        axes.plot(*zip(*(place[p.name] for p in best), strict=True), color=LIGHT["accent"], zorder=0)
    top = max(p.kl.high for p in points) * 2
    axes.set_ylim(floor / 2, max(top, floor * 10))
    axes.set_xlim(0, max(1.0, max(p.share for p in points)) * 1.03)
    ticks = [0, 0.25, 0.5, 0.75, 1] if page.is_wide else [0, 0.5, 1]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xlabel("of the full cache's bytes")
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
    _labels(axes, ordered[::-1], place, page, height)


def _aside(points: Sequence[Point], page: Page) -> list[float]:
    """Where each point stands: a little aside where whiskers of policies of equal bytes would hide each other."""
    step = 0.004 if page.is_wide else 0.01
    crowded = [sum(abs(p.share - other.share) < 2 * step for other in points) > 1 for p in points]
    return [p.share + (rank % 5 - 2) * step * crowded[rank] for rank, p in enumerate(points)]


def _labels(
    axes: Axes, worst_first: Sequence[Point], at: Mapping[str, tuple[float, float]], page: Page, height: float
) -> None:
    """Names in a column on the right, worst on top, joined to their points by a thin line."""
    from matplotlib.lines import Line2D

    step = _LINE / (height - 90)
    place = 0.99
    to_axes = axes.transData + axes.transAxes.inverted()
    most = 30 if page.is_wide else 18
    for left, p in zip(range(len(worst_first), 0, -1), worst_first, strict=True):
        x, y = to_axes.transform(at[p.name])
        # As near to the point as the labels above and below allow.
        place = max(min(place, y), step * (left - 1) + 0.01)
        colour = LIGHT["warm"] if p.found else LIGHT["ink"]
        name = _clip(p.name, most) + (" (0)" if p.kl.mean == 0 else "")
        axes.text(1.05, place, name, transform=axes.transAxes, va="center", fontsize=11, color=colour)
        axes.add_artist(
            Line2D([x + 0.012, 1.0, 1.04], [y, place, place], transform=axes.transAxes, color=LIGHT["line"],
                   linewidth=0.8, clip_on=False, zorder=0)
        )  # fmt: skip
        place -= step


def _clip(name: str, most: int) -> str:
    """Without its middle: names of a kind differ at their ends."""
    half = most // 2
    return name if len(name) <= most else f"{name[: most - half - 1]}…{name[-half:]}"
