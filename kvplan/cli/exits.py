"""From exceptions to one line and an exit code.

0 done, 1 a finding, 2 usage or configuration, 3 inconclusive (kvplan check), 4 not comparable, 70 a bug of ours,
130 interrupted (143 by SIGTERM), 141 reader gone.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import typer

from kvplan.cli import config, usage
from kvplan.cli.console import BROKEN_PIPE_EXIT, error, silence_stdout
from kvplan.errors import KVPlanError, is_out_of_memory

FINDING_EXIT = 1
USAGE_EXIT = 2
INCONCLUSIVE_EXIT = 3
INTERNAL_EXIT = 70
INTERRUPT_EXIT = 130
TERMINATED_EXIT = 143

# Flags of the whole program, accepted before the command and after it.
_GLOBAL_FLAGS = ("--debug", "-q", "--quiet", "--verbose", "--explain-config")


def hoist(argv: Sequence[str], command: Any) -> list[str]:
    """Move the global flags in front of the command: 'search --debug' -> '--debug search'.

    What stands as an option's value or after '--' is not a flag, and stays.

    Args:
        argv: The arguments.
        command: The click command that will parse them; tells which options take values.
    """
    flags: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            others += [word, *words]
        elif word in _GLOBAL_FLAGS:
            flags.append(word)
        else:
            others.append(word)
            if word.startswith("-"):
                others += itertools.islice(words, _num_values(command, word))
            else:
                command = getattr(command, "commands", {}).get(word, command)
    return [*flags, *others]


def _num_values(command: Any, option: str) -> int:
    """How many of the arguments after `option` belong to it."""
    match = next((p for p in command.params if option in (*p.opts, *p.secondary_opts)), None)
    return 0 if match is None or getattr(match, "is_flag", False) or match.count else match.nargs


def wants_debug(argv: Sequence[str]) -> bool:
    """Whether tracebacks are wanted; `argv` as `hoist` returns it."""
    flags = itertools.takewhile(lambda word: word in _GLOBAL_FLAGS, argv)
    return "--debug" in flags or os.environ.get("KVPLAN_DEBUG", "") not in ("", "0")


def run_app(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run the app and return the exit code; every failure has been reported on stderr."""
    argv = hoist(argv, typer.main.get_command(app))
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt  # so that every `except KeyboardInterrupt` cleans up for both signals

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, on_signal)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
            before[signal.SIGINT] = signal.signal(signal.SIGINT, on_signal)
    try:
        code = _run(app, argv, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == INTERRUPT_EXIT:
        error("interrupted")
        return TERMINATED_EXIT if signal.SIGTERM in received else INTERRUPT_EXIT
    return code


def leave(code: int) -> NoReturn:
    """End the program; after an interrupt, another one during the shutdown does not change the code."""
    if code in (INTERRUPT_EXIT, TERMINATED_EXIT):
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))  # threads may be waited for
        # After the threads Python puts the default back, by which the signal itself would end the program.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(app: typer.Typer, argv: list[str], received: list[int]) -> int:
    try:
        try:
            config.current = config.load(typer.main.get_command(app))
            defaults = config.current.default_map()
            code = app(args=argv, prog_name="kvplan", default_map=defaults, standalone_mode=False)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except usage.ClickError as failure:
            return _usage(failure, argv, typer.main.get_command(app))
        finally:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPT_EXIT
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE_EXIT
    except Exception as failure:
        if wants_debug(argv):
            traceback.print_exception(failure)
        # A library that is importing turns the interrupt into an error of its own.
        return INTERRUPT_EXIT if received else _report(failure)
    return code if isinstance(code, int) else 0


def _usage(failure: Any, argv: Sequence[str], command: Any) -> int:
    if "\n" in failure.format_message():  # a group alone asks for its help
        failure.show()
    else:
        error(usage.told(failure, argv, command))
    return USAGE_EXIT


def _report(failure: Exception) -> int:
    if isinstance(failure, KVPlanError):
        error(" ".join([str(failure), *getattr(failure, "__notes__", ())]))
        return failure.exit_code
    if _disk_full(failure):
        name = getattr(failure, "filename", None)
        error(f"no space left on the disk{f' for {name}' if name else ''}; free some, then run the command again")
        return USAGE_EXIT
    if is_out_of_memory(failure):
        error("out of memory; give fewer or shorter prompts, smaller batches or a lower --replay-memory")
        return USAGE_EXIT
    text = str(failure).strip()
    what = f"{type(failure).__name__}: {text.splitlines()[0]}" if text else type(failure).__name__
    error(f"internal error: {what}; rerun with --debug for the traceback")
    return INTERNAL_EXIT


def _disk_full(failure: Exception) -> bool:
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and SQLite say it in words.
    return any(words in str(failure) for words in ("No space left on device", "database or disk is full"))
