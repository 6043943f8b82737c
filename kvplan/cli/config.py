"""Where options come from: command line > KVPLAN_* variables > kvplan.toml > their defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from kvplan.cli.console import warn
from kvplan.errors import ConfigError, KVPlanError

FILE = "kvplan.toml"
PREFIX = "KVPLAN"
# A file that comes with somebody else's folder must not make their code run.
_NEVER_IN_FILE = ("trust_remote_code",)
_OTHER_VARIABLES = {"KVPLAN_CONFIG", "KVPLAN_DEBUG", "KVPLAN_KERNELS", "KVPLAN_TORCH"}
# Of the repository's own scripts and tests.
_SCRIPT_VARIABLES = {"KVPLAN_CI_TRIALS", "KVPLAN_EXAMPLES", "KVPLAN_POSTGRES_BIN"}
_NO_OPTIONS = {"help", "version"}

explain = False  # --explain-config was given


@dataclass
class Config:
    """Values of options that neither the command line nor a default gave.

    Attributes:
        values: Command path (`("policy", "show")`) -> parameter -> value.
        origins: Command path and parameter -> where the value is from.
    """

    values: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    origins: dict[tuple[tuple[str, ...], str], str] = field(default_factory=dict)

    def set(self, path: tuple[str, ...], name: str, value: Any, origin: str) -> None:
        self.values.setdefault(path, {})[name] = value
        self.origins[path, name] = origin

    def default_map(self) -> dict[str, Any]:
        """As click wants it: nested by command."""
        nested: dict[str, Any] = {}
        for path, values in self.values.items():
            at = nested
            for word in path:
                at = at.setdefault(word, {})
            at.update(values)
        return nested


current = Config()


class Command(TyperCommand):
    """A command that can say where each of its options comes from instead of running, and names it in errors."""

    def invoke(self, ctx: Any) -> Any:
        if not explain:
            try:
                return super().invoke(ctx)
            except KVPlanError as error:
                for param in self.params:
                    _note_origin(error, ctx, param)
                raise
        rows = [(spelled(p), _shown(ctx.params.get(p.name)), _told_origin(ctx, p)) for p in self.params if p.name]
        width = max((len(name) for name, _, _ in rows), default=0)
        for name, value, origin in rows:
            print(f"{name:{width}}  {value}  ({origin})")
        return None


def load(root: Any, environ: Mapping[str, str] = os.environ) -> Config:
    """Read kvplan.toml and the KVPLAN_* variables for the commands of `root`.

    A value may stand for one command (`[search] trials`, `KVPLAN_SEARCH_TRIALS`) or for all that have such an option
    (`model`, `KVPLAN_MODEL`).

    Args:
        root: The click group.
        environ: The variables; `KVPLAN_CONFIG` names another file.

    Raises:
        ConfigError: the file cannot be read, or names a command or option that does not exist.
    """
    commands, known = dict(_commands(root, ())), set[str]()
    config = Config()
    named = environ.get("KVPLAN_CONFIG")
    file = Path(named) if named else Path(FILE)
    if named or file.is_file():
        _from_file(config, commands, file)
    for path, params in commands.items():
        for name, param in params.items():
            for variable in (f"{PREFIX}_{name}".upper(), "_".join([PREFIX, *path, name]).upper().replace("-", "_")):
                if variable in environ and variable not in _OTHER_VARIABLES:
                    text = environ[variable]
                    value = [part.strip() for part in text.split(",")] if _is_list(param) else text
                    config.set(path, str(param.name), value, variable)
                known.add(variable)
    _warn_of_unknown(environ, known)
    return config


def _warn_of_unknown(environ: Mapping[str, str], known: set[str]) -> None:
    """An error would be too much: a variable may be of another version of kvplan, or of somebody's script."""
    if f"_{PREFIX}_COMPLETE" in environ:  # the shell asks for completions, and would show it
        return
    for name in sorted(environ):
        if name.startswith(f"{PREFIX}_") and name not in known | _OTHER_VARIABLES | _SCRIPT_VARIABLES:
            near = get_close_matches(name, sorted(known | _OTHER_VARIABLES), n=1)
            warn(f"{name} is no variable of kvplan and has no effect{f'; did you mean {near[0]}?' if near else ''}")


