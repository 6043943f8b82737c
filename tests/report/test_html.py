"""The report as a file: alone, small, and showing what it was given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fakes import inputs, policy, sample

from kvplan.errors import KVPlanError
from kvplan.policy.serialize import policy_fingerprint
from kvplan.report.html import render
from kvplan.report.inputs import Inputs, NamedPolicy
from kvplan.report.plots import in_order
from kvplan.report.terminal import short_forms

LIMIT = 1_000_000


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render(inputs())


def test_it_fetches_nothing(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "audio", "video"), tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    styles = re.findall(r"url\(([^)]*)\)|@import", page)
    assert all(style.startswith("#") for style in styles)
    assert "default-src 'none'" in page


def test_every_picture_is_there_with_what_to_look_for(page: str) -> None:
    text = Page(page).text
    for plot in in_order():
        assert plot.title in text and plot.look_for in text


def test_every_picture_has_words_for_those_who_cannot_see_it(page: str) -> None:
    drawings = [attributes for tag, attributes in Page(page).tags if tag == "svg"]
    ids = {attributes["id"] for _, attributes in Page(page).tags if "id" in attributes}
    assert len(drawings) == 2 * len(in_order())
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set(drawing["aria-labelledby"].split()) <= ids


def test_ids_are_used_once(page: str) -> None:
    # Groups of a drawing have names that nothing refers to.
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-[a-z]+="([^"]+)"', page))
    wanted = {name for names in used for name in names if name}
    found = re.findall(r' id="([^"]+)"', page)
    assert all(found.count(name) == 1 for name in wanted & set(found))


def test_the_prompt_is_shown_as_text_whatever_is_in_it(page: str) -> None:
    assert "".join(sample().pieces) in Page(page).text
    assert "<b>" not in page.split('class="prompt"')[1].split("</div>")[0]


def test_the_sliders_data_is_what_layers_hold(page: str) -> None:
    held = json.loads(re.search(r'id="held">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(held) == 8
    assert all(len(layer["held"]) == 300 for layer in held)
    assert set(held[0]["held"]) == {"8"} and set(held[1]["held"]) == {"0", "4", "8"}
    assert held[4]["told"].startswith("layer 4 (reads layer 0) keeps")


def test_a_large_model_and_a_long_prompt_stay_below_a_megabyte() -> None:
    assert len(render(inputs(layers=80, tokens=2048)).encode()) < LIMIT


def test_what_is_missing_is_named() -> None:
    page = render(Inputs(policies=(NamedPolicy(Path("p.yaml"), policy()),)))
    text = Page(page).text
    assert "Where the bytes go" in text
    assert "Which layers matter: needs a profile (kvplan calibrate)" in text
    assert "<script" not in page


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(KVPlanError, match="nothing can be drawn"):
        render(Inputs())


def test_short_forms_fit_a_terminal() -> None:
    told = short_forms(inputs()).plain
    assert all(len(line) <= 80 for line in told.splitlines())
    assert all(plot.title in told for plot in in_order())


def test_the_kl_on_top_says_whose_prompts() -> None:
    confirmed = policy()
    search = {**confirmed.provenance["search"], "prompts": "confirmation", "num_prompts": 32}
    confirmed = replace(confirmed, provenance={**confirmed.provenance, "search": search})
    given = inputs(sample=None, policies=(NamedPolicy(Path("policy.yaml"), confirmed),))
    page = render(given)  # the results are of another plan
    assert "nats of KL from the full cache on 32 confirmation prompts" in page and "kvplan eval, " not in page

    assert given.results is not None
    measured = tuple(
        replace(p, fingerprint=policy_fingerprint(confirmed)) if p.name == "policy" else p
        for p in given.results.policies
    )
    page = render(replace(given, results=replace(given.results, policies=measured)))
    assert "full cache on 12 prompts of kvplan eval, question-agnostic" in page
    assert "full cache on 4 prompts of kvplan eval, question-aware" in page
    assert "confirmation prompts" not in page
