"""A picture of a report: its data, its drawing, its short form for a terminal, and one sentence on what to look for."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kvplan.errors import KVPlanError
from kvplan.registry import Registry
from kvplan.report.inputs import Inputs
from kvplan.report.plots.colours import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

D = TypeVar("D")
WIDE, NARROW = 760, 340  # CSS pixels
_DPI = 72  # of matplotlib's SVG, so that a point is a pixel
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Table:
    """The numbers behind a picture."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Page:
    """How much room a drawing has, in CSS pixels."""

    width: int = WIDE

    @property
    def is_wide(self) -> bool:
        return self.width >= 600

    def figure(self, height: float) -> Figure:
        """Nothing is cut off, whatever its labels.

        Raises:
            KVPlanError: matplotlib is missing.
        """
        size = (self.width / _DPI, height / _DPI)
        made: Figure = figure_class()(figsize=size, dpi=_DPI, layout="constrained", facecolor="none")
        return made

    def axes(self, height: float) -> tuple[Figure, Axes]:
        figure = self.figure(height)
        axes = figure.add_subplot()
        plain(axes)
        return figure, axes


def figure_class() -> Any:
    """matplotlib's `Figure`.

    Raises:
        KVPlanError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KVPlanError(
            "pictures are drawn by matplotlib, which is not installed: pip install matplotlib jinja2"
        ) from error
    return Figure


def plain(axes: Axes) -> None:
    """No frame, and light lines to read values by."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


class Plot(ABC, Generic[D]):
    """One kind of picture.

    Attributes:
        order: Its place in the report.
        title: A heading.
        look_for: One sentence for someone who never read a paper.
        needs: The input that it is drawn from, and the command that writes it.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    title: ClassVar[str]
    look_for: ClassVar[str]
    needs: ClassVar[str]

    @abstractmethod
    def data(self, inputs: Inputs) -> D | None:
        """What is drawn, or None where its input was not given."""

    @abstractmethod
    def told(self, data: D) -> str:
        """What there is to see, in a sentence or two: the caption, and the text for those who cannot see it."""

    @abstractmethod
    def table(self, data: D) -> Table:
        """The numbers."""

    @abstractmethod
    def draw(self, data: D, page: Page) -> Figure:
        """The picture, in the light colours."""

    @abstractmethod
    def short(self, data: D) -> str:
        """A line or a few for the terminal, at most 80 columns wide."""


plots: Registry[Plot[Any]] = Registry("picture")


def in_order() -> list[Plot[Any]]:
    """All pictures, as a report shows them."""
    return sorted((plots[name]() for name in plots), key=lambda plot: plot.order)


def spark(values: Sequence[float], top: float | None = None) -> str:
    """A bar of one character per value; the full height is `top`, or the largest of them."""
    top = max(values, default=0.0) if top is None else top
    return "".join(_BLOCKS[min(int(8 * value / top), 7) if top > 0 else 0] for value in values)


def layer_rows(page: Page, num_layers: int, extra: float = 64) -> float:
    """The height of a picture with a row per layer."""
    return extra + num_layers * (26 if num_layers <= 16 else 18 if num_layers <= 40 else 14)


def layer_axis(axes: Axes, num_layers: int) -> None:
    """Layers downwards, the first on top."""
    step = 1 if num_layers <= 48 else 2
    axes.set_yticks(range(0, num_layers, step), [str(i) for i in range(0, num_layers, step)])
    axes.set_ylim(num_layers - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def log_axis(axes: Axes) -> None:
    """KL upwards, in powers of ten that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-5 else f"{value:.9g}"))
    axes.set_ylabel("KL in nats (log scale)")
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)


def legend(axes: Axes, page: Page) -> None:
    """Above the axes, so that it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=6 if page.is_wide else 2,
        frameon=False,
        fontsize=11,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
        borderaxespad=0.2,
        labelcolor=LIGHT["ink"],
    )
