"""`kvplan` in forks of a process that has imported everything: a command takes what it takes, not ten seconds more."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path


def prepare() -> None:
    """Import what the commands import. Call it before anything else is imported that may start threads."""
    # Read when torch and numpy are imported: a process with threads cannot be forked.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import optuna

    import kvplan.check.scoring
    import kvplan.cli.app
    import kvplan.search.study  # noqa: F401

    optuna.logging.set_verbosity(optuna.logging.ERROR)


def start(argv: Sequence[str], folder: Path, log: str = "log.txt") -> int:
    """A `kvplan` in that folder, which writes to `log` there; returns its process."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(stream, number)
        from kvplan.cli.app import app
        from kvplan.cli.exits import run_app

        code = run_app(app, argv)
    finally:
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None when it still runs after that time."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(left, 0.005))
