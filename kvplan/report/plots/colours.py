"""Colours by what they mean, for light and for dark pages; told apart also by the colour-blind (Okabe and Ito, 2008).

Pictures are drawn in the light colours. In a page each of them becomes a CSS variable of the same name, so one drawing
serves both; that is why no two light colours may be equal.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1d2733",
    "muted": "#556270",
    "line": "#cfd6de",
    "page": "#ffffff",
    "accent": "#0072b2",
    "warm": "#c2410c",
    "plain": "#9aa7b4",
    "series-0": "#0173b2",
    "series-1": "#de8f05",
    "series-2": "#029e73",
    "series-3": "#cc78bc",
    "series-4": "#ca9161",
    "series-5": "#56b4e9",
    "series-6": "#b3a208",
    "series-7": "#a5366f",
}
DARK = {
    "ink": "#e8edf2",
    "muted": "#a5b1bd",
    "line": "#3a4552",
    "page": "#12171d",
    "accent": "#4fb3e8",
    "warm": "#ff9a62",
    "plain": "#6f7c89",
    "series-0": "#4ba3dc",
    "series-1": "#f0ab3c",
    "series-2": "#35c497",
    "series-3": "#dd9bd0",
    "series-4": "#d9ab84",
    "series-5": "#8fd0f5",
    "series-6": "#d8c93a",
    "series-7": "#d9709f",
}
# Heat maps are one colour, more or less of it on the page: right on both kinds of page.
HEAT = (0.07, 0.50, 0.80)

assert set(LIGHT) == set(DARK) and len(set(LIGHT.values())) == len(LIGHT)


def series(index: int) -> str:
    return LIGHT[f"series-{index % 8}"]


def as_variables(svg: str) -> str:
    """The light colours of a drawing as `var(--name)`."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def css(colours: dict[str, str]) -> str:
    """Declarations of the variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
