"""GSM8K: problems of arithmetic in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvplan.check.cases import Case, Turn
from kvplan.check.suites.base import Row, Suite, field, suites
from kvplan.errors import DataError

SHOTS = 4
NEW_TOKENS = 256


@suites.register("gsm8k")
class GSM8K(Suite):
    """Rows of `question` and `answer`, the result behind `####`.

    Cobbe et al. 2021, arXiv:2110.14168. The first four rows, solved, are the context of all others, which are asked.
    """

    hub = "openai/gsm8k"
    subset = "main"

    def cases(self, rows: Sequence[Row], subset: str, where: str) -> Iterator[tuple[str, Case]]:
        solved = []
        for number, row in enumerate(rows):
            place = f"{where}: row {number}"
            question, answer = (field(row, name, str, place).strip() for name in ("question", "answer"))
            if "####" not in answer:
                raise DataError(f"{place}: answer: no result behind '####'")
            if number < SHOTS:
                solved.append(f"Question: {question}\nAnswer: {answer}")
                continue
            turn = Turn(f"Question: {question}\nAnswer:", (answer,))
            yield "gsm8k", Case("\n\n".join(solved), (turn,), "number", NEW_TOKENS)
