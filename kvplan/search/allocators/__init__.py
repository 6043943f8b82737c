"""Allocators. A new one is a file here and an import line below."""

from kvplan.search.allocators import pyramid, squeeze, uniform
from kvplan.search.allocators.base import Allocator, allocators

__all__ = ["Allocator", "allocators", "pyramid", "squeeze", "uniform"]
