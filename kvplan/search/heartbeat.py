"""Signs of life: which process runs a trial, and when another may take it for dead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

BEAT = "kvplan:beat"
BEATS_PER_GRACE = 3


@dataclass(frozen=True)
class Owner:
    """The process that runs a trial.

    Attributes:
        machine: The boot and the process namespace that `pid` belongs to; empty where the system does not tell.
        pid: Of the process.
        started: When it started, in the system's ticks, so that a process that got a dead one's pid is not mistaken.
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Owner:
        pid = os.getpid()
        return cls(_machine(), pid, _started(pid))

    def is_dead(self) -> bool:
        """True only when it is known: another machine's processes are never."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextmanager
def beating(study: optuna.Study, trial_id: int, every: float) -> Iterator[None]:
    """Write a sign of life of this process to a trial, now and then every so many seconds."""
    owner, stop = asdict(Owner.here()), threading.Event()

    def beat(count: int) -> None:
        study._storage.set_trial_system_attr(trial_id, BEAT, {"owner": owner, "count": count})

    def keep_on() -> None:
        count = 1
        while not stop.wait(every):
            # Taken for dead, or out of patience with the storage: the trial's own thread meets the same.
            with suppress(Exception):
                beat(count)
            count += 1

    beat(0)
    thread = threading.Thread(target=keep_on, name="kvplan-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Watch:
    """Tells which running trials are dead.

    A trial is dead when its process is known to be, or when its sign of life has not changed for `grace` seconds of
    watching. Only this process's own clock counts, so the clocks of hosts need not agree; and a storage that was away
    makes nobody look dead (`forget`).
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def dead(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        now = self._clock()
        found = []
        for trial in running:
            beat = trial.system_attrs.get(BEAT)
            last, since = self._seen.get(trial.number, (None, now))
            if trial.number not in self._seen or last != beat:
                self._seen[trial.number] = (beat, now)
                since = now
            if (beat is not None and Owner(**beat["owner"]).is_dead()) or now - since > self._grace:
                found.append(trial)
        return found

    def forget(self) -> None:
        """Start watching anew: nobody could write for a while."""
        self._seen.clear()
