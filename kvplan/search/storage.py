"""Where a study is kept, by its address: memory, a file on this host, or a PostgreSQL server for many hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from kvplan.errors import StudyError

HURRY_SECONDS = 3.0


def is_url(address: str | Path | None) -> bool:
    return isinstance(address, str) and "://" in address


def where(address: str | Path) -> str:
    """For messages, without a password.

    Raises:
        StudyError: a URL that cannot be read.
    """
    if not is_url(address):
        return str(address)
    from kvplan.search.postgres import parse_url, shown

    return shown(parse_url(str(address)))


@dataclass(frozen=True)
class Storage:
    """An open storage.

    Attributes:
        backend: Optuna's.
        where: Its address for messages, without a password.
        is_server: It may hold several studies, so that their names matter.
    """

    backend: optuna.storages.BaseStorage
    where: str
    is_server: bool = False

    @property
    def num_losses(self) -> int:
        """How many times the connection was lost so far."""
        return getattr(self.backend, "num_losses", 0)

    def hurry(self) -> None:
        """From now on a lost connection ends this process's work soon: it was asked to stop."""
        if isinstance(limit := getattr(self.backend, "patience", None), float):
            self.backend.patience = min(limit, HURRY_SECONDS)  # type: ignore[attr-defined]

    def study_names(self) -> list[str]:
        return sorted(optuna.get_all_study_names(storage=self.backend))

    def load(self, name: str | None) -> optuna.Study:
        """An existing study; in a file its name need not be known.

        Raises:
            StudyError: there is none, or none of that name.
        """
        names = self.study_names()
        if name is None and len(names) == 1 and not self.is_server:
            name = names[0]
        if name is None and names:
            raise StudyError(f"{self.where}: say with --study which one ({few(names)})")
        if name is None or name not in names:
            there = f"there: {few(names)}" if names else "it holds none"
            what = "no study" if name is None else f"no study '{name}'"
            raise StudyError(f"{self.where}: {what} ({there}); kvplan search --storage creates one")
        return optuna.load_study(study_name=name, storage=self.backend)


@contextmanager
def open_storage(
    address: str | Path | None, say: Callable[[str], None] = lambda line: None, *, create: bool = True
) -> Iterator[Storage]:
    """Open what `address` names: a path, a URL, or None for memory.

    Args:
        address: Of the storage.
        say: Told when a connection is lost and when it is back.
        create: Make a file that is not there.

    Raises:
        StudyError: it cannot be used, or (later) is lost for too long.
    """
    if address is None:
        yield Storage(optuna.storages.InMemoryStorage(), "memory")
    elif is_url(address):
        from kvplan.search.postgres import parse_url, postgres, shown

        url = parse_url(str(address))
        with postgres(url, say) as server:
            yield Storage(server, shown(url), is_server=True)
    else:
        from kvplan.search.journal import journal

        if not create and not Path(address).is_file():
            raise StudyError(f"{address}: no such file; kvplan search creates it, on this host")
        with journal(Path(address)) as file:
            yield Storage(file, str(address))


def few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
