"""Allocators. A new one is a file here and an import line below."""

from kvplan.search.allocators import baklava, dbudget, prefixkv, pyramid, squeeze, uniform, zigzag
from kvplan.search.allocators.base import Allocator, allocators

__all__ = [
    "Allocator", "allocators", "baklava", "dbudget", "prefixkv", "pyramid", "squeeze", "uniform", "zigzag",
]  # fmt: skip
