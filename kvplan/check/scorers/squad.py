"""SQuAD's comparison of two texts, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def squad(text: str, references: Sequence[str]) -> dict[str, float]:
    """`exact_match` and `f1`, 0 to 1, each the best over the references."""
    from torchmetrics.functional.text import squad as measure

    answers: Any = {"text": list(references), "answer_start": [0] * len(references)}
    found = measure([{"prediction_text": text, "id": "0"}], [{"answers": answers, "id": "0"}])
    return {name: float(value) / 100 for name, value in found.items()}
