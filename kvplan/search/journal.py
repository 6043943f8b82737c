"""A study in a file: Optuna's journal, safe against processes killed at any point and against writers at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from kvplan.errors import StudyError

_FIRST = b'{"op_code":'


class _FileLock(JournalFileOpenLock):
    """Held while a line is appended. Unlike Optuna's locks, the kernel drops ours when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        self._file = self._path.open("r+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        _drop_torn_line(self._path)
        return True

    def release(self) -> None:
        self._file.close()


@contextmanager
def journal(path: Path) -> Iterator[optuna.storages.JournalStorage]:
    """The storage in a file, which is created when it is missing.

    Raises:
        StudyError: the file cannot be used, or is not a journal.
    """
    try:
        with path.open("ab"):
            pass
        _refuse_other_files(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot write the search there ({error.strerror})") from error
    try:
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=_FileLock(path)))
            storage.get_all_studies()
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise StudyError(f"{path}: not a search that kvplan wrote; give another --storage") from error
        yield storage
    except OSError as error:
        if error.filename is not None:
            raise
        # The journal is the only file that is written through an open handle.
        raise StudyError(
            f"{path}: cannot write the search there ({error.strerror}); the same command goes on from it"
        ) from error


def _refuse_other_files(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(_FIRST))
    if not start.startswith(_FIRST[: len(start)]):
        raise StudyError(f"{path}: not a search that kvplan wrote; give another --storage")  # and never cut it


def _drop_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line, which would spoil the next one. Call with the lock held."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        data: Any = file.read()
    os.truncate(path, data.rfind(b"\n") + 1)
