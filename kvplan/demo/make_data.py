"""Write calib_data, the same bytes every time: `python -m kvplan.demo.make_data OUT_DIR`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kvplan.demo.prompts import records
from kvplan.demo.world import SPLITS
from kvplan.files import write_text

SHORT_PER_LONG = 4


def split_records(split: str) -> Iterator[dict[str, Any]]:
    """The records of one split, in file order."""
    if split != "heldout":
        yield from records(split, {"calibrate": 48, "search": 96}[split], (600, 1024))
        return
    short, long = records(split, 240, (960, 1024)), records(split, 60, (1960, 2048), "long-")
    for record in long:
        yield from islice(short, SHORT_PER_LONG)
        yield record


def split_text(split: str) -> str:
    """One split as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in split_records(split))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvplan.demo.make_data", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_text(out_dir / f"{split}.jsonl", split_text(split))
        print(out_dir / f"{split}.jsonl")


if __name__ == "__main__":
    main()
