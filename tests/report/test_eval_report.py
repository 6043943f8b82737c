"""The tables of `kvplan eval`: what is said of few prompts, and what the legend names."""

from __future__ import annotations

import io
from dataclasses import replace

from report_fakes import results
from rich.console import Console

from kvplan.check.results import Cost
from kvplan.report.eval import notes, tables


def printed(found: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def test_few_prompts_have_no_interval() -> None:
    found = results(baselines=("uniform h2o",))  # 12 agnostic prompts, 4 aware ones
    agnostic, aware = (
        [table for table in tables(found) if str(table.title).startswith("paired")][i : i + 2] for i in (0, 2)
    )
    assert all("[-]" not in printed(table) for table in agnostic)
    assert all("[-]" in printed(table) and "," not in printed(table).split("[-]")[-1] for table in aware)
    assert "[-]: fewer than 5 prompts, too few for an interval." in notes(found)


def test_the_legend_says_whose_speed_the_full_cache_row_is() -> None:
    found = results(baselines=())
    cost = Cost(context_tokens=9, planned_bytes=1, kv_bytes=1, full_bytes=1, peak_bytes=1, speedup=(1.2, 1.1, 1.3))
    timed = replace(found, policies=tuple(replace(policy, cost=cost) for policy in found.policies))
    assert "kvplan's own pool" in " ".join(notes(timed)) and "kvplan's own pool" not in " ".join(notes(found))
    assert max(map(len, notes(timed))) <= 80


def test_long_names_are_folded_and_told_whole() -> None:
    names = [f"uniform:{evictor}+int8/turboquant2@30%" for evictor in ("streaming", "snapkv")] + ["n" * 90]
    for table in tables(results(baselines=tuple(names))):
        lines = printed(table).splitlines()
        assert max(map(len, lines)) <= 80
        first = "".join(str(cell) for cell in table.columns[0].cells).replace("\n", "")
        assert all(name in first for name in names[1:])
