"""A drawing as a file: SVG and PNG on their own, and SVG for inside a page."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.errors import KVPlanError
from kvplan.files import write_bytes, write_text
from kvplan.report.plots.base import Page, Plot, figure_class
from kvplan.report.plots.colours import LIGHT, as_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
_PNG_DPI = 144  # two pixels a CSS pixel
_LONG_NUMBER = re.compile(r"(?<![\w.#-])-?\d+\.\d{3,}(?![\w.])")
_FONTS = "'DejaVu Sans', Verdana, Geneva, sans-serif"


def save_plot(plot: Plot[Any], data: Any, path: Path) -> None:
    """Write one picture, by the path's suffix as SVG or PNG, on white.

    Raises:
        KVPlanError: another suffix, no matplotlib, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise KVPlanError(f"{path}: pictures are written as {' or '.join(SUFFIXES)}")
    with _style(plot.name):
        figure = plot.draw(data, Page())
        if path.suffix == ".png":
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=_PNG_DPI, facecolor=LIGHT["page"], metadata={"Software": None})
            write_bytes(path, image.getvalue())
        else:
            write_text(path, _tidy(_svg(figure, facecolor=LIGHT["page"])) + "\n")


def inline_svg(plot: Plot[Any], data: Any, page: Page) -> str:
    """An `<svg>` for a page: its colours are the page's variables, its text is text."""
    with _style(f"{plot.name}-{page.width}"):
        text = _tidy(_svg(plot.draw(data, page), facecolor="none"))
    text = re.sub(r"^.*?<svg", "<svg", text, count=1, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    name = f"{plot.name}-{page.width}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{"wide" if page.is_wide else "narrow"}" '
        f'viewBox="0 0 {size[1]} {size[2]}" width="{size[1]}" height="{size[2]}" '
        f'role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(plot.title)}</title>'
        f'<desc id="{name}-desc">{escape(plot.told(data))}</desc>'
    )
    return as_variables(re.sub(r"^<svg[^>]*>", head, text, count=1).replace("xlink:href", "href"))


def _svg(figure: Figure, facecolor: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor=facecolor, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _tidy(svg: str) -> str:
    """Hundredths of a pixel are enough; the fonts are those that readers have."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: _LONG_NUMBER.sub(_hundredths, tag[0]), svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONTS, svg)
    return re.sub(r">\s+<", "><", svg).strip()


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _style(name: str) -> Any:
    """What all drawings have in common; `name` makes the ids inside a drawing its own, and the same each time."""
    figure_class()  # says in one line when matplotlib is missing
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": f"kvplan {name}",
            "font.family": "DejaVu Sans",
            "font.size": 12,
            "axes.labelsize": 11,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "text.color": LIGHT["ink"],
            "axes.labelcolor": LIGHT["muted"],
            "axes.edgecolor": LIGHT["line"],
            "xtick.color": LIGHT["muted"],
            "ytick.color": LIGHT["muted"],
        }
    )
