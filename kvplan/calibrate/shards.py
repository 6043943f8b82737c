"""Shards: calibration spread over processes and hosts, each with every n-th prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvplan.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` parts, counted from 1. The parts of one list are disjoint and together all of it."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `2/8`.

        Raises:
            DataError: not a shard.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise DataError(f"--shard {text}: write for example 1/4 to 4/4 for the four parts of the prompts")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[T], what: str) -> list[T]:
        """This part of `items`, all of which every shard must see in the same order.

        Raises:
            DataError: there are fewer items than shards, so that some would have nothing to merge.
        """
        if items and len(items) < self.count:
            raise DataError(f"--shard {self.index}/{self.count}: there are only {len(items)} {what}; use fewer shards")
        return list(items[self.index - 1 :: self.count])
