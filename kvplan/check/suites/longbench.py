"""LongBench: 16 tasks in English and in code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvplan.check.cases import Case, Turn
from kvplan.check.suites.base import Row, Suite, field, suites, texts
from kvplan.errors import DataError
from kvplan.registry import unknown


class _Kind(NamedTuple):
    """How a data set is asked and scored; `{}` in the question stands for the row's `input`."""

    question: str
    scorer: str
    max_new_tokens: int


_QA = "Answer the question with words of the text, as shortly as you can.\nQuestion: {}\nAnswer:"
_SUMMARY = "Summarize the text above.\nSummary:"
_SHOTS = "{}"
_COUNT = "How many different paragraphs are above, without counting repeated ones? Answer with the number.\nAnswer:"
_WHICH = "Which of the paragraphs above does this abstract belong to?\n{}\nAnswer with its number.\nAnswer: Paragraph"
_CODE = "{}\nNext line of code:\n"

KINDS = {
    "narrativeqa": _Kind(_QA, "f1", 128),
    "qasper": _Kind(_QA, "f1", 128),
    "multifieldqa_en": _Kind(_QA, "f1", 64),
    "hotpotqa": _Kind(_QA, "f1", 32),
    "2wikimqa": _Kind(_QA, "f1", 32),
    "musique": _Kind(_QA, "f1", 32),
    "triviaqa": _Kind(_SHOTS, "f1", 32),
    "gov_report": _Kind(_SUMMARY, "rouge_l", 512),
    "multi_news": _Kind(_SUMMARY, "rouge_l", 512),
    "qmsum": _Kind("Answer from the meeting above.\nQuestion: {}\nAnswer:", "rouge_l", 512),
    "samsum": _Kind(_SHOTS, "rouge_l", 128),
    "trec": _Kind(_SHOTS, "substring", 64),
    "passage_count": _Kind(_COUNT, "numbers", 32),
    "passage_retrieval_en": _Kind(_WHICH, "numbers", 32),
    "lcc": _Kind(_CODE, "edit_similarity", 64),
    "repobench-p": _Kind(_CODE, "edit_similarity", 64),
}


@suites.register("longbench")
class LongBench(Suite):
    """Rows of `input`, `context`, `answers` and `dataset`: one JSON-lines file a data set.

    Bai et al. 2023, arXiv:2308.14508. The metrics are the paper's, except that `trec` counts a class that is named
    anywhere; the instructions are our own words, so scores are to be compared with each other only. Chinese data sets
    are refused: their metrics need a word segmenter.
    """

    def cases(self, rows: Sequence[Row], subset: str, where: str) -> Iterator[tuple[str, Case]]:
        for number, row in enumerate(rows):
            place = f"{where}: row {number}"
            name = str(row.get("dataset") or subset).removesuffix("_e")
            if name not in KINDS:
                raise DataError(f"{place}: {unknown('English data set of LongBench', name, sorted(KINDS))}")
            kind = KINDS[name]
            # Of summaries the input is empty.
            question = kind.question.replace("{}", str(row.get("input") or ""))
            turn = Turn(question, texts(row, "answers", place))
            yield name, Case(field(row, "context", str, place), (turn,), kind.scorer, kind.max_new_tokens)
