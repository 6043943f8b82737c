"""The methods that are registered, told from their own docstrings and fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from kvplan.methods.channels import channel_selectors
from kvplan.methods.codecs import codecs
from kvplan.methods.evictors import evictors
from kvplan.methods.evictors.base import Signal
from kvplan.methods.head_splits import head_splits
from kvplan.methods.mergers import mergers
from kvplan.methods.params import Choice, IntRange
from kvplan.policy.compositions import composition_problems
from kvplan.policy.schema import LayerPolicy, Slots
from kvplan.registry import Registry
from kvplan.search.allocators import allocators
from kvplan.search.sharing import rankers

WIDTH = 80
# Key in a policy's layer, where the kind has one -> registry.
KINDS: dict[str, Registry[Any]] = {
    "evictor": evictors,
    "head_split": head_splits,
    "merger": mergers,
    "channels": channel_selectors,
    "codec": codecs,
    "allocator (search)": allocators,
    "sharing ranker (search)": rankers,
}
_PAPER = re.compile(r"(?:[A-Z]\w+, )?[A-Z]\w+(?: et al\.)? \d{4}, arXiv:\d{4}\.\d{5}")
_ENTRY = re.compile(r"    \w[\w, ]*: ")  # of Args: and Raises:


@dataclass(frozen=True)
class Parameter:
    """A field of a method."""

    name: str
    default: Any
    search: str | None


@dataclass(frozen=True)
class MethodInfo:
    """What is known of one method.

    Attributes:
        kind: What it decides.
        does: One sentence.
        paper: Authors, year and arXiv number, or None.
        needs: What it reads of the prompt, or keeps beside keys and values.
        text: Its docstring.
        unfit: Names of the evictors that it cannot go with in one layer.
    """

    name: str
    kind: str
    does: str
    paper: str | None
    needs: str
    parameters: tuple[Parameter, ...]
    text: str
    unfit: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def found() -> list[MethodInfo]:
    """Every registered method, kind by kind."""
    return [_info(kind, registry[name]) for kind, registry in KINDS.items() for name in registry]


def table(methods: Sequence[MethodInfo]) -> Table:
    """A line per method, 80 columns wide."""
    shown = Table(box=None, pad_edge=False, header_style="bold", width=WIDTH)
    shown.add_column("method", no_wrap=True)
    shown.add_column("what it does", ratio=1)
    shown.add_column("paper", no_wrap=True)
    kind = ""
    for method in methods:
        if method.kind != kind:
            kind = method.kind
            shown.add_row(Text(kind, "bold"), "", "")
        shown.add_row(f"  {method.name}", method.does, (method.paper or "").rpartition("arXiv:")[2])
    return shown


def card(method: MethodInfo) -> Text:
    """One method in full."""
    text = Text(f"{method.name}", "bold")
    text.append(f"  {method.kind}\n\n", "dim")
    text.append("".join(f"{_wrapped(line)}\n" for line in _joined(method.text)))
    if method.parameters:
        text.append("\nparameters (default; what --only params tries)\n", "bold")
        for parameter in method.parameters:
            tried = f"; {parameter.search}" if parameter.search else ""
            text.append(f"  {parameter.name}: {parameter.default}{tried}\n")
    if method.needs:
        text.append(f"\n{_wrapped(f'needs: {method.needs}')}\n")
    if method.unfit:
        text.append(f"\n{_wrapped('not with: ' + ', '.join(method.unfit))}\n")
    return text


def _joined(doc: str) -> list[str]:
    """The lines of a docstring, with those that only wrap the one above joined to it."""
    lines: list[str] = []
    for line in doc.strip().splitlines():
        above = lines[-1] if lines else ""
        if not above or not line or above.endswith(":") or _ENTRY.match(line):
            lines.append(line)
        else:
            lines[-1] = f"{above} {line.strip()}"
    return lines


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line.strip(), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  " if indent else "")


def _info(kind: str, cls: Any) -> MethodInfo:
    doc = inspect.getdoc(cls) or ""
    paper = _PAPER.search(" ".join(doc.split()))
    return MethodInfo(
        name=cls.name,
        kind=kind,
        does=" ".join(doc.split("\n\n")[0].split()),
        paper=paper[0] if paper else None,
        needs=_needs(kind, cls),
        parameters=tuple(
            Parameter(f.name, f.default, _range(f.metadata.get("search"))) for f in dataclasses.fields(cls)
        ),
        text=doc,
        unfit=_unfit(kind, cls),
    )


def _needs(kind: str, cls: Any) -> str:
    if kind != "evictor":
        return ""
    reads = {
        Signal.QUERIES: "the prompt's last queries",
        Signal.COLUMN_SUMS: "the attention that every key of the prompt received",
    }
    needs = [told for signal, told in reads.items() if signal in cls.needs]
    if cls.keeps_scores:
        heads = "slot" if cls.one_set_for_all_heads else "slot and KV head"
        needs.append(f"a position and a score per {heads} (8 bytes)")
    return "; ".join(needs)


def _unfit(kind: str, cls: Any) -> tuple[str, ...]:
    """By trying: the rules are the judge."""
    if kind not in ("evictor", "head_split", "merger", "channels", "codec"):
        return ()
    if kind == "evictor":
        others = [(k, name) for k in ("head_split", "merger", "channels", "codec") for name in KINDS[k]]
        return tuple(name for k, name in others if not _goes(cls(), k, KINDS[k][name]))
    return tuple(name for name in evictors if not _goes(evictors[name](), kind, cls))


def _goes(evictor: Any, kind: str, cls: Any) -> bool:
    keys = ("key_codec", "value_codec") if kind == "codec" else (kind,)
    layer = LayerPolicy(slots=Slots(tokens=256), evictor=evictor, **{key: cls() for key in keys})
    return not any(composition_problems(layer))


def _range(search: IntRange | Choice | None) -> str | None:
    if isinstance(search, IntRange):
        return f"{search.low} to {search.high}"
    return None if search is None else ", ".join(map(str, search.values))
