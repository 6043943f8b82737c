"""Suite: from the rows of a published data set to cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from kvplan.check.cases import Case
from kvplan.errors import DataError
from kvplan.registry import Registry

Row = Mapping[str, Any]


class Suite(ABC):
    """Reads one data set.

    Attributes:
        hub: Where `datasets` finds it, or None where it is made by scripts or packed in a way that `datasets` does not
            read, so that a local file must be given.
        subset: The configuration of the hub's data set that is taken when none is named, or None.
        only_aware: The published prompts hold their question, so the cache cannot be cut before it.
    """

    name: ClassVar[str]
    hub: ClassVar[str | None] = None
    subset: ClassVar[str | None] = None
    only_aware: ClassVar[bool] = False

    @abstractmethod
    def cases(self, rows: Sequence[Row], subset: str, where: str) -> Iterator[tuple[str, Case]]:
        """(task, case) of each row that asks something.

        Args:
            subset: The file's name without its suffix, or the hub's configuration.
            where: For messages.

        Raises:
            DataError: a row is not as published.
        """


suites: Registry[Suite] = Registry("suite")


def field(row: Row, name: str, kind: type, where: str) -> Any:
    """A field of a row. Raises: DataError: it is missing or of another type."""
    if name not in row:
        raise DataError(f"{where}: field {name!r} is missing (there are: {', '.join(sorted(row)) or 'none'})")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        wanted = {str: "text", list: "a list", int: "a number"}[kind]
        raise DataError(f"{where}: {name}: expected {wanted}, found {type(value).__name__ if value else 'nothing'}")
    return value


def texts(row: Row, name: str, where: str) -> tuple[str, ...]:
    """A list of texts that is not empty; a single text or number is a list of one."""
    value = row.get(name)
    items: list[Any] = [value] if isinstance(value, (str, int)) else field(row, name, list, where)
    found = tuple(str(item).strip() for item in items)
    if not found or not all(found):
        raise DataError(f"{where}: {name}: expected texts, found none or an empty one")
    return found
