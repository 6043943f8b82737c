"""What every picture owes, and what is special to some."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from report_fakes import BASELINES, inputs, policy, profile, results, sample, study

from kvplan.errors import KVPlanError, MethodError
from kvplan.report.html import LEVELS, level
from kvplan.report.inputs import Inputs, NamedPolicy
from kvplan.report.plots import NARROW, Page, in_order, plots
from kvplan.report.plots.base import spark
from kvplan.report.plots.colours import DARK, LIGHT
from kvplan.report.plots.pareto import Pareto, Point, front
from kvplan.report.plots.svg import inline_svg, save_plot
from kvplan.report.profile import worst_sensitivity
from kvplan.stats import Interval

ALL = [plot.name for plot in in_order()]


def drawn(name: str, given: Inputs | None = None) -> tuple[Any, Any]:
    plot = plots[name]()
    data = plot.data(inputs() if given is None else given)
    assert data is not None
    return plot, data


def test_the_report_has_these_pictures_in_this_order() -> None:
    assert ALL == ["sensitivity", "budgets", "bytes", "pareto", "history", "parameters", "kept"]
    assert sorted(ALL) == plots.names()


@pytest.mark.parametrize("name", ALL)
def test_it_says_in_one_sentence_what_to_look_for(name: str) -> None:
    plot = plots[name]()
    assert re.fullmatch(r"[A-Z][^.]*\.", plot.look_for), plot.look_for
    assert plot.title and plot.needs


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_drawn_from_nothing(name: str) -> None:
    assert plots[name]().data(Inputs()) is None


@pytest.mark.parametrize("name", ALL)
def test_its_numbers_are_a_table(name: str) -> None:
    plot, data = drawn(name)
    table = plot.table(data)
    assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    read = list(csv.reader(io.StringIO(table.csv())))
    assert read[0] == list(table.columns) and len(read) == len(table.rows) + 1


@pytest.mark.parametrize("width", [NARROW, Page().width])
@pytest.mark.parametrize("name", ALL)
def test_it_is_a_small_svg_in_the_colours_of_the_page(name: str, width: int) -> None:
    plot, data = drawn(name)
    svg = inline_svg(plot, data, Page(width))
    root = ET.fromstring(svg)
    assert float(root.get("width", "0")) == width
    assert len(svg) < 60_000
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg)) & set(LIGHT.values())
    assert not colours and "var(--" in svg
    assert root.find("{http://www.w3.org/2000/svg}desc").text == plot.told(data)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ALL)
def test_it_is_the_same_every_time(name: str) -> None:
    plot, data = drawn(name)
    assert inline_svg(plot, data, Page()) == inline_svg(*drawn(name), Page())


@pytest.mark.parametrize("name", ALL)
def test_ids_of_two_drawings_in_a_page_differ(name: str) -> None:
    plot, data = drawn(name)
    wide, narrow = (_referenced(inline_svg(plot, data, Page(width))) for width in (760, 340))
    assert wide and narrow and not wide & narrow


def _referenced(svg: str) -> set[str]:
    """Ids that something in the drawing refers to; each is in it."""
    names = {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)}
    assert all(f'id="{name}"' in svg for name in names)
    return names


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_it_is_a_file_of_its_own(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"budgets{suffix}"
    save_plot(*drawn("budgets"), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert b"var(--" not in content


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KVPlanError, match=r"\.svg or \.png"):
        save_plot(*drawn("budgets"), tmp_path / "budgets.pdf")


def test_an_unknown_picture_names_the_nearest() -> None:
    with pytest.raises(MethodError, match="did you mean 'pareto'"):
        plots["paretto"]


# what is special to some


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        Point(name, share, Interval(kl, kl, kl), found=False)
        for name, share, kl in (
            ("a", 0.1, 1.0),
            ("b", 0.2, 0.1),
            ("c", 0.3, 0.1),
            ("d", 0.2, 0.5),
            ("full cache", 1, 0),
        )
    ]
    assert [p.name for p in front(points)] == ["a", "b"]


def at(name: str, share: float, kl: float, prompts: int | None = None) -> Point:
    return Point(name, share, Interval(kl, kl, kl), found=False, prompts=prompts)


def test_of_nearly_equal_bytes_only_the_better_is_on_the_front() -> None:
    near = [at("a", 0.400, 0.2), at("b", 0.404, 0.1), at("c", 0.408, 0.1), at("d", 0.410, 0.05)]
    assert [p.name for p in front(near)] == ["b", "d"]
    assert [p.name for p in front([at("twin", 0.4, 0.1), at("other twin", 0.4, 0.1)])] == ["twin"]


def test_too_few_prompts_have_no_interval() -> None:
    plot = plots["pareto"]()
    data = Pareto({"p": [at("few", 0.1, 0.2, prompts=4), at("enough", 0.2, 0.1, prompts=5)]})
    enough, few = plot.short(data).splitlines()[1:]
    assert enough.endswith("[0.1000, 0.1000]") and few.endswith("[-]")
    assert [row[4:6] for row in plot.table(data).rows] == [(None, None), (0.1, 0.1)]


def test_a_policy_of_few_prompts_is_drawn_without_interval() -> None:
    found = policy()
    found.provenance["search"] = {"kl": 0.2, "num_prompts": 4}  # as the search states it
    _, data = drawn("pareto", inputs(results=None, policies=(NamedPolicy(Path("few.yaml"), found),)))
    few = data.panels["prompts of the search and of its confirmation"][0]
    assert (few.name, few.kl.mean, few.has_interval) == ("few", 0.2, False)


def test_every_baseline_has_its_interval() -> None:
    plot, data = drawn("pareto")
    assert list(data.panels) == ["question-agnostic, 12 prompts", "question-aware, 4 prompts"]
    for points in data.panels.values():
        assert {p.name for p in points} == {"full cache", "policy", *BASELINES}
        assert all(p.kl.low <= p.kl.mean <= p.kl.high for p in points)
    assert [p.name for p in data.panels["question-aware, 4 prompts"] if p.found] == ["policy"]


def test_without_results_policies_stand_beside_what_the_search_tried_first() -> None:
    plot, data = drawn("pareto", inputs(results=None))
    (points,) = data.panels.values()
    assert {p.name for p in points} == {"policy", *BASELINES}
    assert points[0].share == 0.4 and points[0].kl == Interval(0.0003, 0.0002, 0.0004)


def test_a_single_point_is_no_front() -> None:
    one = inputs(results=None, study=None)
    assert plots["pareto"]().data(one) is None


def test_budgets_tell_shares_and_bytes() -> None:
    _, data = drawn("budgets")
    assert [layer.shares for layer in data.layers] == [None, None, None, None, 0, None, 3, None]
    assert data.layers[1].tokens == 64  # the floor of ten percent of 300 tokens
    assert data.layers[2].heads == (64, 270) and data.layers[2].tokens == 167
    assert data.layers[3].how == "keys turboquant(bits=3), values int8"


def test_bytes_add_up_to_the_plan() -> None:
    plot, data = drawn("bytes")
    table = plot.table(data)
    total = table.columns.index("total")
    assert sum(row[total] for row in table.rows) == data.plan.total == sum(data.by_kind.values())
    assert sum(row[-1] for row in table.rows) == data.plan.full


def test_the_context_is_what_was_asked_for_else_the_samples_else_the_plans() -> None:
    assert inputs(context=99).context_tokens == 99
    assert inputs().context_tokens == 300
    assert inputs(sample=None).context_tokens == 700
    bare = replace(policy(), provenance={})
    assert Inputs(policies=(NamedPolicy(Path("p.yaml"), bare),)).context_tokens == 1024


def test_trials_without_a_score_are_counted_and_not_drawn() -> None:
    record = study()
    broken = replace(record.trials[3], kl=(float("nan"),))
    plot, data = drawn("history", inputs(study=replace(record, trials=(*record.trials[:3], broken))))
    assert "1 trials gave no score" in plot.told(data)
    assert [row[2] is None for row in plot.table(data).rows] == [False, False, False, True]


def test_parameters_are_named_by_the_layers_that_they_decide() -> None:
    _, data = drawn("parameters")
    assert [p.meaning for p in data.found][:3] == [
        "method of layers 0-2",
        "memory of layers 0-2",
        "memory of layers 3, 5, 7",
    ]


def test_layers_with_a_window_of_their_own_have_no_sensitivity() -> None:
    plot, data = drawn("sensitivity")
    assert plot.table(data).rows[-1][2] is None


def test_layers_cut_and_layers_encoded_are_told_apart() -> None:
    plot = plots["sensitivity"]()
    measured = SimpleNamespace(
        spec=profile(3).spec,
        importance=[0.1, 0.1, 0.1],
        sensitivity={
            "tova": {1000: [0.03, 0.002, 0.9], 5000: [0.5, 0.5, 0.5]},
            "snapkv": {1000: [0.01, 0.005, 0.9], 5000: [0.0, 0.0, 0.0]},
        },
        codec_sensitivity={"int8": [0.0, 0.001, 0.0], "turboquant2": [0.2, 1.29, 0.1]},
    )
    data = plot.data(inputs(profile=measured))
    assert data is not None
    cut, encoded = plot.told(data).split(". ")[:2]
    assert "layer 0 suffers most (0.03 nats, tova 10%), layer 1 least (0.005)" in cut  # layer 2 has a window
    assert "layer 1 suffers most (1.29 nats, turboquant2), layer 2 least (0.1)" in encoded
    assert [line.split(": ")[1].split(",")[0] for line in plot.short(data).splitlines()[1::2]] == [
        "0 (0.03)",
        "1 (1.3)",
    ]
    worst = np.max([way.damage for way in data.cut], axis=0)
    assert [f"{kl:.4f}" for kl in worst[:2]] == worst_sensitivity(measured)[:2]  # type: ignore[arg-type]


def test_shades_keep_nothing_and_everything_apart() -> None:
    shares = np.array([0.0, 0.001, 0.5, 0.999, 1.0])
    assert level(shares).tolist() == [0, 1, 4, LEVELS - 1, LEVELS]


def test_sparks_go_from_the_lowest_to_the_highest_block() -> None:
    assert spark([0, 0.5, 1]) == "▁▅█" and spark([0, 0]) == "▁▁" and spark([]) == ""


def test_both_kinds_of_page_have_every_colour() -> None:
    assert set(LIGHT) == set(DARK)


def _contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_can_be_seen(colours: dict[str, str]) -> None:
    assert _contrast(colours["ink"], colours["page"]) >= 7
    assert _contrast(colours["muted"], colours["page"]) >= 4.5  # WCAG 2.2, AA
    assert _contrast(colours["warm"], colours["page"]) >= 4.5
    assert all(_contrast(c, colours["page"]) >= 1.9 for n, c in colours.items() if n.startswith("series"))


def test_results_alone_are_enough_for_a_front() -> None:
    assert plots["pareto"]().data(Inputs(results=results())) is not None


def test_tokens_kept_are_counted() -> None:
    plot, data = drawn("kept")
    told = plot.told(data)
    assert f"{int((data.layers_holding == 0).sum())} in none" in told
    assert plot.table(data).rows[0][:2] == (0, sample().pieces[0])
