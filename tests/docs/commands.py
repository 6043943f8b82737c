"""The commands of README and docs, as they stand in their blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/cli.md", "docs/changelog.md")  # help texts and sentences, no commands
PROGRAMS = ("kvplan", ".venv/bin/kvplan", "make", "python", "pip", "apt-get", "initdb", "postgres", "createdb", "wait")


@dataclass(frozen=True)
class Command:
    """One command of a page: words as a shell would pass them, without variables, redirections and `&`.

    Attributes:
        section: The `##` heading above it.
    """

    page: str
    section: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)}"

    @property
    def is_kvplan(self) -> bool:
        return self.words[0].rpartition("/")[2] == "kvplan"


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.relative_to(ROOT).as_posix() not in GENERATED]


def commands() -> list[Command]:
    return [command for page in pages() for command in _of(page)]


def _of(page: Path) -> Iterator[Command]:
    name = page.relative_to(ROOT).as_posix()
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, text in _block_lines(lines):
        words = _words(text)
        if words and words[0] in PROGRAMS and not _is_sentence(words):
            section = next((line for line in reversed(lines[:number]) if line.startswith("## ")), "")
            yield Command(name, section, number, tuple(words))


def _block_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines of ```sh blocks and of indented ones, continued lines joined."""
    fence, begun, first = None, "", 0
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fence = line[3:].strip() or "text" if fence is None else None
            continue
        if fence not in (None, "sh", "bash") or (fence is None and not line.startswith("    ")):
            continue
        first = first or number
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        yield first, (begun + line).strip()
        begun, first = "", 0


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    end = next((i for i, word in enumerate(words) if word in ("&", ">", "|", "&&", "||")), len(words))
    return words[:end]


def _is_sentence(words: list[str]) -> bool:
    """Such as `make` in a picture or in a continued list."""
    return len(words) > 1 and words[0] == "make" and not re.fullmatch(r"[A-Za-z_.=\-0-9/]+", words[1])
