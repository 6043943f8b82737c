"""What click says of a wrong command line, as one line that also tells what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer

from kvplan.cli import config

NEAR = 0.7  # of two names; click's own suggestions are further apart
# Base of all that click says of a command line; typer exports only this child of it.
ClickError: type[Exception] = next(
    kind for kind in reversed(typer.BadParameter.__mro__) if kind.__dict__.get("format_message")
)


def told(failure: Any, argv: Sequence[str], root: Any) -> str:
    """One line: what is wrong, where a wrong value is from, and where to look.

    Args:
        failure: A `ClickError`.
        argv: The arguments.
        root: The click command that parsed them.
    """
    path, command = _command(argv, root)
    problem = _problem(failure, path, command)
    return problem if problem.endswith("?") else f"{problem}; see {path} --help"


def _command(argv: Sequence[str], root: Any) -> tuple[str, Any]:
    """The command that was meant, as far as it exists: `kvplan policy show`."""
    path, command = "kvplan", root
    for word in argv:
        if sub := getattr(command, "commands", {}).get(word):
            path, command = f"{path} {word}", sub
    return path, command


def _problem(failure: Any, path: str, command: Any) -> str:
    if (option := getattr(failure, "option_name", None)) is not None and hasattr(failure, "possibilities"):
        known = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
        return f"{path} has no option '{option}'{_near(option, known)}"
    param = getattr(failure, "param", None)
    if param is not None and type(failure) is not typer.BadParameter and hasattr(failure, "param_type"):
        about = getattr(param, "help", None)
        return f"{path} needs {config.spelled(param)}{f' ({about.rstrip(chr(46))})' if about else ''}"
    if param is not None:
        return f"{config.spelled(param)}{_value(failure)}: {_sentence(failure.message)}{_source(failure)}"
    text = str(failure.format_message())
    subs = list(getattr(command, "commands", {}))
    if subs and text.startswith("No such command"):
        word = text.split("'")[1]
        return f"unknown command '{word}'{_near(word, subs)}"
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", text, re.DOTALL):
        return f"{path} has no place for '{extra[1]}'; quote what holds blanks"
    return _sentence(text)


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=NEAR)
    return f"; did you mean '{near[0]}'?" if near else ""


def _value(failure: Any) -> str:
    """What was given, where the library below says it."""
    errors = getattr(failure.__cause__, "errors", None)
    found = errors()[0].get("input") if callable(errors) else None
    return "" if found is None else f" {found}"


def _source(failure: Any) -> str:
    origin = config.origin(failure.ctx, failure.param)
    return "" if origin is None else f" (from {origin})"


def _sentence(text: str) -> str:
    """As part of our line: 'Input should be a valid integer, unable to ...' -> 'must be a valid integer'."""
    text = " ".join(text.split()).replace("Input should be", "must be").partition(", unable to")[0]
    return text[:1].lower() + text[1:].rstrip(".")
