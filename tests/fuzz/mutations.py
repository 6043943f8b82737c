"""Valid files, damaged: a value, key or item changed where it stands, and then perhaps the bytes themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass
class Node:
    """A value of a JSON (or YAML flow) text. `pairs` may hold a key twice, and `text` need not be valid.

    Attributes:
        pairs: Of a mapping: keys as they are written, and values.
        items: Of a list.
        text: Of a scalar, as it is written.
    """

    pairs: list[list[Any]] | None = None
    items: list[Node] | None = None
    text: str = ""

    @classmethod
    def of(cls, value: Any) -> Node:
        if isinstance(value, dict):
            return cls(pairs=[[json.dumps(key), cls.of(item)] for key, item in value.items()])
        if isinstance(value, list | tuple):
            return cls(items=[cls.of(item) for item in value])
        return cls(text=json.dumps(value))

    def __str__(self) -> str:
        if self.pairs is not None:
            return "{" + ", ".join(f"{key}: {value}" for key, value in self.pairs) + "}"
        if self.items is not None:
            return "[" + ", ".join(map(str, self.items)) + "]"
        return self.text


@dataclass
class Place:
    """A value inside another one."""

    parent: Node
    index: int

    @property
    def value(self) -> Node:
        if self.parent.pairs is not None:
            return self.parent.pairs[self.index][1]
        assert self.parent.items is not None
        return self.parent.items[self.index]

    def put(self, value: Node) -> None:
        if self.parent.pairs is not None:
            self.parent.pairs[self.index][1] = value
        elif self.parent.items is not None:
            self.parent.items[self.index] = value

    def remove(self) -> None:
        entries: list[Any] = self.parent.pairs if self.parent.pairs is not None else self.parent.items or []
        del entries[self.index]

    def repeat(self) -> None:
        entries: list[Any] = self.parent.pairs if self.parent.pairs is not None else self.parent.items or []
        entries.insert(self.index, deepcopy(entries[self.index]))

    def rename(self, key: str) -> None:
        if self.parent.pairs is not None:
            self.parent.pairs[self.index][0] = key


def places(node: Node) -> Iterator[Place]:
    entries = [pair[1] for pair in node.pairs] if node.pairs is not None else node.items or []
    for index, child in enumerate(entries):
        yield Place(node, index)
        yield from places(child)


# As they are written; not all of them are valid, and of those not all mean the same in JSON and YAML.
ODD = [
    "null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1.0", "1e3", "1e308", "-1e308", "1e999", "1e-320",
    "NaN", "-Infinity", ".nan", ".inf", "9" * 30, "-" + "9" * 30, "9" * 5000, str(2**31), str(2**53 + 1), str(2**64),
    '""', '" "', '"full"', '"40%"', '"0%"', '"1e999%"', '"NaN%"', '"tova"', '"int8"', '"0-3"', '"3-0"', '"0-99999999"',
    r'"\u0000"', r'"\u001b[31mred\u001b[0m"', r'"\ud800"', r'"a\nb"', r'"\u2028"', '"\u202e"', '"\U0001f511"', '"²"',
    '"' + "x" * 3000 + '"', "[]", "{}", "[[]]", '{"": ""}', "[null]", "[1, 2]", "[" * 3000, "[" * 90 + "]" * 90,
    '{"a":' * 1500, "&a 1", "*a", "!!python/object/apply:os.system [x]", "!!float 1", "!!binary aaaa", "? x", "<<", "'",
    '"', "2026-01-01", "0x1f", "0o17", "1_000", "12:30", "on", "=", "~", "-", "#", "%", "\t", "",
]  # fmt: skip
FINITE = st.floats(allow_nan=False, allow_infinity=False)
LITERALS = st.one_of(
    st.sampled_from(ODD),
    st.integers().map(json.dumps),
    st.integers(-5, 5000).map(json.dumps),
    FINITE.map(json.dumps),
    st.text(max_size=8).map(json.dumps),
)
# Words that mean something in one of the files.
WORDS = [
    "full", "35%", "12.5%", "100%", "0-1", "2,3", "tova", "snapkv", "h2o", "knorm", "expected", "corm", "streaming",
    "sliding", "int8", "fp8", "kivi", "turboquant", "dense", "int8/dense", "cam", "kvmerger", "think", "adakv",
    "float32", "float16", "512MiB", "1GiB", "96KiB", "f1", "exact_match", "predicted", "user", "assistant", "system",
    "a", "b", "full cache", "p", "niah", "knapsack", "sha256:abc",
]  # fmt: skip
BYTES = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b"\x85",
    b"\x1b[2J",
    b"{",
    b"]",
    b"- ",
    b"---\n",
    b": ",
    b"\t",
]


def like(text: str) -> st.SearchStrategy[str]:
    """Scalars of the same type: what a rule about values must judge, after the types were found right."""
    if text.startswith('"'):
        return st.sampled_from(WORDS).map(json.dumps)
    if text in ("true", "false", "null"):
        return st.sampled_from(("true", "false", "null"))
    if text.lstrip("-").isdigit():
        return st.one_of(st.integers(0, 9), st.integers(-1, 5000), st.integers(0, 2**62)).map(json.dumps)
    return st.one_of(st.floats(0, 2), FINITE).map(json.dumps)


@st.composite
def changed(draw: st.DrawFn, seeds: list[Node]) -> str:
    """A seed's text with one to three of its values, keys or items changed."""
    root = Node(items=[deepcopy(draw(st.sampled_from(seeds)))])
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(root))
        place = known[draw(st.integers(0, len(known) - 1))]
        what = draw(st.sampled_from(("like",) * 6 + ("put", "put", "remove", "repeat", "rename", "swap", "wrap")))
        if what == "like":
            leaves = [p for p in known if p.value.pairs is None and p.value.items is None]
            if leaves:
                leaf = leaves[draw(st.integers(0, len(leaves) - 1))]
                leaf.put(Node(text=draw(like(leaf.value.text))))
        elif what == "put":
            place.put(Node(text=draw(LITERALS)))
        elif what == "remove" and place.parent is not root:
            place.remove()
        elif what == "repeat" and place.parent is not root:
            place.repeat()
        elif what == "rename":
            place.rename(draw(LITERALS))
        elif what == "swap":
            other = known[draw(st.integers(0, len(known) - 1))]
            place.put(deepcopy(other.value))
        elif what == "wrap":
            place.put(Node(items=[place.value]))
    return str(root)[1:-1]


@st.composite
def damaged(draw: st.DrawFn, seeds: list[Node]) -> bytes:
    """The bytes of a changed file: often as they are, else cut, spliced or random."""
    how = draw(st.sampled_from(("as it is",) * 8 + ("cut", "splice", "random")))
    if how == "random":
        return draw(st.binary(max_size=60))
    data = draw(changed(seeds)).encode("utf-8", "surrogatepass")
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "splice":
        at = draw(st.integers(0, len(data)))
        return data[:at] + draw(st.one_of(st.sampled_from(BYTES), st.binary(max_size=4))) + data[at:]
    return data


@st.composite
def damaged_lines(draw: st.DrawFn, seeds: list[Node]) -> bytes:
    """A JSON-lines file: one of its records is damaged."""
    lines = [str(seed).encode() for seed in seeds]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(damaged([seeds[at]]))
    return b"\n".join(lines) + b"\n"