def _from_file(config: Config, commands: Mapping[tuple[str, ...], Mapping[str, Any]], file: Path) -> None:
    import tomllib

    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML ({error})") from error
    for key, value in data.items():
        if isinstance(value, dict):
            _table(config, commands, file, (key,), value)
        else:
            paths = [path for path, params in commands.items() if _name(key) in params]
            if not paths:
                known = sorted({name for params in commands.values() for name in _shown_names(params)})
                raise ConfigError(f"{file}: {_unknown('option', key, known)}")
            for path in paths:
                if (
                    path,
                    str(commands[path][_name(key)].name),
                ) not in config.origins:  # a table of the command says more
                    _put(config, file, path, key, value, commands[path])


def _table(
    config: Config, commands: Mapping[tuple[str, ...], Mapping[str, Any]], file: Path, path: tuple[str, ...], data: Any
) -> None:
    if not any(known[: len(path)] == path for known in commands):
        groups = sorted({" ".join(known) for known in commands})
        raise ConfigError(f"{file}: {_unknown('command', ' '.join(path), groups)}")
    for key, value in data.items():
        if isinstance(value, dict):
            _table(config, commands, file, (*path, key), value)
        elif path not in commands or _name(key) not in commands[path]:
            known = _shown_names(commands.get(path, {}))
            raise ConfigError(f"{file}: [{'.'.join(path)}] {_unknown('option', key, known)}")
        else:
            _put(config, file, path, key, value, commands[path], table=".".join(path))


def _put(
    config: Config, file: Path, path: tuple[str, ...], key: str, value: Any, params: Mapping[str, Any], table: str = ""
) -> None:
    name = _name(key)
    if name in _NEVER_IN_FILE:
        raise ConfigError(f"{file}: {key} cannot be set in a file; give --{key.replace('_', '-')} on the command line")
    many = _is_list(params[name])
    if isinstance(value, list) != many and not (many and isinstance(value, str)):
        raise ConfigError(f"{file}: {key} is {value!r}; it takes {'a list' if many else 'one value'}")
    values = [value] if many and isinstance(value, str) else value
    config.set(path, str(params[name].name), values, f"{file} [{table}]" if table else str(file))


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each command's path with its options by name."""
    for name, sub in getattr(command, "commands", {}).items():
        yield from _commands(sub, (*path, name))
    if path and not getattr(command, "commands", {}):
        options = [p for p in command.params if p.param_type_name == "option" and p.name not in _NO_OPTIONS]
        yield path, {_key(p): p for p in options}


def origin(ctx: Any, param: Any) -> str | None:
    """The file or variable that an option's value is from; None: the command line, or the default."""
    source = None if ctx is None else ctx.get_parameter_source(param.name)
    if source is None or source.name != "DEFAULT_MAP":
        return None
    return current.origins.get((tuple(ctx.command_path.split()[1:]), param.name))


def _told_origin(ctx: Any, param: Any) -> str:
    source = ctx.get_parameter_source(param.name)
    if source is not None and source.name == "COMMANDLINE":
        return "command line"
    return origin(ctx, param) or "default"


def _note_origin(error: KVPlanError, ctx: Any, param: Any) -> None:
    """Say where an option's value is from, if the error is about it: it names the option, or quotes the value."""
    where, value = origin(ctx, param), ctx.params.get(param.name)
    if where is None or value is None:
        return
    values = value if isinstance(value, list | tuple) else [value]
    # A number may stand in any message.
    words = [spelled(param), *(str(v) for v in values if not isinstance(v, int | float))]
    if any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", str(error)) for word in words if word):
        error.add_note(f"({spelled(param)} {_shown(value)} is from {where})")


def spelled(param: Any) -> str:
    """As users write it: `--max-tokens`, or a metavar."""
    if param.param_type_name == "option":
        return str(max(param.opts, key=len))
    return str(param.metavar or param.name.upper())


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _is_list(param: Any) -> bool:
    return bool(getattr(param, "multiple", False))


def _shown_names(params: Mapping[str, Any]) -> list[str]:
    return [name.replace("_", "-") for name in params if name not in _NEVER_IN_FILE]


def _key(param: Any) -> str:
    """As users know it: `--json` is `json`, whatever our parameter is called."""
    return _name(max(param.opts, key=len).lstrip("-"))


def _name(key: str) -> str:
    return key.replace("-", "_")


def _unknown(kind: str, name: str, known: list[str]) -> str:
    from kvplan.registry import unknown

    return unknown(kind, name, known)
