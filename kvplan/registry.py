"""Name -> class, one `Registry` per kind of method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kvplan.errors import MethodError

T = TypeVar("T")


def unknown(kind: str, name: str, known: list[str]) -> str:
    """One line for a name that does not exist, with the closest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(known)})"


class Registry(Generic[T]):
    """The named classes of one kind, for example the evictors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; returns the class unchanged.

        Raises:
            MethodError: the name is taken.
        """

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise MethodError(f"{self.kind} '{name}' is registered twice")
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        """Raises: MethodError: no such name; says which is closest."""
        if name not in self._classes:
            raise MethodError(unknown(self.kind, name, self.names()))
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        return sorted(self._classes)
