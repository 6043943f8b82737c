"""The report in a real browser: nothing cut off, nothing on top of anything, no complaint, with and without scripts.

`SCREENSHOTS=folder` keeps the screenshots; look at them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from webdriver import MISSING, Browser, browser

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from report_fakes import inputs

from kvplan.report.html import render

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING) and not os.environ.get("NEEDS_BROWSER"), reason=MISSING),
]
LAYOUT = (Path(__file__).parent / "layout.js").read_text(encoding="utf-8")
WIDTHS = (1280, 800, 400)
PAGES = {
    "usual": {},
    "large": {"layers": 48, "tokens": 2048},
    "bare": {"profile": None, "study": None, "results": None},
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {}
    for name, changes in PAGES.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(render(inputs(**changes)), encoding="utf-8")
    return made


def shoot(tab: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.screenshot(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_and_nothing_overlaps(tab: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    tab.resize(width)
    tab.emulate()
    tab.open(pages[name])
    shoot(tab, f"{name}-{width}")
    assert tab.run(LAYOUT) == []
    assert tab.console() == []


def test_the_layout_check_sees_what_is_wrong(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(800)
    tab.open(pages["bare"])
    tab.run("document.querySelector('h2').style.marginBottom = '-40px'")
    tab.run("document.querySelector('.look').style.width = '2000px'")
    tab.run("document.querySelector('figure svg.narrow text').setAttribute('transform', 'translate(-30 10)')")
    found = "\n".join(tab.run(LAYOUT))
    assert "overlap: budgets <h2>" in found and "outside the window: budgets <p>" in found and "cut off:" in found


def test_a_dark_page_is_dark_and_its_text_light(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(1280)
    tab.emulate(dark=True)
    tab.open(pages["usual"])
    shoot(tab, "usual-dark")
    page, text, label = tab.run(
        "const colour = (e, p) => getComputedStyle(e)[p].match(/\\d+/g).slice(0, 3).map(Number);"
        "return [colour(document.body, 'backgroundColor'), colour(document.body, 'color'),"
        " colour(document.querySelector('figure svg text'), 'fill')]"
    )
    assert max(page) < 60 and min(text) > 200 and min(label) > 150
    assert tab.run(LAYOUT) == []


def test_the_slider_shows_what_a_layer_keeps(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(1280)
    tab.emulate()
    tab.open(pages["usual"])
    move = (
        "const s = document.getElementById('layer'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
        "return [document.getElementById('layer-told').textContent,"
        " Array.from(document.querySelectorAll('.prompt span'), t => t.className).join(' ')]"
    )
    first, (_, shades) = tab.run(move, 0), tab.run(move, 1)
    assert set(shades.split()) == {"k8"}  # layer 0 holds everything
    told, shades = tab.run(move, 2)
    assert told.startswith("layer 1 (streaming) keeps") and set(shades.split()) == {"k0", "k4", "k8"}
    shoot(tab, "usual-layer-1")
    assert tab.run(move, 0) == first
    assert tab.console() == []


def test_without_scripts_the_text_is_shaded_and_no_slider_is_shown(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(800)
    tab.emulate()
    tab.scripts(False)
    try:
        tab.open(pages["usual"])
    finally:
        tab.scripts(True)
    assert tab.run("return document.getElementById('layer').checkVisibility()") is False
    assert tab.run("return new Set(Array.from(document.querySelectorAll('.prompt span'), t => t.className)).size") > 2
    assert tab.run(LAYOUT) == []


def test_the_numbers_open_inside_the_page(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(400)
    tab.emulate()
    tab.open(pages["large"])
    tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.run(LAYOUT) == []


def test_it_prints_its_pictures_and_not_its_controls(tab: Browser, pages: dict[str, Path]) -> None:
    tab.resize(720)  # a sheet of A4 without its margins
    tab.emulate(print_=True, dark=True)
    tab.open(pages["usual"])
    assert tab.run(LAYOUT) == []
    assert tab.run("return document.querySelector('figure svg.wide').checkVisibility()") is True
    assert tab.run("return document.getElementById('layer').checkVisibility()") is False
    assert tab.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    if folder := os.environ.get("SCREENSHOTS"):
        (Path(folder) / "usual.pdf").write_bytes(printed)


def test_it_asks_the_network_for_nothing(tab: Browser, pages: dict[str, Path]) -> None:
    tab.emulate()
    tab.open(pages["usual"])
    assert tab.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
