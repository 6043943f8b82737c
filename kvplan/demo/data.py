"""Where the bundled files lie: inside the installed package, or in a checkout of the repository."""

from __future__ import annotations

from pathlib import Path

from kvplan.demo.world import SPLITS
from kvplan.errors import DataError


def calib_data_path(split: str = "calibrate") -> Path:
    """The JSON-lines file of one split of `calib_data`.

    Raises:
        DataError: no such split, or the file is neither in the package nor in the checkout.
    """
    if split not in SPLITS:
        raise DataError(f"calib_data has no split {split!r} (known: {', '.join(SPLITS)})")
    here = Path(__file__).resolve().parent
    folders = (here / "calib_data", here.parents[1] / "calib_data")
    for folder in folders:
        if (path := folder / f"{split}.jsonl").is_file():
            return path
    remedy = "`python -m kvplan.demo.make_data DIR` makes them again"
    raise DataError(f"{folders[0] / split}.jsonl: the bundled prompts are missing; {remedy}")
