"""A study in PostgreSQL: Optuna's storage, patient with a server that goes away and comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from kvplan.errors import StudyError

DRIVER = "postgresql+psycopg"
EXAMPLE = "postgresql+psycopg://user@host:5432/database"
PATIENCE_SECONDS = 600.0
CONNECT_SECONDS = 10
CREATIONS = 5  # attempts to create the tables

Say = Callable[[str], None]


def parse_url(text: str) -> URL:
    """Raises: StudyError: not an address of a PostgreSQL server; a password in it is never told."""
    try:
        url = sqlalchemy.make_url(text)
        url.port  # noqa: B018 - a port that is no number fails here at the latest
    except (ArgumentError, ValueError) as error:
        raise StudyError(f"--storage: not a URL that can be read; write {EXAMPLE}") from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername=DRIVER)
    if url.drivername != DRIVER:
        raise StudyError(
            f"--storage: '{url.drivername}' is not supported; write the path of a file (one host), or {EXAMPLE}"
        )
    if url.host is not None and "@" in url.host:
        raise StudyError("--storage: more than one @ in the URL; write an @ in a password as %40")
    if not url.database:
        raise StudyError(f"--storage: {shown(url)} names no database; write {EXAMPLE}")
    return url


def shown(url: URL) -> str:
    """Without the password."""
    return url.set(password=None).render_as_string()


@contextmanager
def postgres(url: URL, say: Say = lambda line: None, patience: float = PATIENCE_SECONDS) -> Iterator[PatientStorage]:
    """The storage on a server; its tables are created when they are missing.

    Args:
        url: Of the database.
        say: Told when the connection is lost and when it is back.
        patience: Seconds for which a lost connection is tried again.

    Raises:
        StudyError: the driver is not installed, the server or the database is not there, the login is refused, the
            tables are another Optuna's, or the connection was lost for too long. Never tells the password.
    """
    storage = None
    try:
        storage = _connect(url)
        storage.listen(say, patience)
        yield storage
    except (SQLAlchemyError, StorageInternalError) as error:
        lost = f" for {patience:.0f} s; the same command goes on from there" if _is_lost(error) and storage else ""
        raise StudyError(f"{shown(url)}: {_reason(error, url)}{lost}") from error
    finally:
        if storage is not None:
            storage.engine.dispose()


def _connect(url: URL) -> PatientStorage:
    # One connection for the trials and, now and then, one for the signs of life: a server has a hundred by default.
    options = {
        "pool_size": 1,
        "max_overflow": 1,
        "pool_pre_ping": True,
        "connect_args": {"connect_timeout": CONNECT_SECONDS, "application_name": "kvplan"},
    }
    for left in reversed(range(CREATIONS)):
        try:
            return PatientStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
        except (ImportError, NoSuchModuleError) as error:
            raise StudyError(
                "--storage: the PostgreSQL driver is not installed; pip install 'kvplan[postgres]'"
            ) from error
        except RuntimeError as error:
            raise StudyError(f"{shown(url)}: its tables were made by another version of Optuna") from error
        except DBAPIError as error:
            # Processes that create the tables of an empty database at once: all but one fail, and find them later.
            if left == 0 or _is_lost(error):
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def _retried(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @wraps(method)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(lambda: method(self, *args, **kwargs))

    return call


class PatientStorage(RDBStorage):
    """Repeats what failed because the connection was lost. Every operation of a storage may be repeated: a trial
    created twice is one that nobody runs, which is found like that of a dead worker.

    Attributes:
        num_losses: How many times the connection was lost so far, in any thread.
        patience: Seconds for which an operation is repeated.
    """

    num_losses = 0
    _say: Say = staticmethod(lambda line: None)
    patience: float = 0.0
    _lost_since: float | None = None

    def listen(self, say: Say, patience: float) -> None:
        self._say, self.patience = say, patience

    def patiently(self, operation: Callable[[], Any]) -> Any:
        started, wait = None, 0.5
        while True:
            try:
                found = operation()
            except (StorageInternalError, SQLAlchemyError) as error:
                now = time.monotonic()
                started = now if started is None else started
                if not _is_lost(error) or now - started > self.patience:
                    raise
                self._note_loss()
                self.engine.dispose()
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, 10.0)
            else:
                if self._lost_since is not None and started is not None:
                    self._say(f"storage: connected again after {time.monotonic() - self._lost_since:.0f} s")
                    self._lost_since = None
                return found

    def _note_loss(self) -> None:
        self.num_losses += 1
        if self._lost_since is None:
            self._lost_since = time.monotonic()
            self._say(f"storage: connection lost; trying again for up to {self.patience:.0f} s")


for _name in (
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "_create_new_trial",
    "_set_trial_param",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "_get_trials",
    "_get_best_trial_id",
    "get_trial_id_from_study_id_trial_number",
):
    setattr(PatientStorage, _name, _retried(_name))


def _cause(error: BaseException) -> BaseException:
    """The database's own words, under Optuna's and SQLAlchemy's."""
    while isinstance(error, (StorageInternalError, DBAPIError)):
        inner = getattr(error, "orig", None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error


def _is_lost(error: BaseException) -> bool:
    """Whether the connection broke or could not be made, as opposed to an operation that the database refused."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(inner, (PendingRollbackError, PoolTimeout)):  # what is left of a connection that broke before
        return True
    if not isinstance(inner, DBAPIError):
        return False
    state = getattr(inner.orig, "sqlstate", None)
    # No state: never connected. 08: connection; 57P: shutting down or starting up; 53300: too many connections;
    # 40: two transactions in each other's way.
    return (
        inner.connection_invalidated
        or (state is None and isinstance(inner, sqlalchemy.exc.OperationalError))
        or (state is not None and (state.startswith(("08", "57P", "40")) or state == "53300"))
    )


def _reason(error: BaseException, url: URL) -> str:
    lines = [line.strip() for line in str(_cause(error)).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.replace(url.password, "***") if isinstance(url.password, str) and url.password else text
