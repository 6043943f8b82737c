"""RULER: synthetic tasks, as its scripts write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvplan.check.cases import Case, Turn
from kvplan.check.suites.base import Row, Suite, field, suites, texts

_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@suites.register("ruler")
class Ruler(Suite):
    """Rows of `input`, `outputs` and (in newer versions) `answer_prefix`.

    Hsieh et al. 2024, arXiv:2404.06654. The task is the name of the file's folder, as in
    `niah_single_1/validation.jsonl`. All outputs are asked for, except in `qa_*`, where one of them is enough.
    """

    only_aware = True

    def cases(self, rows: Sequence[Row], subset: str, where: str) -> Iterator[tuple[str, Case]]:
        kind = subset.split("_")[0]
        scorer = "substring" if kind == "qa" else "all_substrings"
        for number, row in enumerate(rows):
            place = f"{where}: row {number}"
            asked = field(row, "input", str, place) + str(row.get("answer_prefix") or "")
            turn = Turn(asked, texts(row, "outputs", place))
            yield subset, Case("", (turn,), scorer, _NEW_TOKENS.get(kind, 128))
