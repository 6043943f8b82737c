"""Where output goes: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import typer
from rich.console import Console

PIPE_WIDTH = 120  # columns of a table that is written to a file or a pipe
BROKEN_PIPE_EXIT = 141
LOG_STEP_PERCENT = 10
MAX_SEED = 2**32 - 1  # what every generator of random numbers takes
MAX_TOKENS = 2**40  # of a context; more is a typing error

_quiet = False


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader (head, less) has gone: stop without a word. rich would exit with 1, which means a finding here."""
        silence_stdout()
        raise typer.Exit(BROKEN_PIPE_EXIT)


def silence_stdout() -> None:
    """Send what is left in stdout's buffer nowhere, so that the interpreter's last flush cannot fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """A stream that the caller closed (`>&-`) becomes the null device; else the next file opened would stand for it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the end


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


_open_closed_streams()
out = _console(stderr=False)
err = _console(stderr=True)


def set_quiet(quiet: bool) -> None:
    """With `quiet` only data (stdout), warnings and errors are written."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def set_verbose(verbose: bool) -> None:
    """With `verbose` the libraries below may talk, on stderr."""
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("kvplan").setLevel(logging.INFO)


def note(message: str) -> None:
    """Talk, on stderr; nothing with --quiet. Wrapped on a terminal alone, so that logs can be searched."""
    if not _quiet:
        err.print(_wrapped(message), soft_wrap=True)


def note_command(command: str) -> None:
    """A command to copy, never broken into lines; nothing with --quiet."""
    if not _quiet:
        err.print(f"  {command}", soft_wrap=True)


def warn(message: str) -> None:
    err.print(_wrapped(f"warning: {message}"), soft_wrap=True)


def _wrapped(message: str) -> str:
    if not err.is_terminal:
        return message
    from kvplan.report.tables import wrapped

    return "\n".join(wrapped(line, err.width) for line in message.splitlines())


def error(message: str) -> None:
    """`error: ...`, once per line of `message`."""
    for line in message.splitlines() or [""]:
        err.print(f"error: {line}", soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Show progress on stderr: a bar on a terminal, one line per 10 % elsewhere, nothing with --quiet.

    Yields:
        `advance(steps=1, note="", below=None)`; the note is shown behind the count, and `below` under the bar of a
        terminal.
    """
    if _quiet:
        yield lambda steps=1, note="", below=None: None
    elif err.is_terminal:
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _log_lines(what, total)


@contextmanager
def stages() -> Iterator[Callable[..., None]]:
    """Show the progress of stages that follow each other: what is reported first of a stage ends the one before.

    Yields:
        `report(what, done, total, note="", below=None)`; see `progress`.
    """
    current, shown = "", 0
    advance: Callable[..., None] | None = None
    with ExitStack() as opened:

        def report(what: str, done: int, total: int, note: str = "", below: Any = None) -> None:
            nonlocal current, shown, advance
            if advance is None or what != current:
                opened.close()
                advance = opened.enter_context(progress(what, total))
                current, shown = what, 0
            advance(done - shown, note=note, below=below)
            shown = done

        yield report


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    from rich import progress as rp

    columns = (
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TimeElapsedColumn(),
        rp.TimeRemainingColumn(),
        rp.TextColumn("{task.fields[note]}", markup=False),
    )

    class Bar(rp.Progress):
        below: Any = None

        def get_renderables(self) -> Iterable[Any]:
            yield from super().get_renderables()
            if self.below is not None:
                yield self.below

    with Bar(*columns, console=err, transient=False) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(steps: int = 1, note: str = "", below: Any = None) -> None:
            bar.below = below if below is not None else bar.below
            if note:
                bar.update(task, advance=steps, note=note)
            else:
                bar.update(task, advance=steps)

        yield advance
        bar.below = None  # what is left on the screen is the bar alone


def _log_lines(what: str, total: int) -> Callable[..., None]:
    started, done, shown = time.monotonic(), 0, 0

    def advance(steps: int = 1, note: str = "", below: Any = None) -> None:
        nonlocal done, shown
        done += steps
        percent = 100 * done // total if total else 100
        if percent // LOG_STEP_PERCENT > shown // LOG_STEP_PERCENT:
            shown = percent
            tail = f", {note}" if note else ""
            err.print(f"{what}: {done}/{total} ({percent}%, {time.monotonic() - started:.0f}s{tail})", soft_wrap=True)

    return advance
