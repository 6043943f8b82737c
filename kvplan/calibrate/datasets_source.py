"""load_dataset_split(): rows of a local file or of the hub, through `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvplan.errors import DataError

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_dataset_split(source: str, split: str | None = None, *, config: str | None = None) -> Any:
    """One split of a local file, a local folder or a hub dataset.

    Args:
        split: Needed where there are several.
        config: The configuration of a hub dataset that has several.

    Raises:
        DataError: it cannot be loaded, or the split must be chosen.
    """
    path = Path(source)
    loader = _LOADERS.get(path.suffix.lower())
    if loader and not path.is_file():
        raise DataError(f"{source}: no such file")
    if path.is_file() and not loader:
        raise DataError(f"{source}: unknown kind of file (known: .txt, {', '.join(_LOADERS)})")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # A folder by its full name; "." would be taken for a dataset without a name.
    name = str(path.resolve()) if path.is_dir() else source
    try:
        found = datasets.load_dataset(loader, data_files=str(path)) if loader else datasets.load_dataset(name, config)
    except Exception as error:  # Network, hub, parser: whatever it was, the user gets its first line.
        hint = "" if path.exists() else "; check the name, or give a local file when offline"
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(f"{source}: cannot load this dataset ({first_line(cause)}){hint}") from error
    splits = list(found)
    if split is None and len(splits) == 1:
        return found[splits[0]]
    if split not in splits:
        chosen = "choose one with --split" if split is None else f"no split {split!r}"
        raise DataError(f"{source}: {chosen} (splits: {', '.join(splits)})")
    return found[split]


def first_line(error: Exception) -> str:
    """What a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
