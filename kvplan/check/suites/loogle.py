"""LooGLE: questions about long documents."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvplan.check.cases import Case, Turn
from kvplan.check.suites.base import Row, Suite, field, suites, texts
from kvplan.errors import DataError

QA_TOKENS, SUMMARY_TOKENS = 64, 512
_SUMMARY = "Summarize the text above.\nSummary:"


@suites.register("loogle")
class LooGLE(Suite):
    """Rows of a text with questions or a summary.

    Li et al. 2023, arXiv:2311.04939. Rows hold `context`, `question` and `answer`; or `input` and `qa_pairs` (as
    published first), asked in turn on one document; or a text and its summary in `output` or `answer`. Scored by
    ROUGE-L, one of the paper's metrics. `shortdep_cloze` is refused: its answers are filled-in entities.
    """

    hub = "bigai-nlco/LooGLE"
    subset = "longdep_qa"

    def cases(self, rows: Sequence[Row], subset: str, where: str) -> Iterator[tuple[str, Case]]:
        for number, row in enumerate(rows):
            place = f"{where}: row {number}"
            if "cloze" in f"{subset} {row.get('task', '')}":
                raise DataError(f"{place}: cloze tests are not supported; take a file of questions or summaries")
            context = field(row, "context" if "context" in row else "input", str, place)
            pairs = _pairs(row.get("qa_pairs"), place)
            if pairs:
                turns = tuple(_turn(field(p, "Q", str, place), texts(p, "A", place)) for p in pairs)
                yield subset, Case(context, turns, "rouge_l", QA_TOKENS)
            elif str(row.get("question") or "").strip():
                turn = _turn(field(row, "question", str, place), texts(row, "answer", place))
                yield subset, Case(context, (turn,), "rouge_l", QA_TOKENS)
            else:
                summary = texts(row, "output" if "output" in row else "answer", place)
                yield subset, Case(context, (Turn(_SUMMARY, summary),), "rouge_l", SUMMARY_TOKENS)


def _turn(question: str, answers: tuple[str, ...]) -> Turn:
    return Turn(f"Question: {question.strip()}\nAnswer:", answers)


def _pairs(value: Any, where: str) -> list[Mapping[str, Any]]:
    """The questions of a document: a list, or the text of one; "none" where there are none."""
    if isinstance(value, str) and value.strip() not in ("", "none"):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)  # the first files hold Python's notation; this evaluates nothing
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise DataError(f"{where}: qa_pairs: neither JSON nor a list") from error
    if value in (None, "", "none"):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, Mapping) for pair in value):
        raise DataError(f"{where}: qa_pairs: expected a list of questions and answers")
    return value
