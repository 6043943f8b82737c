"""Head splits. A new one is a file here and an import line below."""

from kvplan.methods.head_splits import adakv
from kvplan.methods.head_splits.base import HeadSplit, head_splits

__all__ = ["HeadSplit", "adakv", "head_splits"]
