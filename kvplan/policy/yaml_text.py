"""YAML text -> plain data plus where each value stands. YAML 1.2 scalars, no duplicate keys, no tags, no aliases."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from kvplan.errors import PolicyError

Path = tuple[Any, ...]

MAX_CHARACTERS = 2_000_000  # Room for the longest policy; a larger file would be parsed for minutes.

# YAML 1.2's scalars. PyYAML reads 1.1, in which `on` is true, 017 is 15 and 12:30 is 750; editors read 1.2.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            found = "tags, anchors and aliases are not part of a policy file"
            raise yaml.composer.ComposerError(None, None, found, event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else; never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> Any:
    surprising = any(re.fullmatch(pattern, text) for pattern, _ in _SCALARS.values())
    style = "'" if surprising else None
    if not text.isprintable():
        style = (
            '"'  # Only between double quotes can a line break other than \n be escaped; elsewhere it folds to a space.
        )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
Dumper.add_representer(str, _represent_text)


@dataclass
class Document:
    """A parsed file.

    Attributes:
        name: What to call the file in a message.
        data: Its content: dicts, lists and scalars.
        keys: Line and column, from 1, of the key at each path.
        values: Line and column, from 1, of the value at each path.
        problems: What is wrong so far, each with its line and column.
    """

    name: str
    data: Any = None
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[tuple[int, int, str]] = field(default_factory=list)

    def report(self, path: Path, message: str, *, at_key: bool = False) -> None:
        """Note a problem at `path`, or at its nearest ancestor that is in the file."""
        places = self.keys if at_key else self.values
        place = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in places), None)
        line, column = (1, 1) if place is None else places[place]
        where = ".".join(text if (text := str(part)).isprintable() else repr(text) for part in path)
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        problem = (line, column, f"{self.name}:{line}:{column}: {where + ': ' if where else ''}{shown}")
        if problem not in self.problems:
            self.problems.append(problem)

    def raise_problems(self) -> None:
        """Raises: PolicyError: there are problems; all of them, in the order of the file."""
        if self.problems:
            raise PolicyError([text for _, _, text in sorted(self.problems)])


def read(text: str, name: str) -> Document:
    """Parse `text`. Duplicate keys are noted in the document's problems, so that they are reported with the others.

    Raises:
        PolicyError: not YAML, empty, too long, several documents, or a tag, anchor or alias.
    """
    if len(text) > MAX_CHARACTERS:
        raise PolicyError(f"{name}: not a policy: {len(text)} characters; at most {MAX_CHARACTERS} are read")
    document = Document(name)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise PolicyError(f"{name}:1:1: the file is empty")
        document.data = _build(loader, root, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        told = ": ".join(part for part in (error.context, error.problem) if part)
        raise PolicyError(f"{name}:{where}: not a readable YAML file: {told}") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{name}:1:1: not a readable YAML file: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise PolicyError(f"{name}:1:1: not a policy: nested too deeply") from error
    return document


def _build(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> Any:
    document.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, document)
    return _build_scalar(loader, node, path, document)


def _build_mapping(loader: _Loader, node: yaml.MappingNode, path: Path, document: Document) -> dict[Any, Any]:
    data: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            document.report(path, "a list or mapping cannot be a key")
            continue
        key = _build_scalar(loader, key_node, path, document)
        here = (*path, key)
        mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if key in data:
            first = document.keys[here][0]
            document.keys[here] = mark
            document.report(here, f"duplicate key; it is already on line {first}", at_key=True)
            continue
        document.keys[here] = mark
        data[key] = _build(loader, value_node, here, document)
    return data


def _build_scalar(loader: _Loader, node: yaml.Node, path: Path, document: Document) -> Any:
    try:
        value = loader.construct_object(node)
    except ValueError:
        document.report(path, "the number has too many digits")
        return None
    if isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
        document.report(path, f"{half[0]!r} is half a character; write the character itself, in UTF-8")
        return value.encode("utf-8", "replace").decode()
    return value
